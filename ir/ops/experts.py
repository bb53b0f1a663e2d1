"""Matrices of experts (Shazeer et al. 2017, arXiv 1701.06538): each row meets those it has gates for.

A row's experts are those whose gates are not zero, in order of their numbers; the i-th is at [row, i]. Places
beyond them hold zeros.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import expect
from ..op import Op, op
from ..types import TensorType, Type, Value
from .linear import MatrixOp


def chosen(gates: Any, k: int) -> Any:
    """Number of each row's i-th expert, int64 [rows, k]; -1 where a row has fewer."""
    order = (gates == 0).to(torch.int8).argsort(dim=-1, stable=True)[:, :k]
    return torch.where(gates.gather(-1, order) != 0, order, -1)


@op
class ExpertLinear(MatrixOp):
    """`x @ weight[e].T (+ bias[e])` for each expert e of a row: of its one `x`, or of the `x` of that expert.

    The bias is flat, as a vector is stored.

    example:
        graph f(x: f32[R, 32], gates: f32[R, 4], w.up: f32[4, 64, 32], w.bias: f32[256]) -> (y) {
          y: f32[R, 2, 64] = expert_linear(x, gates, w.up, w.bias, k=2)
        }
    """

    x: Value  # [rows, in] or [rows, k, in]
    gates: Value  # [rows, experts]
    weight: Value  # [experts, out, in]
    bias: Value | None = None  # [experts * out]
    k: int = 1

    def infer(self) -> Type:
        x, gates, weight = self.x.tensor, self.gates.tensor, self.weight.tensor
        expect(
            len(weight.shape) == 3 and weight.shape[0] == gates.width and weight.width == x.width,
            f"expert_linear: expected weight [{gates.width}, .., {x.width}], got {list(weight.shape)}",
            hint="a weight is [experts, out, in]",
        )
        expect(1 <= self.k <= gates.width, f"expert_linear: expected k of 1 to {gates.width}, got {self.k}")
        expect(
            x.shape[1:-1] in ((), (self.k,)),
            f"expert_linear: expected x [.., {x.width}] or [.., {self.k}, {x.width}], got {list(x.shape)}",
        )
        if self.bias is not None:
            size, got = gates.width * int(weight.shape[1]), self.bias.tensor.shape
            expect(got == (size,), f"expert_linear: expected bias [{size}], got {list(got)}")
        return TensorType("f32", (x.shape[0], self.k, weight.shape[1]))

    def reference(self, x: Any, gates: Any, weight: Any, bias: Any = None) -> Any:
        experts, n = chosen(gates, self.k), weight.shape[1]
        x = x if x.dim() == 3 else x[:, None].expand(-1, self.k, -1)
        out = x.new_zeros(len(x), self.k, n)
        for e in experts.unique().tolist():
            if e >= 0:
                mine, added = experts == e, None if bias is None else bias[e * n : e * n + n]
                out[mine] = torch.nn.functional.linear(x[mine], weight[e], added)
        return out


@op
class Combine(Op):
    """The sum over a row's experts of gate times value, in order.

    example:
        graph f(y: f32[R, 2, 64], gates: f32[R, 4]) -> (z) {
          z: f32[R, 64] = combine(y, gates)
        }
    """

    y: Value  # [rows, k, n]
    gates: Value  # [rows, experts]

    def infer(self) -> Type:
        y = self.y.tensor
        expect(len(y.shape) == 3, f"combine: expected [.., k, n], got {list(y.shape)}")
        return TensorType("f32", (y.shape[0], y.width))

    def reference(self, y: Any, gates: Any) -> Any:
        experts = chosen(gates, y.shape[1])
        taken = torch.where(experts >= 0, gates.gather(-1, experts.clamp(min=0)), 0)
        return (taken[..., None] * y).sum(1)
