"""Render the GPU step: one Triton module from a fused and tiled program.

The module reads like a hand-written persistent kernel: a table loop per row bucket, one branch per distinct
body, shapes as literals. The same text serves every architecture.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ... import __version__
from ...ir.access import stored
from ...ir.bodies import Args, part_epilogue, part_of
from ...ir.errors import expect
from ...ir.formats import BLOCK_K, FORMATS, TILE_ROWS, packed_bytes
from ...ir.graph import Graph, Program
from ...ir.limits import (
    ALIGN,
    PAGE_RUN,
    PARTIAL_HEADER,
    SPLIT_TOKENS,
    STOP_TOKENS,
    Limits,
    kv_tile_bytes,
    partial_floats,
    state_fields,
)
from ...ir.op import Op
from ...ir.ops import Append, Attend, ExpertLinear
from ...ir.phases import Phase
from ...ir.sampling import EXP2
from ...ir.schedule import Schedule, padded, part_weight, unit_rows
from ...ir.stream import PIECE, SIZE_BITS
from ...ir.table import ARGS, FIELDS, RECORD_WORDS, CacheGroup, cache_groups, event_count
from ...ir.types import OUTPUTS, Value
from ..rendering import Bodies, BodyText, render_bodies, template
from . import emit
from .build import MOST_STAGES, SHELF_BYTES, WARPS
from .experts import Experts, common_places, find_router, finish_text
from .formats import PANEL_WORDS, reader
from .linear import FEW_ROWS, TEMPLATES, Matrix
from .products import Products, find_bodies, helper_texts
from .rows import PANEL_TYPES, RowEmitter

WORD = 4
EVENT_STRIDE = 32  # words: an event has a 128-byte line of its own
EVENTS = 64  # words before the events: the epoch, and the fault record at FAULT
FAULT = 8
SPIN_POLLS, FAULT_POLLS = 1 << 12, 1 << 22  # polls before a worker looks for a fault, and before it reports one
EMPTY = -1e30
STATE = "slot, queue"  # where a worker is in its weight stream
STREAMED = "few"  # the bucket whose matrices walk the weight stream
ATTEND_STAGES = 2  # tiles of the cache in flight
SAMPLE_CHUNK = 2048  # logits at a time


@dataclass(frozen=True)
class Source:
    """The generated module, the bodies each bucket's tasks run, and what a launcher must know.

    The module has one kernel per bucket, `step_few` and `step_many`.
    """

    text: str
    bodies: Bodies
    kv_names: tuple[str, ...]
    control_words: int
    chunk_blocks: dict[str, int]  # most blocks in a chunk of the weight stream, by weight format
    slot_bytes: int  # a place in the ring: the largest chunk of the weight stream, and one of its entries


@dataclass(frozen=True)
class Case:
    """A branch of the table loop."""

    test: str
    title: str
    call: str


class Renderer:
    """Everything that stays the same from body to body."""

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        one = next(iter(schedules.values()))
        self.schedules, self.program, self.limits = schedules, one.program, one.limits
        self.groups = cache_groups(self.program.kinds, self.program.layers)
        self.vocab = self.program.logits.tensor.width
        self.events = max(event_count(s) for s in schedules.values())
        fields = state_fields(self.limits, self.vocab, len(self.groups), self.program.routing)
        self.state = {f.name: f.offset // WORD for f in fields}
        self.kv_names = tuple(f"kv{i}" for i in range(len(self.groups)))
        self.places: dict[str, int] = {}  # where every linear body has its common arguments
        self.expert_places: dict[str, int] = {}  # and every experts body
        self.router = find_router(self.program)
        self.chunk_blocks = _chunk_blocks(self.program)
        sizes = [packed_bytes(FORMATS[name], TILE_ROWS, BLOCK_K * n) for name, n in self.chunk_blocks.items()]
        self.slot_bytes = padded(max(sizes) + PIECE, ALIGN)
        expect(
            min(self.limits.few_rows, self.limits.rows) <= FEW_ROWS,
            f"expected few_rows of at most {FEW_ROWS} for a GPU, got {self.limits.few_rows}",
        )

    def render(self) -> Source:
        listed, bodies = render_bodies(self.schedules, self._body, "#")
        matrices, experts = find_bodies(self.program, listed, bodies)
        products = Products(self.limits, self.router, self.places, self.expert_places, self._common({}))
        text = template(TEMPLATES, "step.py.j2").render(
            program=self.program,
            version=__version__,
            sync=self._sync(),
            functions=[
                *helper_texts(self.program, self.router),
                *(body.text for body in listed),
                *(text for b in self.schedules for text in products.texts(b, matrices, experts)),
            ],
            buckets={b: self._cases(b, listed, matrices, experts) for b in self.schedules},
            kv_names=", ".join(self.kv_names),
            fault=FAULT,
            record_words=RECORD_WORDS,
            record_bytes=WORD * RECORD_WORDS,
            streamed=STREAMED,
            slot_bytes=self.slot_bytes,
            word={name: i for i, name in enumerate(FIELDS)},
        )
        ast.parse(text)
        words = EVENTS + EVENT_STRIDE * self.events
        return Source(text, bodies, self.kv_names, words, self.chunk_blocks, self.slot_bytes)

    def _cases(
        self, bucket: str, listed: Sequence[BodyText], matrices: Sequence[Matrix], experts: Sequence[Experts]
    ) -> list[Case]:
        """The branches of a bucket's table loop: one per body, one per format for all its matrices."""
        where = f"workspace, weights, state, {', '.join(self.kv_names)}"
        codes = {m.code for m in matrices} | {e.code for e in experts}
        cases = []
        for body in listed:
            if body.code not in codes:
                last = ", control" if body.title.endswith(".commit") else ""
                call = f"body_{body.code}(here, first, last, stride, {where}{last})"
                cases.append(Case(f"body == {body.code}", body.title, call))
        for name in dict.fromkeys(m.format for m in matrices):
            mine = [m for m in matrices if m.format == name]
            test = " | ".join(f"(body == {m.code})" for m in mine)
            call = f"{bucket}_linear_{name}(body, here, first, last, {where})"
            if bucket == STREAMED:
                call = f"{STATE} = {call[:-1]}, ring, {STATE}, piece, STAGES)"
            cases.append(Case(test, ", ".join(m.title for m in mine), call))
        for name in dict.fromkeys(e.format for e in experts):
            chosen = [e for e in experts if e.format == name]
            call = f"{bucket}_experts_{name}(body, here, first, last, stride, workspace, weights, state)"
            test = " | ".join(f"(body == {e.code})" for e in chosen)
            cases.append(Case(test, ", ".join(e.title for e in chosen), call))
        return cases

    def _common(self, numbers: dict[str, int]) -> dict[str, Any]:
        return {
            "code": "CODE", "title": "TITLE", "args": numbers, "args_word": ARGS, "align_words": ALIGN // WORD,
            "kv_names": ", ".join(self.kv_names), "layer_word": FIELDS.index("layer"), **self.state,
        }  # fmt: skip

    def _sync(self) -> str:
        text = template(TEMPLATES, "sync.py.j2").render(
            events=EVENTS,
            event_stride=EVENT_STRIDE,
            fault=FAULT,
            spin_polls=SPIN_POLLS,
            fault_polls=FAULT_POLLS,
            align_words=ALIGN // WORD,
            prefetch_lines=512,
            panel_words=PANEL_WORDS,
        )
        text += "\n\n" + template(TEMPLATES, "stream.py.j2").render(
            record_words=RECORD_WORDS,
            shelf_bytes=SHELF_BYTES,
            size_bits=SIZE_BITS,
            piece=PIECE,
            fetch_bytes=32 * WARPS * PIECE,
            fetches=-(-self.slot_bytes // (32 * WARPS * PIECE)),
            slot_bytes=self.slot_bytes,
            most_stages=MOST_STAGES,
        )
        constants = [f"{name.upper()} = tl.constexpr({offset})" for name, offset in self.state.items()]
        return "\n".join(constants) + "\n\n\n" + text + "\n\n" + self._group_functions()

    def _group_functions(self) -> str:
        """Which cache pool a group's number means, and the elements of one run of its pages."""
        names = ", ".join(self.kv_names)
        lines = ["@triton.jit", f"def kv_of(group, {names}):", "    kv = kv0"]
        for i, name in list(enumerate(self.kv_names))[1:]:
            lines += [f"    if group == {i}:", f"        kv = {name}"]
        lines += ["    return kv", "", "", "@triton.jit", "def run_elements(group):"]
        sizes = [self._run_elements(g) for g in self.groups]
        lines.append(f"    elements = tl.full((), {sizes[0]}, tl.int64)")
        for i, size in list(enumerate(sizes))[1:]:
            lines.append(f"    elements = tl.where(group == {i}, {size}, elements)")
        return "\n".join([*lines, "    return elements", ""])

    def _run_elements(self, group: CacheGroup) -> int:
        size = kv_tile_bytes(group.type.head_dim, self.limits)
        return PAGE_RUN * len(group.layers) * group.type.kv_heads * size // kv_element(self.limits)

    def _body(self, graph: Graph, phase: Phase, name: str, args: Args) -> str:
        numbers = {key: i for i, key in enumerate(args)}
        common = self._common(numbers)
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
            case _:
                return self._commit(common)

    def _row_count(self, value: Value) -> int:
        return self.state["n_outputs" if value.tensor.shape[0] == OUTPUTS else "n_rows"]

    def _pack(self, graph: Graph, phase: Phase, name: str, numbers: dict[str, int], common: dict[str, Any]) -> str:
        x, kind = phase.anchor[0].operands[0], name.removeprefix("pack.")
        source = graph.producer(x)
        attended = source if isinstance(source, Attend) and not phase.prologue else None
        emitter = RowEmitter(phase.prologue, attended, numbers)
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
        log2e = 1.4426950408889634
        return str(
            template(TEMPLATES, "attend.py.j2").render(
                **common,
                ops=[str(op)],
                stages=ATTEND_STAGES,
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
                split_tokens=SPLIT_TOKENS,
                q_stride=padded(op.q.tensor.width),
                scale=repr(op.scale * log2e),
                softcap=repr(op.softcap),
                log2e=repr(log2e),
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
            )
        )

    def _commit(self, common: dict[str, Any]) -> str:
        return str(
            template(TEMPLATES, "commit.py.j2").render(
                **common,
                seen_words=-(-self.vocab // 32),
                context=self.limits.context,
                stop_tokens=STOP_TOKENS,
                row_lanes=emit.lanes(self.limits.rows),
                output_lanes=emit.lanes(self.limits.outputs),
            )
        )


def _chunk_blocks(program: Program) -> dict[str, int]:
    """Most blocks of 32 k in a chunk of the weight stream, by weight format."""
    phases = (phase for graph in program.graphs for phase in graph.phases if phase.anchor_kind == "linear")
    names = dict.fromkeys(op.operands[1].tensor.dtype for phase in phases for op in phase.anchor)
    return {name: reader(name).chunk_blocks for name in names}


def kv_element(limits: Limits) -> int:
    """Bytes of one element of the KV cache."""
    return {"bf16": 2, "f32": 4}[limits.kv_dtype]


def render_kernel(schedules: Mapping[str, Schedule]) -> Source:
    """The kernels of one program; `schedules` holds one schedule per bucket."""
    expect(schedules, "expected a schedule per bucket")
    return Renderer(schedules).render()
