"""The Schedule IR: for every worker an ordered list of wait -> run tiles -> signal, per section of the program.

A section is one graph of the program; layers of a kind share theirs, so a schedule's size does not depend on
the number of layers. An event is an all-join: it is complete when `target` tasks have signalled it. `^` is the
end event of whatever section ran before. A schedule is for one number of workers and one row bucket: `few`
(prologues, and work on rows where it can be, repeated by every worker; attention split over the context) or `many`
(both shared by rows).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod

from .errors import expect
from .formats import FORMATS, packed_bytes
from .graph import Graph, Program
from .limits import ALIGN, Limits
from .op import Op
from .ops import MatrixOp
from .phases import Phase
from .tuning import UNTUNED, Tuning
from .types import Value

BUCKETS = ("few", "many")
# How rows meet a matrix on a GPU: one after the other on CUDA cores, or in tiles on tensor cores.
STRATEGIES = {"few": "vector", "many": "matrix"}
PREVIOUS = "^"  # the end event of the section before
LIVE = -1  # `last` of a drain: the number of tiles is known when the step runs


@dataclass(frozen=True)
class Prefetch:
    """Bytes of a packed weight to pull in while waiting: what this worker reads next."""

    weight: str
    offset: int
    size: int


@dataclass(frozen=True)
class Task:
    """Run `body` of `phase` on tiles first, first + step, ... below `last`.

    Bodies: `pack.KIND` (prologue into an activation panel), an anchor's value name (a matrix part), or the
    anchor kind itself (`attend`, `rows`, `sample`, `commit`).
    """

    phase: str
    body: str
    first: int
    last: int
    step: int = 1
    waits: tuple[str, ...] = ()
    signal: str = ""
    prefetch: Prefetch | None = None

    @property
    def is_drain(self) -> bool:
        return self.last == LIVE


@dataclass(frozen=True)
class Section:
    """The queues of one graph. `events` maps each event to its target; `end` is the last of them, empty if none.

    `heads` is what each worker reads first in this section: the section before prefetches it at its end.
    """

    name: str
    events: tuple[tuple[str, int], ...]
    end: str
    queues: tuple[tuple[Task, ...], ...]
    heads: tuple[Prefetch | None, ...] = ()

    def target(self, event: str) -> int:
        return dict(self.events)[event]

    def repeats(self, phase: Phase) -> bool:
        """Whether every worker runs a `rows` phase on all rows for itself: it then completes no event."""
        return phase.anchor_kind == "rows" and all(name != phase.name for name, _ in self.events)


@dataclass(frozen=True)
class Buffer:
    """A range of the workspace in bytes. Private: one copy per worker, `size` bytes apart.

    Values that share a buffer are listed in `values`; a row (of R or L) takes `row_bytes`.
    """

    name: str
    values: tuple[str, ...]
    row_bytes: int
    size: int
    offset: int = -1
    private: bool = False

    def total(self, workers: int) -> int:
        return self.size * (workers if self.private else 1)


@dataclass(frozen=True)
class Schedule:
    """A program (fused and tiled), who runs what, and where values live.

    `buffers` are keyed by (section, value) through `place`: values carried between sections are in section ``.
    `tuning`: what was chosen for whoever runs it; the program holds what is a phase's own.
    """

    program: Program
    limits: Limits
    bucket: str
    workers: int
    sections: tuple[Section, ...]
    buffers: tuple[Buffer, ...] = ()
    tuning: Tuning = UNTUNED

    def section(self, name: str) -> Section:
        return next(s for s in self.sections if s.name == name)

    def graph(self, name: str) -> Graph:
        return next(g for g in self.program.graphs if g.name == name)

    @property
    def rows(self) -> int:
        """Most rows a step of this bucket has."""
        few = min(self.limits.few_rows, self.limits.rows)
        return few if self.bucket == "few" else self.limits.rows

    def buffer(self, section: str, value: str) -> Buffer:
        """Where a value lives: its section's own buffer or one carried between sections."""
        for key in (f"{section}/{value}", f"/{value}"):
            for buffer in self.buffers:
                if key in buffer.values:
                    return buffer
        expect(False, f"section `{section}`: value `{value}` has no buffer")
        raise AssertionError

    def map_sections(self, change) -> Schedule:  # type: ignore[no-untyped-def]
        return dataclasses.replace(self, sections=tuple(change(s) for s in self.sections))

    @property
    def workspace_bytes(self) -> int:
        return max((b.offset + b.total(self.workers) for b in self.buffers), default=0)


def phase_of(graph: Graph, name: str) -> Phase:
    return next(p for p in graph.phases if p.name == name)


def panel_kind(weight: Value) -> str:
    """What form of activation a weight's kernel reads: int8 blocks, bf16 pairs, or float32."""
    return FORMATS[weight.tensor.dtype].panel


def panel_kinds(phase: Phase) -> tuple[str, ...]:
    return tuple(dict.fromkeys(panel_kind(op.weight) for op in phase.anchor if isinstance(op, MatrixOp)))


def padded(n: int, to: int = 32) -> int:
    return -(-n // to) * to


def panel_row_bytes(kind: str, k: int) -> int:
    """Bytes of one row of an activation panel on the target that needs most.

    q8 is int8 with scales on a CPU and float16 on a GPU; bf16 is float32 on levels without bf16 dots.
    """
    return padded(k) * (2 if kind == "q8" else 4)


def parts(phase: Phase) -> tuple[tuple[Op, ...], ...]:
    """The matrices of a phase that have a body each: interleaved pairs count as one."""
    if phase.layout == "pairs":
        return (phase.anchor,)
    return tuple((op,) for op in phase.anchor)


def part_name(part: tuple[Op, ...]) -> str:
    return "_".join(op.out.name for op in part)


def part_weight(part: tuple[Op, ...]) -> Value:
    """The weight of a part; those of a pair are alike."""
    anchor = part[0]
    assert isinstance(anchor, MatrixOp)
    return anchor.weight


def packed_name(part: tuple[Op, ...]) -> str:
    """The name of a part's packed weight: its matrices' names."""
    return "_".join(part_weight((op,)).name.removeprefix("w.") for op in part)


def part_experts(part: tuple[Op, ...]) -> int:
    """How many matrices a part's packed weight holds one after the other."""
    shape = part_weight(part).tensor.shape
    return int(shape[0]) if len(shape) == 3 else 1


def part_units(phase: Phase, part: tuple[Op, ...]) -> int:
    return -(-part[0].out.tensor.width // phase.unit)


def unit_rows(phase: Phase, part: tuple[Op, ...]) -> int:
    """Packed weight rows of one unit, padding to whole tiles included."""
    return padded(phase.unit * len(part))


def unit_bytes(phase: Phase, part: tuple[Op, ...]) -> int:
    """Packed weight bytes that one unit of a part reads."""
    weight = part_weight(part).tensor
    return packed_bytes(FORMATS[weight.dtype], unit_rows(phase, part), weight.width)


def part_bytes(phase: Phase, part: tuple[Op, ...]) -> int:
    """Packed bytes of a whole part, aligned as weights are stored."""
    return padded(part_experts(part) * part_units(phase, part) * unit_bytes(phase, part), ALIGN)


def value_floats(value: Value) -> int:
    """Floats of one row of an activation in memory: what it holds per row, its last axis padded to whole tiles."""
    return prod(int(n) for n in value.tensor.shape[1:-1]) * padded(value.tensor.width)


def panel_rows(x: Value) -> int:
    """Panel rows that one row of an activation takes: one, or one for each of a row's experts."""
    return prod(int(n) for n in x.tensor.shape[1:-1])
