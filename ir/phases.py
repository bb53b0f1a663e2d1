"""The Phase IR: ops grouped into what runs between two joins.

A phase is prologue + anchor + epilogue. The prologue works on whole rows (norms; every worker may repeat it),
the anchor is the op that reads weights or the cache, the epilogue works on the anchor's output tile while
it is in registers. Bytes, operations and tile counts are derived from the ops; nothing here is typed in.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import expect
from .op import Op
from .types import CacheType, Value

ANCHORS = ("rows", "linear", "experts", "attend", "sample", "commit", "guess")
STATE_WRITERS = ("commit", "guess")  # anchors that one worker runs, once: they write the rows of what comes next
MATRIX = ("linear", "experts")  # anchors that multiply packed weights with an activation panel
LAYOUTS = ("plain", "heads", "pairs")


@dataclass(frozen=True)
class Phase:
    """One fused group.

    `layout` says how a phase with matrices cuts its outputs: `plain` tiles of 32, `heads` one unit per attention
    head, `pairs` 16 outputs of one matrix beside the same 16 of another (gate and up).
    `unit` is the output rows of one tile (set by the tile pass; 0 before). `fetch` is how many bytes behind a load of
    weights a processor prefetches, 0: as everywhere (set by the tile pass where it was chosen, ir/tuning.py).
    """

    name: str
    anchor_kind: str
    prologue: tuple[Op, ...]
    anchor: tuple[Op, ...]
    epilogue: tuple[Op, ...]
    layout: str = "plain"
    unit: int = 0
    fetch: int = 0

    @property
    def reads_matrix(self) -> bool:
        return self.anchor_kind in MATRIX

    @property
    def is_drain(self) -> bool:
        """Whether its tiles are those of active experts, counted when the step runs.

        Where the epilogue sums over a row's experts, a tile is columns of the sum, of all its experts.
        """
        return self.anchor_kind == "experts" and all(op.name != "combine" for op in self.epilogue)

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.prologue + self.anchor + self.epilogue

    @property
    def reads(self) -> tuple[Value, ...]:
        """Values from outside, in order of first use."""
        made = {op.out.name for op in self.ops}
        seen: dict[str, Value] = {}
        for op in self.ops:
            for value in op.operands:
                if value.name not in made:
                    seen.setdefault(value.name, value)
        return tuple(seen.values())

    @property
    def weights(self) -> tuple[Value, ...]:
        return tuple(v for v in self.reads if v.is_weight)

    def epilogue_of(self, part: Op) -> tuple[Op, ...]:
        """The epilogue ops that depend on one anchor op (a phase may hold several matrices)."""
        names, found = {part.out.name}, []
        for op in self.epilogue:
            if names & {v.name for v in op.operands}:
                found.append(op)
                if not isinstance(op.out.type, CacheType):
                    names.add(op.out.name)
        return tuple(found)

    def verify(self, known: set[str]) -> None:
        expect(self.anchor_kind in ANCHORS, f"phase `{self.name}`: unknown anchor `{self.anchor_kind}`")
        expect(self.layout in LAYOUTS, f"phase `{self.name}`: unknown layout `{self.layout}`")
        expect(self.anchor, f"phase `{self.name}`: expected at least one anchor op")
        available = set(known)
        for op in self.ops:
            for value in op.operands:
                expect(
                    value.name in available,
                    f"phase `{self.name}` reads `{value.name}` before any phase makes it",
                    hint="phases run in the order they are listed",
                )
            available.add(op.out.name)
