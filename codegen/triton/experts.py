"""The code of experts phases in the GPU step: per weight format and row bucket one function for all of them.

Each worker finds the rows of every active expert from the gates, in the order of experts and of rows, whoever else
does the same. Weights come straight from device memory: what a worker reads depends on the step's rows, so it cannot
be in the weight stream, whose next chunks stay in their ring meanwhile. The next tile's are asked for before this
one's products. What rows sum over their experts they sum in memory, one expert after the other in the order of their
numbers: a row's sum does not depend on other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.bodies import part_epilogue
from ...ir.errors import expect
from ...ir.graph import Program
from ...ir.op import Op
from ...ir.ops import Combine, ElementwiseOp, ExpertLinear
from ...ir.phases import Phase
from ...ir.schedule import padded, part_experts, part_units, part_weight, unit_rows
from ..rendering import template
from . import emit
from .formats import reader
from .linear import TEMPLATES, row_scale_text, tile_words_text
from .rows import LOG2E

COMMON = ("weight", "panel", "blocks", "tiles", "gather", "layer")  # arguments that are no pointers of a finish
ROUTE_ROWS = 8  # whose gates a worker looks at together
LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1


@dataclass(frozen=True)
class Experts:
    """A body of an experts phase. `each`: places of a route that share a row of the panel; `sums`: over a row's."""

    code: int
    title: str
    format: str
    units: int
    each: int
    sums: bool

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


Places = dict[str, int]  # of arguments among a record's


@dataclass(frozen=True)
class Router:
    """What all experts of a program have in common."""

    experts: int
    choices: int

    @property
    def list_at(self) -> int:
        """The word of a worker's routes at which lists of rows begin."""
        return 2 * self.experts + 2


def find_router(program: Program) -> Router | None:
    """None without experts. CompileError where layers differ."""
    anchors = [op for g in program.graphs for p in g.phases for op in p.anchor if isinstance(op, ExpertLinear)]
    found = {Router(part_experts((op,)), op.k) for op in anchors}
    expect(
        len(found) < 2,
        f"expected as many experts in all layers, got {sorted((r.experts, r.choices) for r in found)}",
    )
    return next(iter(found), None)


def experts_body(phase: Phase, part: tuple[Op, ...], code: int, title: str) -> Experts:
    """The body of an experts phase with this number."""
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    each = 1 if len(anchor.x.tensor.shape) == 3 else anchor.k
    expect(unit_rows(phase, part) == 32, f"phase `{phase.name}`: expected units of one tile, got {phase.unit} rows")
    return Experts(code, title, anchor.weight.tensor.dtype, part_units(phase, part), each, not phase.is_drain)


def common_places(phase: Phase, part: tuple[Op, ...], numbers: Mapping[str, int]) -> Places:
    """Where a body has the arguments that all experts have."""
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    return {name: numbers[name] for name in COMMON} | {"gates": numbers[anchor.gates.name]}


def route_text(router: Router) -> str:
    """Row ops of routers, and how workers find the rows of each expert."""
    return str(
        template(TEMPLATES, "route.py.j2").render(
            experts=router.experts,
            choices=router.choices,
            choice_lanes=emit.lanes(router.choices),
            lanes=emit.lanes(router.experts),
            stride=padded(router.experts),
            list_at=router.list_at,
            block=ROUTE_ROWS,
            log2e=repr(LOG2E),
            lowest=LOWEST,
            highest=HIGHEST,
        )
    )


def experts_text(
    name: str, bucket: str, bodies: Sequence[Experts], router: Router, layer_words: int, common: Mapping[str, Any]
) -> str:
    """What runs the experts of format `name` in a bucket, on its `core_text`; `common` is what all templates get."""
    mine = [b for b in bodies if b.format == name]
    return str(
        template(TEMPLATES, "experts.py.j2").render(
            **common,
            bucket=bucket,
            name=name,
            bodies=mine,
            sums=[b for b in mine if b.sums],
            drains=" | ".join(f"(body == {b.code})" for b in mine if not b.sums) or "body < 0",
            layer_words=layer_words,
            list_at=router.list_at,
            tile_words=tile_words_text(reader(name)),
            row_scale=row_scale_text(reader(name)),
        )
    )


def finish_text(
    phase: Phase, part: tuple[Op, ...], numbers: Mapping[str, int], kept: set[str], common: Mapping[str, Any]
) -> str:
    """The epilogue of a body; `kept`: values that go to memory."""
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    ops = part_epilogue(phase, part)
    statements, around = _statements(phase, part, ops, kept)
    return str(
        template(TEMPLATES, "experts_finish.py.j2").render(
            **common,
            ops=[str(op) for op in (*part, *ops)],
            fmt_name=part_weight(part).tensor.dtype,
            choices=anchor.k,
            pointers=[emit.declare(n, i, common["align_words"]) for n, i in numbers.items() if n not in COMMON],
            statements=statements,
            around=around,
        )
    )


def _statements(
    phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], kept: set[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """What happens to one expert's tile, and, around all of a unit's, to the sum."""
    names, width = {op.out.name: emit.ident(op.out.name) for op in part}, part[0].out.tensor.width
    columns = emit.tile_columns(phase, width)
    at = next((i for i, op in enumerate(ops) if isinstance(op, Combine)), len(ops))
    lines = [*columns, *emit.tile_values(part, names), *_biases(part, names, width)]
    lines += _pointwise(ops[:at], names, width)
    lines += [emit.store(op.out, names) for op in (*part, *ops[:at]) if op.out.name in kept]
    if at == len(ops):
        return lines, {}
    combine = ops[at]
    assert isinstance(combine, Combine)
    total = emit.place(combine.out, "out.")
    gate = f"{emit.ident(combine.gates.name)} + row * {emit.stride(combine.gates)} + expert"
    lines += [
        f"gate = tl.load({gate}, mask=live, other=0.0)",
        f"total = tl.fma(gate, {names[combine.y.name]}, tl.load({total}, mask=keep, other=0.0))",
        "tl.debug_barrier()",  # as before any store of what was read by several threads
        f"tl.store({total}, total, mask=keep)",
    ]
    names = {combine.out.name: emit.ident(combine.out.name)}
    after = [*columns, f"{names[combine.out.name]} = tl.load({total}, mask=keep, other=0.0)"]
    after += _pointwise(ops[at + 1 :], names, width)
    after += [emit.store(op.out, names) for op in ops[at + 1 :] if op.out.name in kept]
    zero = f"tl.store({total}, tl.zeros(({phase.unit}, ROWS), tl.float32), mask=keep)"
    return lines, {"begin": [*columns, zero], "end": after}


def _biases(part: tuple[Op, ...], names: Mapping[str, str], width: int) -> list[str]:
    found = []
    for op in part:
        assert isinstance(op, ExpertLinear)
        if op.bias is not None:
            at = f"{emit.ident(op.bias.name)} + expert * {width} + column"
            bias = f"tl.load({at}, mask=column < {width}, other=0).to(tl.float32, bitcast=True)"
            found.append(f"{names[op.out.name]} += {bias}")
    return found


def _pointwise(ops: tuple[Op, ...], names: dict[str, str], width: int) -> list[str]:
    """Statements of an epilogue; `names` then holds their results as well."""
    for op in ops:
        expect(isinstance(op, ElementwiseOp), f"experts: no statement for `{op.name}`")
    names |= {op.out.name: emit.ident(op.out.name) for op in ops}
    # A small tile's lanes are held by several threads: all read before one overwrites.
    return [emit.pointwise(op, names, width) for op in ops] + (["tl.debug_barrier()"] if ops else [])
