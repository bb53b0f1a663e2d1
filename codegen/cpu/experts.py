"""The body of an experts phase: what its template is filled with."""

from __future__ import annotations

from typing import Any

from ...ir.bodies import part_epilogue
from ...ir.errors import expect
from ...ir.op import Op
from ...ir.ops import Combine, ElementwiseOp, ExpertLinear
from ...ir.phases import Phase
from ...ir.schedule import padded, part_experts, part_units, unit_rows, value_floats
from ...ir.types import Value
from . import emit

NOT_POINTERS = ("weight", "panel", "gather", "blocks", "tiles", "layer")


def experts_fields(phase: Phase, part: tuple[Op, ...], numbers: dict[str, int], kept: set[str]) -> dict[str, Any]:
    """Fields of experts.cpp.j2. `numbers`: places of the body's arguments; `kept`: values that go to memory."""
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    ops = part_epilogue(phase, part)
    statements, finish = _statements(phase, part, ops, kept)
    total = next((op.out for op in ops if isinstance(op, Combine)), None)
    return {
        "ops": [str(op) for op in (*part, *ops)],
        "format": emit.format_struct(anchor.weight.tensor.dtype),
        "k_padded": padded(anchor.weight.tensor.width),
        "unit": phase.unit,
        "width": unit_rows(phase, part),
        "units": part_units(phase, part),
        "experts": part_experts(part),
        "choices": anchor.k,
        "by_slot": len(anchor.x.tensor.shape) == 3,
        "gates": emit.ident(anchor.gates.name),
        "gates_stride": emit.stride(anchor.gates),
        "declarations": [emit.declare(n, i) for n, i in numbers.items() if n not in NOT_POINTERS],
        "statements": statements,
        "finish": finish,
        "sum": emit.ident(f"out.{total.name}") if total else "",
        "sum_stride": emit.stride(total) if total else 0,
    }


def _statements(
    phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], kept: set[str]
) -> tuple[list[str], list[str]]:
    """What happens to 16 columns of one expert's row, and what to a row's sum over its experts, if there is one."""
    column, registers = f"u * {phase.unit} + c", {op.out.name: emit.ident(op.out.name) for op in (*part, *ops)}
    at = next((i for i, op in enumerate(ops) if isinstance(op, Combine)), len(ops))
    lines = [*_anchors(phase, part, registers, column)]
    lines += [_pointwise(op, registers, column) for op in ops[:at]]
    lines += [_store(op, registers, column) for op in (*part, *ops[:at]) if op.out.name in kept]
    if at == len(ops):
        return _loop(phase, lines), []
    combine = ops[at]
    assert isinstance(combine, Combine)
    place = _place(combine.out, column)
    lines.append(f"f_store({place}, f_fma(f_set1(gate), {registers[combine.y.name]}, f_load({place})));")
    after = [f"F {registers[combine.out.name]} = f_load({place});"]
    after += [_pointwise(op, registers, column) for op in ops[at + 1 :]]
    after += [_store(op, registers, column) for op in ops[at + 1 :] if op.out.name in kept]
    return _loop(phase, lines), _loop(phase, after)


def _loop(phase: Phase, lines: list[str]) -> list[str]:
    return [f"for (int c = 0; c < {phase.unit}; c += 16) {{", *(f"  {line}" for line in lines), "}"]


def _anchors(phase: Phase, part: tuple[Op, ...], registers: dict[str, str], column: str) -> list[str]:
    found = []
    for i, op in enumerate(part):
        assert isinstance(op, ExpertLinear)
        value = f"f_load(out + {16 * i})" if len(part) == 2 else "f_load(out + c)"
        if op.bias is not None:
            value = f"f_add({value}, f_load({emit.ident(op.bias.name)} + expert * {op.out.tensor.width} + {column}))"
        found.append(f"F {registers[op.out.name]} = {value};")
    return found


def _pointwise(op: Op, registers: dict[str, str], column: str) -> str:
    expect(isinstance(op, ElementwiseOp), f"experts: no statement for `{op.name}`")
    return f"F {registers[op.out.name]} = {emit.pointwise(op, lambda v: _operand(v, registers, column))};"


def _operand(value: Value, registers: dict[str, str], column: str) -> str:
    return registers.get(value.name) or emit.load(value, "row", column)


def _store(op: Op, registers: dict[str, str], column: str) -> str:
    return f"f_store({_place(op.out, column)}, {registers[op.out.name]});"


def _place(value: Value, column: str) -> str:
    """Address of a result's columns: of a row, or of one of its experts."""
    slot = f" + slot * {padded(value.tensor.width)}" if len(value.tensor.shape) == 3 else ""
    return f"{emit.ident('out.' + value.name)} + size_t(row) * {value_floats(value)}{slot} + {column}"
