"""The body of an experts phase: some columns of what active experts make of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bodies import part_epilogue, part_of
from ..op import Op
from ..ops import ExpertLinear
from ..ops.experts import chosen
from ..schedule import part_units

if TYPE_CHECKING:
    from .bodies import Call


def run_experts(call: Call) -> None:
    """A drain's tiles are (active expert, unit); where a row's experts are summed, tiles are units of the sum."""
    part, unit = part_of(call.phase, call.body), call.phase.unit
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    mine = chosen(call.value(anchor.gates), anchor.k)
    if not call.phase.is_drain:
        columns = slice(call.first * unit, min(call.last * unit, anchor.out.tensor.width))
        call.store(_values(call, part, mine, columns), columns)
        return
    if call.first == 0:
        call.state.routing[call.args["layer"], : len(mine)] = mine.numpy()
    active = sorted({e for e in mine.flatten().tolist() if e >= 0})
    units = part_units(call.phase, part)
    for tile in call.tiles(len(active) * units):
        at = mine == active[tile // units]
        columns = slice(tile % units * unit, min((tile % units + 1) * unit, anchor.out.tensor.width))
        values = _values(call, part, torch.where(at, mine, -1), columns)
        for op, offset in call.outputs():
            call.place(op.out, offset)[..., columns][at] = values[op.out.name][at]


def _values(call: Call, part: tuple[Op, ...], experts: Tensor, columns: slice) -> dict[str, Any]:
    """Some columns of what the given experts [n, k] make of the panel, through the epilogue."""
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    values: dict[str, Any] = {anchor.gates.name: call.value(anchor.gates)}
    panel = call.panel(anchor)
    panel = panel if panel.dim() == 3 else panel[:, None].expand(-1, anchor.k, -1)
    for op in part:
        assert isinstance(op, ExpertLinear)
        weight, out = call.weight(op.weight, call.args["weight"]), op.out.tensor
        values[op.out.name] = made = panel.new_zeros(*experts.shape, len(range(out.width)[columns]))
        for e in {e for e in experts.flatten().tolist() if e >= 0}:
            made[experts == e] = panel[experts == e] @ weight[e, columns].T
            if op.bias is not None:
                bias = call.weight(op.bias, call.args[op.bias.name]).view(-1, out.width)
                made[experts == e] += bias[e, columns]
    for op in part_epilogue(call.phase, part):
        values[op.out.name] = op.reference(*(call.operand(op, v, values, columns) for v in op.operands))
    return values
