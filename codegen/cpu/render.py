"""Render the CPU step: C++ from a fused and tiled program.

Bodies that render to the same text are one function, whichever layers and phases they serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ... import __version__
from ...ir.access import stored
from ...ir.bodies import GATHER_ROWS, Args, part_epilogue, part_of
from ...ir.errors import expect
from ...ir.graph import Graph
from ...ir.limits import (
    ALIGN,
    PAGE_RUN,
    PAGE_TOKENS,
    PARTIAL_HEADER,
    STOP_TOKENS,
    Limits,
    kv_tile_bytes,
    state_fields,
)
from ...ir.op import Op
from ...ir.ops import Attend, Embed, ExpertLinear
from ...ir.phases import Phase
from ...ir.schedule import BUCKETS, Schedule, padded, panel_rows, part_weight, unit_rows
from ...ir.table import ARGS, FIELDS, RECORD_WORDS, cache_groups, event_count
from ...ir.types import OUTPUTS, Value
from ..rendering import Bodies, render_bodies, template
from . import emit
from .experts import experts_fields
from .units import STEP, TEMPLATES, definitions, kernel_units, phase_fetch, unit

HEAD_DIM_MAX = 256  # of the attention kernel's stack buffers
C_TYPES = {"int32": "int32_t", "uint32": "uint32_t", "uint64": "uint64_t", "float32": "float"}
ACTS = {"q8": "Act::Q8", "bf16": "BF16::ACT", "f32": "Act::F32"}


@dataclass(frozen=True)
class Source:
    """Generated C++ by file name without suffix and, for each bucket, the body each task runs with its arguments."""

    units: dict[str, str]
    bodies: Bodies


def render_step(schedules: Mapping[str, Schedule], level: int) -> Source:
    """The step of one program for one ISA level; `schedules` holds one schedule per bucket."""
    one = next(iter(schedules.values()))
    program, limits = one.program, one.limits
    groups = cache_groups(program)
    expect(all(g.type.head_dim <= HEAD_DIM_MAX for g in groups), f"expected head_dim <= {HEAD_DIM_MAX}")
    listed, bodies = render_bodies(schedules, partial(_body_text, limits), "//")
    vocab = program.logits.tensor.width
    step = unit(
        "step.cpp.j2",
        definitions(limits, one.tuning),
        version=__version__,
        program=program,
        level=level,
        limits=limits,
        buckets=BUCKETS,
        caches=groups,
        kv_tile_bytes=[kv_tile_bytes(g.type.head_dim, limits) for g in groups],
        record_fields=FIELDS,
        record_args=ARGS,
        record_words=RECORD_WORDS,
        align=ALIGN,
        page_tokens=PAGE_TOKENS,
        page_run=PAGE_RUN,
        split_tokens=limits.split_tokens,
        partial_header=PARTIAL_HEADER,
        head_dim_max=HEAD_DIM_MAX,
        max_events=max(event_count(s) for s in schedules.values()),
        stop_tokens=STOP_TOKENS,
        gather_rows=GATHER_ROWS,
        experts=any(p.anchor_kind == "experts" for g in program.graphs for p in g.phases),
        seen_words=-(-vocab // 32),
        vocab=vocab,
        bodies=listed,
        state_fields=[
            {"name": f.name, "ctype": C_TYPES[f.dtype], "offset": f.offset}
            for f in state_fields(limits, vocab, len(groups), program.routing)
        ],
    )
    return Source({STEP: step, **kernel_units(program, limits, one.tuning)}, bodies)


def _body_text(limits: Limits, graph: Graph, phase: Phase, name: str, args: Args) -> str:
    numbers = {key: i for i, key in enumerate(args)}
    common: dict[str, Any] = {"code": "CODE", "title": "TITLE", "args": numbers, "limits": limits}
    if name.startswith("pack."):
        return _pack(graph, phase, name, numbers, common)
    match phase.anchor_kind:
        case "linear":
            return _linear(graph, phase, part_of(phase, name), numbers, common)
        case "experts":
            part = part_of(phase, name)
            fields = experts_fields(phase, part, numbers, stored(graph, phase))
            count = _row_count(part[0].operands[0])
            more = {"row_count": count, "fetch": phase_fetch(phase)}
            return str(template(TEMPLATES, "experts.cpp.j2").render(**common, **fields, **more))
        case "rows":
            return _rows(graph, phase, numbers, common)
        case "attend":
            return _attend(phase, common)
        case "sample" | "guess" as kind:
            width = phase.anchor[0].operands[0].tensor.width
            sizes = {"stride": padded(width), "maxima_stride": padded(width) // 32}
            return str(template(TEMPLATES, f"{kind}.cpp.j2").render(**common, **sizes))
        case _:
            return str(template(TEMPLATES, "commit.cpp.j2").render(**common))


def _row_count(value: Value) -> str:
    return "outputs" if value.tensor.shape[0] == OUTPUTS else "rows"


def _pack(graph: Graph, phase: Phase, name: str, numbers: dict[str, int], common: dict[str, Any]) -> str:
    x = phase.anchor[0].operands[0]
    pointers = [n for n in numbers if n not in ("panel", "splits", "window")]
    if isinstance(anchor := phase.anchor[0], ExpertLinear):
        pointers = [n for n in pointers if n != anchor.gates.name]  # places beyond a row's experts are packed as well
    emitter = emit.RowEmitter(lambda op: "packed[m]" if op.out == x else "", numbers, "row")
    source = graph.producer(x)
    lines: list[str] = []
    direct = ""
    if phase.prologue:
        for op in phase.prologue:
            for value in op.operands:
                made_by = graph.producer(value)
                if isinstance(made_by, Attend):
                    target = f"row_{emit.ident(value.name)}"
                    lines.append(f"alignas(64) float {target}[{padded(value.tensor.width)}];")
                    lines += emit.combine(made_by, target, "row", numbers)
                    emitter.pointers[value.name] = target
            emitter.emit(op)
        lines += emitter.lines
    elif isinstance(source, Attend):
        lines = emit.combine(source, "packed[m]", "row", numbers)
    else:
        direct = emit.ident(x.name)
    rows = phase.anchor_kind == "experts"
    return str(
        template(TEMPLATES, "pack_rows.cpp.j2" if rows else "pack.cpp.j2").render(
            **common,
            each=panel_rows(x),
            ops=[str(op) for op in phase.prologue],
            k=x.tensor.width,
            k_padded=padded(x.tensor.width),
            act=ACTS[name.removeprefix("pack.")],
            row_count=_row_count(x),
            declarations=[emit.declare(n, numbers[n]) for n in pointers],
            statements=lines,
            direct=direct,
            direct_stride=padded(x.tensor.width),
        )
    )


def _linear(graph: Graph, phase: Phase, part: tuple[Op, ...], numbers: dict[str, int], common: dict[str, Any]) -> str:
    ops = part_epilogue(phase, part)
    kept = stored(graph, phase)
    if phase.layout == "heads":
        lines = emit.head_epilogue(phase, part, ops, kept, numbers.get("group", 0))
    else:
        lines = emit.lane_epilogue(phase, part, ops, kept, "maxima" in numbers)
    if "maxima" in numbers:
        vocab = part[0].out.tensor.width
        valid = f"{vocab} - u * 32 < 32 ? {vocab} - u * 32 : 32"
        lines.append(f"maxima[size_t(row) * {padded(vocab) // 32} + u] = tile_max(out, {valid});")
    pointers = [n for n in numbers if n not in ("weight", "panel", "group", "maxima", "unit")]
    declarations = [emit.declare(n, numbers[n]) for n in pointers]
    if "maxima" in numbers:
        declarations.append(f"float* maxima = s.value(r, {numbers['maxima']});")
    weight = part_weight(part).tensor
    return str(
        template(TEMPLATES, "linear.cpp.j2").render(
            **common,
            ops=[str(op) for op in (*part, *ops)],
            format=emit.format_struct(weight.dtype),
            fetch=phase_fetch(phase),
            k_padded=padded(weight.width),
            unit=phase.unit,
            width=unit_rows(phase, part),
            row_count=_row_count(part[0].out),
            declarations=declarations,
            statements=lines,
            past_caches="maxima" in numbers,
        )
    )


def _rows(graph: Graph, phase: Phase, numbers: dict[str, int], common: dict[str, Any]) -> str:
    tables = {op.table.name for op in phase.ops if isinstance(op, Embed)}
    kept = stored(graph, phase)

    def place(op: Op) -> str:
        if op.out.name not in kept:
            return ""
        return f"({emit.ident('out.' + op.out.name)} + size_t(row) * {emit.stride(op.out)})"

    emitter = emit.RowEmitter(place, numbers, "row")
    for op in phase.ops:
        emitter.emit(op)
    return str(
        template(TEMPLATES, "rows.cpp.j2").render(
            **common,
            ops=[str(op) for op in phase.ops],
            row_count=_row_count(phase.ops[0].out),
            declarations=[emit.declare(n, i) for n, i in numbers.items() if n not in tables],
            statements=emitter.lines,
        )
    )


def _attend(phase: Phase, common: dict[str, Any]) -> str:
    op = phase.anchor[0]
    assert isinstance(op, Attend)
    cache = op.kv.cache
    return str(
        template(TEMPLATES, "attend.cpp.j2").render(
            **common,
            ops=[str(op)],
            heads=op.q.tensor.width // cache.head_dim,
            kv_heads=cache.kv_heads,
            head_dim=cache.head_dim,
            q_stride=padded(op.q.tensor.width),
            scale=f"({emit.real(op.scale)} * LOG2E)",
            softcap=emit.real(op.softcap),
            sinks=cache.sinks,
        )
    )
