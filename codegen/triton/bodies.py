"""Functions of single bodies of the GPU step: what their templates are filled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...ir.access import stored
from ...ir.bodies import Args, part_epilogue, part_of
from ...ir.drafting import LONGEST, MATCH_BITS, SHORTEST
from ...ir.errors import expect
from ...ir.graph import Graph, Program
from ...ir.limits import (
    ALIGN,
    PAGE_RUN,
    PARTIAL_HEADER,
    STOP_TOKENS,
    Limits,
    kv_tile_bytes,
    partial_floats,
)
from ...ir.op import Op
from ...ir.ops import Append, Attend, ExpertLinear
from ...ir.phases import Phase
from ...ir.sampling import EXP2
from ...ir.schedule import padded, part_weight, unit_rows
from ...ir.table import ARGS, FIELDS
from ...ir.types import OUTPUTS, Value
from ..rendering import template
from . import emit
from .experts import common_places, finish_text
from .formats import WORD, reader
from .linear import TEMPLATES
from .rows import LOG2E, PANEL_TYPES, RowEmitter

EMPTY = -1e30
ATTEND_BYTES = 32 << 10  # of shared memory for keys on their way: with more, there is no room for the weights' ring
SAMPLE_CHUNK = 2048  # logits at a time
LOOK_UP_CHUNK = 1024  # places of a slot's tokens at a time


class BodyRenderer:
    """Texts of the bodies of one program.

    state: words of the fields of the step's state. `places`, `expert_places`: where every matrix, and every experts
    body, has its common arguments; known once all bodies are rendered.
    """

    def __init__(self, program: Program, limits: Limits, state: Mapping[str, int], kv_names: Sequence[str]) -> None:
        self.limits, self.state, self.kv_names = limits, state, kv_names
        self.vocab = program.logits.tensor.width
        self.places: dict[str, int] = {}
        self.expert_places: dict[str, int] = {}

    def common(self, numbers: dict[str, int]) -> dict[str, Any]:
        """What every template may use; `numbers`: places of a body's arguments."""
        return {
            "code": "CODE", "title": "TITLE", "args": numbers, "args_word": ARGS, "align_words": ALIGN // WORD,
            "kv_names": ", ".join(self.kv_names), "layer_word": FIELDS.index("layer"), **self.state,
        }  # fmt: skip

    def text(self, graph: Graph, phase: Phase, name: str, args: Args) -> str:
        """The function of one body; of a matrix, what comes after its tiles."""
        numbers = {key: i for i, key in enumerate(args)}
        common = self.common(numbers)
        if name.startswith("pack."):
            return self._pack(graph, phase, name, numbers, common)
        match phase.anchor_kind:
            case "linear":
                return self._finish(graph, phase, part_of(phase, name), numbers, common)
            case "experts":
                return self._experts(graph, phase, part_of(phase, name), numbers, common)
            case "rows":
                return self._rows(graph, phase, numbers, common)
            case "attend":
                return self._attend(phase, common)
            case "sample":
                return self._sample(common)
            case "guess":
                return self._guess(common)
            case _:
                return self._commit(common)

    def _row_count(self, value: Value) -> int:
        return self.state["n_outputs" if value.tensor.shape[0] == OUTPUTS else "n_rows"]

    def _pack(self, graph: Graph, phase: Phase, name: str, numbers: dict[str, int], common: dict[str, Any]) -> str:
        x, kind = phase.anchor[0].operands[0], name.removeprefix("pack.")
        read = [x, *(v for op in phase.prologue for v in op.operands)]
        attended = next((op for v in read if isinstance(op := graph.producer(v), Attend)), None)
        emitter = RowEmitter(phase.prologue, attended, numbers, self.limits.split_tokens)
        if len(x.tensor.shape) == 3:
            anchor = phase.anchor[0]
            assert isinstance(anchor, ExpertLinear)
            emitter.used(anchor.gates, anchor.k)
        emitter.panel(x, kind)
        pointers = [n for n in numbers if n not in ("panel", "splits", "window")]
        return str(
            template(TEMPLATES, "pack.py.j2").render(
                **common,
                ops=[str(op) for op in phase.prologue],
                row_count=self._row_count(x),
                panel_type=PANEL_TYPES[kind],
                pointers=[emit.declare(n, numbers[n], ALIGN // WORD) for n in pointers],
                statements=emitter.lines,
            )
        )

    def _experts(
        self, graph: Graph, phase: Phase, part: tuple[Op, ...], numbers: dict[str, int], common: dict[str, Any]
    ) -> str:
        """The epilogue of experts; experts.py makes what comes before it."""
        places = common_places(phase, part, numbers)
        expect(self.expert_places in ({}, places), f"phase `{phase.name}`: experts have their arguments elsewhere")
        self.expert_places = places
        reader(part_weight(part).tensor.dtype)  # refuses what has none
        return finish_text(phase, part, numbers, stored(graph, phase), common)

    def _finish(
        self, graph: Graph, phase: Phase, part: tuple[Op, ...], numbers: dict[str, int], common: dict[str, Any]
    ) -> str:
        """The epilogue of a matrix; linear.py makes what comes before it."""
        ops, kept = part_epilogue(phase, part), stored(graph, phase)
        names = ("weight", "panel", "blocks", "tiles", "unit")
        self.places |= {n: numbers[n] for n in names if n in numbers}
        expect(
            all(numbers.get(n, at) == at for n, at in self.places.items()),
            f"phase `{phase.name}`: a matrix has its common arguments elsewhere than the others",
        )
        fmt = part[0].operands[1].tensor.dtype
        reader(fmt)  # refuses what has none
        if phase.layout == "heads":
            lines = emit.head_epilogue(phase, part, ops, kept, self._append(part, ops, numbers))
        else:
            lines = emit.tile_epilogue(phase, part, ops, kept)
        pointers = [n for n in numbers if n not in (*names, "group", "maxima")]
        return str(
            template(TEMPLATES, "finish.py.j2").render(
                **common,
                ops=[str(op) for op in (*part, *ops)],
                fmt_name=fmt,
                layout=phase.layout,
                width=unit_rows(phase, part),
                head=phase.unit,
                head_lanes=emit.lanes(phase.unit),
                outputs=part[0].out.tensor.shape[0] == OUTPUTS,
                pointers=[emit.declare(n, numbers[n], ALIGN // WORD) for n in pointers],
                statements=lines,
            )
        )

    def _append(self, part: tuple[Op, ...], ops: tuple[Op, ...], numbers: dict[str, int]) -> list[str]:
        for op in ops:
            if isinstance(op, Append):
                half = "k" if op.k.name in {o.out.name for o in (*part, *ops)} else "v"
                sizes = {"slots": self.limits.slots, "slot_pages": self.limits.pages}
                names = ", ".join(self.kv_names)
                return emit.append_lines(
                    op, half, self.limits.kv_dtype, sizes, names, numbers["group"], FIELDS.index("layer")
                )
        return []

    def _rows(self, graph: Graph, phase: Phase, numbers: dict[str, int], common: dict[str, Any]) -> str:
        kept = stored(graph, phase)
        emitter = RowEmitter(phase.ops)
        for op in phase.ops:
            if op.out.name in kept:
                emitter.store(op)
        return str(
            template(TEMPLATES, "rows.py.j2").render(
                **common,
                ops=[str(op) for op in phase.ops],
                row_count=self._row_count(phase.ops[0].out),
                pointers=[emit.declare(n, i, ALIGN // WORD) for n, i in numbers.items()],
                statements=emitter.lines,
            )
        )

    def _attend(self, phase: Phase, common: dict[str, Any]) -> str:
        op = phase.anchor[0]
        assert isinstance(op, Attend)
        cache = op.kv.cache
        dim = padded(cache.head_dim, 16)
        keys = kv_tile_bytes(cache.head_dim, self.limits) // 2
        return str(
            template(TEMPLATES, "attend.py.j2").render(
                **common,
                ops=[str(op)],
                stages=2 if 2 * keys <= ATTEND_BYTES else 1,
                kv_dtype=self.limits.kv_dtype,
                heads=op.q.tensor.width // cache.head_dim,
                kv_heads=cache.kv_heads,
                head_dim=cache.head_dim,
                group=op.group,
                group_lanes=max(16, emit.lanes(op.group)),
                dim_lanes=max(32, emit.lanes(dim)),
                dim_padded=dim,
                value_words=32 * dim,
                value_elements=64 * dim,
                tile_elements=128 * dim,
                page_run=PAGE_RUN,
                partial_floats=partial_floats(cache.head_dim),
                partial_header=PARTIAL_HEADER,
                split_tokens=self.limits.split_tokens,
                q_stride=padded(op.q.tensor.width),
                scale=repr(op.scale * LOG2E),
                softcap=repr(op.softcap),
                sinks=cache.sinks,
                log2e=repr(LOG2E),
                empty=repr(EMPTY),
                slots=self.limits.slots,
                slot_pages=self.limits.pages,
            )
        )

    def _sample(self, common: dict[str, Any]) -> str:
        return str(
            template(TEMPLATES, "sample.py.j2").render(
                **common,
                vocab=self.vocab,
                stride=padded(self.vocab),
                seen_words=-(-self.vocab // 32),
                weights_at=padded(self.vocab, 4),
                chunk=min(SAMPLE_CHUNK, max(32, emit.lanes(self.vocab))),
                exp2=[repr(float(c)) for c in EXP2],
                drafts=self.limits.drafts,
                draft_lanes=emit.lanes(self.limits.drafts + 1),
            )
        )

    def _guess(self, common: dict[str, Any]) -> str:
        return str(
            template(TEMPLATES, "guess.py.j2").render(
                **common,
                vocab=self.vocab,
                stride=padded(self.vocab),
                chunk=min(SAMPLE_CHUNK, max(32, emit.lanes(self.vocab))),
                drafts=self.limits.drafts,
                draft_lanes=emit.lanes(self.limits.drafts + 1),
                slot_lanes=emit.lanes(self.limits.slots),
            )
        )

    def _commit(self, common: dict[str, Any]) -> str:
        limits = self.limits
        drafting = {
            "drafts": limits.drafts, "draft_lanes": emit.lanes(limits.drafts + 1), "few_rows": limits.few_rows,
            "shortest": SHORTEST, "longest": LONGEST, "chunk": LOOK_UP_CHUNK, "match_bits": MATCH_BITS,
            "draft_model": limits.has_draft_model, "few": limits.rows_beside(1), "rows": limits.rows,
        }  # fmt: skip
        return str(
            template(TEMPLATES, "commit_drafts.py.j2" if limits.drafts else "commit.py.j2").render(
                **common,
                **drafting,
                seen_words=-(-self.vocab // 32),
                context=limits.context,
                stop_tokens=STOP_TOKENS,
                row_lanes=emit.lanes(limits.rows),
                output_lanes=emit.lanes(limits.outputs),
            )
        )
