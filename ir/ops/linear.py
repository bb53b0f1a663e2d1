"""Ops that read a weight matrix, and the choice of rows whose logits are wanted."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import expect
from ..op import Op, op
from ..types import OUTPUTS, ROWS, TensorType, Type, Value


@op
class Embed(Op):
    """Each row's token looked up in the embedding table.

    example:
        graph f(rows: rows, w.embed: f32[10, 4]) -> (x) {
          x: f32[R, 4] = embed(rows, w.embed)
        }
    """

    rows: Value
    table: Value  # [vocab, hidden]

    def infer(self) -> Type:
        expect(len(self.table.tensor.shape) == 2, f"embed: expected a matrix, got {self.table.type}")
        return TensorType("f32", (ROWS, self.table.tensor.width))

    def reference(self, rows: Any, table: Any) -> Any:
        return table[rows.token]


class MatrixOp(Op):
    """Marker base: reads a packed weight by tiles of its rows, against a panel of activations."""

    x: Value
    weight: Value


@op
class Linear(MatrixOp):
    """`x @ weight.T`, the weight dequantised as its format says.

    example:
        graph f(x: f32[R, 4], w.up: f32[6, 4]) -> (y) {
          y: f32[R, 6] = linear(x, w.up)
        }
    """

    x: Value  # [rows, in]
    weight: Value  # [out, in]

    def infer(self) -> Type:
        x, weight = self.x.tensor, self.weight.tensor
        expect(
            len(weight.shape) == 2 and weight.width == x.width,
            f"linear: expected weight [.., {x.width}], got {list(weight.shape)}",
            hint="a weight is [out, in]",
        )
        return TensorType("f32", (*x.shape[:-1], weight.shape[0]))

    def reference(self, x: Any, weight: Any) -> Any:
        return torch.nn.functional.linear(x, weight)


@op
class Select(Op):
    """The rows whose logits are wanted, in order (a prompt needs only its last one).

    example:
        graph f(x: f32[R, 4], rows: rows) -> (y) {
          y: f32[L, 4] = select(x, rows)
        }
    """

    x: Value  # [R, n]
    rows: Value

    def infer(self) -> Type:
        return TensorType("f32", (OUTPUTS, self.x.tensor.width))

    def reference(self, x: Any, rows: Any) -> Any:
        return x[rows.outputs]


@op
class Reorder(Op):
    """The values of each row in another order: value i of the result is value order[i].

    example:
        graph f(x: f32[R, 4], w.order: f32[4]) -> (y) {
          y: f32[R, 4] = reorder(x, w.order)
        }
    """

    x: Value  # [rows, n]
    order: Value  # [n], whole numbers

    def infer(self) -> Type:
        x, order = self.x.tensor, self.order.tensor
        expect(order.shape == (x.width,), f"reorder: expected order [{x.width}], got {list(order.shape)}")
        return x

    def reference(self, x: Any, order: Any) -> Any:
        return x[..., order.long() % x.shape[-1]]
