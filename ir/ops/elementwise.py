"""Ops that work value by value. They fuse into any prologue or epilogue."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..errors import expect
from ..op import Op, op
from ..types import TensorType, Type, Value


class ElementwiseOp(Op):
    """Marker base: the result at an index depends on the operands at that index only."""

    elementwise: ClassVar[bool] = True


def _same_or_row(name: str, a: Value, b: Value) -> TensorType:
    wide, other = a.tensor, b.tensor
    expect(
        other.shape in (wide.shape, wide.shape[-1:], (*wide.shape[:-1], 1)),
        f"{name}: expected `{b.name}` as {list(wide.shape)} or [{wide.width}], got {list(other.shape)}",
        hint="only the second operand may be a single row, or one value per row",
    )
    return wide


@op
class Add(ElementwiseOp):
    """Add two tensors, or a bias row to every row.

    example:
        graph f(x: f32[2, 4], w.bias: f32[4]) -> (y) {
          y: f32[2, 4] = add(x, w.bias)
        }
    """

    a: Value  # [.., n]
    b: Value  # [.., n] or [n]

    def infer(self) -> Type:
        return _same_or_row("add", self.a, self.b)

    def reference(self, a: Any, b: Any) -> Any:
        return a + b


@op
class Mul(ElementwiseOp):
    """Multiply two tensors, or every row by one row, or every row by a value of its own.

    example:
        graph f(x: f32[2, 4], y: f32[2, 4]) -> (z) {
          z: f32[2, 4] = mul(x, y)
        }
    """

    a: Value
    b: Value

    def infer(self) -> Type:
        return _same_or_row("mul", self.a, self.b)

    def reference(self, a: Any, b: Any) -> Any:
        return a * b


@op
class Silu(ElementwiseOp):
    """`x * sigmoid(x)` (Hendrycks & Gimpel 2016, arXiv 1606.08415; SiLU/swish).

    example:
        graph f(x: f32[2, 4]) -> (y) {
          y: f32[2, 4] = silu(x)
        }
    """

    x: Value

    def infer(self) -> Type:
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return torch.nn.functional.silu(x)


@op
class Sigmoid(ElementwiseOp):
    """`1 / (1 + e^-x)`.

    example:
        graph f(x: f32[2, 4]) -> (y) {
          y: f32[2, 4] = sigmoid(x)
        }
    """

    x: Value

    def infer(self) -> Type:
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return x.sigmoid()


@op
class GeluTanh(ElementwiseOp):
    """`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` (arXiv 1606.08415, the tanh form).

    example:
        graph f(x: f32[2, 4]) -> (y) {
          y: f32[2, 4] = gelu_tanh(x)
        }
    """

    x: Value

    def infer(self) -> Type:
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return torch.nn.functional.gelu(x, approximate="tanh")


@op
class Scale(ElementwiseOp):
    """Multiply by a constant.

    example:
        graph f(x: f32[2, 4]) -> (y) {
          y: f32[2, 4] = scale(x, by=0.5)
        }
    """

    x: Value
    by: float

    def infer(self) -> Type:
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return x * self.by


@op
class Shift(ElementwiseOp):
    """Add a constant.

    example:
        graph f(x: f32[2, 4]) -> (y) {
          y: f32[2, 4] = shift(x, by=1.0)
        }
    """

    x: Value
    by: float

    def infer(self) -> Type:
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return x + self.by


@op
class Clamp(ElementwiseOp):
    """Keep values in `low`..`high`.

    example:
        graph f(x: f32[2, 4]) -> (y) {
          y: f32[2, 4] = clamp(x, high=7.0, low=-7.0)
        }
    """

    x: Value
    high: float
    low: float = -1e30

    def infer(self) -> Type:
        expect(self.low <= self.high, f"clamp: expected low <= high, got {self.low} and {self.high}")
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return x.clamp(self.low, self.high)


@op
class Softcap(ElementwiseOp):
    """`cap * tanh(x / cap)`: keep values in (-cap, cap) (Gemma 2, arXiv 2408.00118).

    example:
        graph f(x: f32[2, 4]) -> (y) {
          y: f32[2, 4] = softcap(x, cap=30.0)
        }
    """

    x: Value
    cap: float

    def infer(self) -> Type:
        expect(self.cap > 0, f"softcap: expected cap > 0, got {self.cap}")
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return self.cap * torch.tanh(x / self.cap)
