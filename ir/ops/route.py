"""From a router's logits to gates: what a row gives each expert, zero for those it does not use.

A router is a small region of these ops. Of Qwen3: `normalize(top_k(p, p, k=8))` with `p = softmax(logits)`; of
DeepSeek V3: `s = sigmoid(logits)`, `c = group_limit(add(s, w.bias), ..)`, `scale(normalize(top_k(s, c, ..)), ..)`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import expect
from ..op import Op, op
from ..types import Type, Value


@op
class Softmax(Op):
    """`e^x / sum(e^x)` over each row.

    example:
        graph f(x: f32[R, 4]) -> (y) {
          y: f32[R, 4] = softmax(x)
        }
    """

    x: Value  # [rows, n]

    def infer(self) -> Type:
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return x.softmax(-1)


@op
class TopK(Op):
    """Keep `x` where `order` is among the `k` largest of its row, zero elsewhere; of equal ones the first.

    example:
        graph f(x: f32[R, 8], order: f32[R, 8]) -> (y) {
          y: f32[R, 8] = top_k(x, order, k=2)
        }
    """

    x: Value  # [rows, n]
    order: Value  # [rows, n]
    k: int

    def infer(self) -> Type:
        x, order = self.x.tensor, self.order.tensor
        expect(
            x.shape == order.shape,
            f"top_k: expected `{self.order.name}` as {list(x.shape)}, got {list(order.shape)}",
        )
        expect(1 <= self.k <= x.width, f"top_k: expected k of 1 to {x.width}, got {self.k}")
        return x

    def reference(self, x: Any, order: Any) -> Any:
        chosen = order.argsort(dim=-1, descending=True, stable=True)[:, : self.k]
        return torch.zeros_like(x).scatter(-1, chosen, x.gather(-1, chosen))


@op
class GroupLimit(Op):
    """Minus infinity outside the `keep` best of `groups` equal groups (DeepSeek V2/V3, arXiv 2412.19437).

    A group is as good as the sum of its `best` largest values.

    example:
        graph f(x: f32[R, 8]) -> (y) {
          y: f32[R, 8] = group_limit(x, groups=4, keep=4, best=2)
        }
    """

    x: Value  # [rows, n]
    groups: int
    keep: int
    best: int = 2

    def infer(self) -> Type:
        width = self.x.tensor.width
        expect(
            self.groups >= 1 and width % self.groups == 0,
            f"group_limit: expected groups that divide {width}, got {self.groups}",
        )
        expect(
            1 <= self.keep <= self.groups and 1 <= self.best <= width // self.groups,
            f"group_limit: expected to keep 1 to {self.groups} groups by 1 to {width // self.groups} values, "
            f"got {self.keep} by {self.best}",
        )
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        grouped = x.unflatten(-1, (self.groups, -1))
        score = grouped.sort(-1, descending=True)[0][..., : self.best].sum(-1)
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, : self.keep]
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, chosen, True)
        return torch.where(kept[..., None], grouped, -torch.inf).flatten(-2)


@op
class Normalize(Op):
    """Divide each row by its sum plus `eps`; zeros stay zeros. `on=0` leaves it as it is.

    example:
        graph f(x: f32[R, 4]) -> (y) {
          y: f32[R, 4] = normalize(x, on=1, eps=1e-20)
        }
    """

    x: Value  # [rows, n]
    on: int = 1
    eps: float = 0.0

    def infer(self) -> Type:
        expect(self.on in (0, 1), f"normalize: expected on=0 or on=1, got {self.on}")
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return torch.where(x == 0, 0, x / (x.sum(-1, keepdim=True) + self.eps)) if self.on else x
