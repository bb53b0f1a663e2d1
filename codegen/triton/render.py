"""Render the GPU step: one Triton module from a fused and tiled program.

The module reads like a hand-written persistent kernel: a table loop per row bucket, one branch per distinct
body, shapes as literals. The same text serves every architecture.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ... import __version__
from ...ir.errors import expect
from ...ir.formats import BLOCK_K, FORMATS, packed_body_bytes
from ...ir.graph import Program
from ...ir.limits import (
    ALIGN,
    PAGE_RUN,
    Limits,
    kv_tile_bytes,
    state_fields,
)
from ...ir.phases import STATE_WRITERS
from ...ir.schedule import Schedule, padded
from ...ir.stream import PIECE, SIZE_BITS
from ...ir.table import FIELDS, RECORD_WORDS, CacheGroup, cache_groups, event_count
from ..rendering import Bodies, BodyText, render_bodies, template
from .bodies import BodyRenderer
from .build import MOST_STAGES, SHELF_BYTES
from .experts import Experts, find_router
from .formats import PANEL_WORDS, WORD, reader
from .linear import FEW_ROWS, TEMPLATES, Matrix
from .products import Products, find_bodies, helper_texts

EVENT_STRIDE = 32  # words: an event has a 128-byte line of its own
EVENTS = 64  # words before the events: the epoch, and the fault record at FAULT
FAULT = 8
SPIN_POLLS, FAULT_POLLS = 1 << 12, 1 << 22  # polls before a worker looks for a fault, and before it reports one
STATE = "slot, queue"  # where a worker is in its weight stream
STREAMED = "few"  # the bucket whose matrices walk the weight stream


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
    warps: int
    ring: int  # chunks in the ring at most


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
        self.groups = cache_groups(self.program)
        self.vocab = self.program.logits.tensor.width
        self.events = max(event_count(s) for s in schedules.values())
        fields = state_fields(self.limits, self.vocab, len(self.groups), self.program.routing)
        self.state = {f.name: f.offset // WORD for f in fields}
        self.kv_names = tuple(f"kv{i}" for i in range(len(self.groups)))
        self.bodies = BodyRenderer(self.program, self.limits, self.state, self.kv_names)
        self.router = find_router(self.program)
        self.tuning = one.tuning
        self.chunk_blocks = _chunk_blocks(self.program, self.tuning["chunk"])
        sizes = [packed_body_bytes(FORMATS[name], BLOCK_K * n) for name, n in self.chunk_blocks.items()]
        self.slot_bytes = padded(max(sizes) + PIECE, ALIGN)
        expect(
            min(self.limits.few_rows, self.limits.rows) <= FEW_ROWS,
            f"expected few_rows of at most {FEW_ROWS} for a GPU, got {self.limits.few_rows}",
        )

    def render(self) -> Source:
        listed, bodies = render_bodies(self.schedules, self.bodies.text, "#")
        matrices, experts = find_bodies(self.program, listed, bodies)
        places, common = (self.bodies.places, self.bodies.expert_places), self.bodies.common({})
        products = Products(self.limits, self.router, *places, common, self.tuning)
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
        return Source(text, bodies, self.kv_names, words, self.chunk_blocks, self.slot_bytes,
                      self.tuning["warps"], self.tuning["ring"])  # fmt: skip

    def _cases(
        self, bucket: str, listed: Sequence[BodyText], matrices: Sequence[Matrix], experts: Sequence[Experts]
    ) -> list[Case]:
        """The branches of a bucket's table loop: one per body, one per format for all its matrices."""
        where = f"workspace, weights, state, {', '.join(self.kv_names)}"
        codes = {m.code for m in matrices} | {e.code for e in experts}
        cases = []
        for body in listed:
            if body.code not in codes:
                last = ", control" if body.title.rpartition(".")[2] in STATE_WRITERS else ""
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
            fetch_bytes=32 * self.tuning["warps"] * PIECE,
            fetches=-(-self.slot_bytes // (32 * self.tuning["warps"] * PIECE)),
            slot_bytes=self.slot_bytes,
            most_stages=MOST_STAGES,
            passes_by=self.limits.has_draft_model,
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


def _chunk_blocks(program: Program, most: int) -> dict[str, int]:
    """Most blocks of 32 k in a chunk of the weight stream, by weight format."""
    phases = (phase for graph in program.graphs for phase in graph.phases if phase.anchor_kind == "linear")
    names = dict.fromkeys(op.operands[1].tensor.dtype for phase in phases for op in phase.anchor)
    return {name: reader(name).chunk_blocks(most) for name in names}


def kv_element(limits: Limits) -> int:
    """Bytes of one element of the KV cache."""
    return {"bf16": 2, "f32": 4}[limits.kv_dtype]


def render_kernel(schedules: Mapping[str, Schedule]) -> Source:
    """The kernels of one program; `schedules` holds one schedule per bucket."""
    expect(schedules, "expected a schedule per bucket")
    return Renderer(schedules).render()
