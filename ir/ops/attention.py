"""The KV cache as a value, and attention over it (Vaswani et al. 2017; grouped queries: arXiv 2305.13245)."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import expect
from ..op import Op, op
from ..types import ROWS, TensorType, Type, Value


@op
class Append(Op):
    """Write each row's key and value at its slot and position; gives the new cache.

    example:
        graph f(kv: kv[2, 4, 0], k: f32[R, 8], v: f32[R, 8], rows: rows) -> (kv1) {
          kv1: kv[2, 4, 0] = append(kv, k, v, rows)
        }
    """

    kv: Value
    k: Value  # [R, kv_heads * head_dim]
    v: Value  # [R, kv_heads * head_dim]
    rows: Value

    def infer(self) -> Type:
        cache = self.kv.cache
        width = cache.kv_heads * cache.head_dim
        for part in (self.k, self.v):
            expect(
                part.tensor.shape == (ROWS, width),
                f"append: expected `{part.name}` as [R, {width}], got {list(part.tensor.shape)}",
                hint=f"the cache holds {cache.kv_heads} heads of {cache.head_dim}",
            )
        return cache

    def reference(self, kv: Any, k: Any, v: Any, rows: Any) -> Any:
        return kv.append(k, v, rows)


@op
class Attend(Op):
    """Softmax attention of each row over its slot's positions <= its own, inside the cache's window or its sinks.

    `scale` multiplies the scores; `softcap` > 0 caps them before the softmax. Query head h reads
    kv head h // (heads / kv_heads). `sinks`: a score per head that has no value, and so only takes
    part of the probability (gpt-oss); the sinks of a cache are positions (`CacheType`).

    example:
        graph f(q: f32[R, 16], kv: kv[2, 4, 0], rows: rows, w.sinks: f32[4]) -> (a) {
          a: f32[R, 16] = attend(q, kv, rows, w.sinks, scale=0.5, softcap=0.0)
        }
    """

    q: Value  # [R, heads * head_dim]
    kv: Value
    rows: Value
    sinks: Value | None = None  # [heads]
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.q.tensor.width // (self.kv.cache.kv_heads * self.kv.cache.head_dim)

    def infer(self) -> Type:
        cache, width = self.kv.cache, self.q.tensor.width
        expect(
            width % (cache.kv_heads * cache.head_dim) == 0,
            f"attend: expected a query of whole groups of {cache.kv_heads} x {cache.head_dim}, got width {width}",
            hint="query heads must be a multiple of kv heads",
        )
        if self.sinks is not None:
            heads, got = width // cache.head_dim, self.sinks.tensor.shape
            expect(got == (heads,), f"attend: expected sinks [{heads}], got {list(got)}")
        return TensorType("f32", (ROWS, width))

    def reference(self, q: Any, kv: Any, rows: Any, sinks: Any = None) -> Any:
        out = torch.empty_like(q)
        for slot in rows.slot.unique().tolist():
            own = (rows.slot == slot).nonzero()[:, 0]
            out[own] = self._slot_rows(q[own], kv, slot, rows.position[own], sinks)
        return out

    def _slot_rows(self, q: Any, kv: Any, slot: int, position: Any, sinks: Any) -> Any:
        """The rows of one slot, [n, heads * head_dim], at once."""
        cache, n = self.kv.cache, len(q)
        before, first = torch.tensor([cache.seen(p) for p in position.tolist()]).T[..., None]
        seen = torch.arange(int(position.max()) + 1)
        visible = (seen < before) | ((seen >= first) & (seen <= position[:, None]))
        seen, visible = seen[visible.any(0)], visible[:, visible.any(0)]
        k, v = (t[slot, seen].transpose(0, 1)[:, None] for t in (kv.keys, kv.values))
        query = q.view(n, cache.kv_heads, -1, cache.head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, n, head_dim]
        scores = query @ k.transpose(2, 3) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(cache.kv_heads, -1, 1, 1).expand(-1, -1, n, 1)], -1)
        return (scores.softmax(-1)[..., : len(seen)] @ v).permute(2, 0, 1, 3).reshape(n, -1)
