"""What a step works on: the workspace at the schedule's own offsets, the step state, the paged KV cache.

Float values lie in the workspace as every executor lays them out: a row every padded(width) floats. An activation
panel's form belongs to the executor: here a row of a panel is one tag, repeated over the row's bytes, that stands
for a float32 row kept aside. Whoever overwrites a byte of it makes the row unreadable: not-a-number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..limits import PAGE_TOKENS, Field, Limits, state_bytes
from ..schedule import padded
from ..table import CacheGroup

TAG = 0x7FC00000  # tags are not-a-number when read as floats


class State:
    """The arrays of `limits.state_fields` by name, over one buffer of bytes."""

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self.bytes = np.zeros(state_bytes(fields), np.uint8)
        self._views = {
            f.name: self.bytes[f.offset : f.offset + f.nbytes].view(f.dtype).reshape(f.shape) for f in fields
        }

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_views"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(name) from None


class Workspace:
    """Bytes that hold float rows, attention partials and tags of panels. Offsets are in bytes."""

    def __init__(self, size: int) -> None:
        self.floats = np.zeros(-(-size // 4), np.float32)
        self.words = self.floats.view(np.uint32)
        self._panels: dict[int, Tensor] = {}

    def poison(self) -> None:
        """Make everything unreadable: what a task needs must be written in this step."""
        self.floats[:] = np.nan
        self._panels.clear()

    def rows(self, offset: int, count: int, width: int, stride: int = 0) -> Tensor:
        """Rows 0..count-1 of a value, [count, width]; writing to it writes the workspace."""
        stride = stride or padded(width)
        start = offset // 4
        return torch.from_numpy(self.floats[start : start + count * stride].reshape(count, stride)[:, :width])

    def put_panel(self, offset: int, row_bytes: int, rows: Iterable[int], values: Tensor) -> None:
        """Store panel rows [n, K] at row numbers `rows`."""
        for row, value in zip(rows, values, strict=True):
            tag = TAG + len(self._panels) + 1
            self._panels[tag] = value.clone()
            start = (offset + row * row_bytes) // 4
            self.words[start : start + row_bytes // 4] = tag

    def panel(self, offset: int, row_bytes: int, count: int, width: int) -> Tensor:
        """Panel rows 0..count-1, [count, width]; damaged ones are not-a-number."""
        found = torch.full((count, width), torch.nan)
        for row in range(count):
            start = (offset + row * row_bytes) // 4
            words = self.words[start : start + row_bytes // 4]
            value = self._panels.get(int(words[0]))
            if value is not None and len(value) == width and (words == words[0]).all():
                found[row] = value
        return found

    def spoil(self, offset: int, size: int) -> None:
        """Overwrite bytes with nonsense, as scratch memory is."""
        self.floats[offset // 4 : (offset + size) // 4] = np.nan


class Cache:
    """Keys and values of one group of layers: [layers, pages, 64 tokens, kv_heads, head_dim]."""

    def __init__(self, group: CacheGroup, limits: Limits, empty: float) -> None:
        kind = group.type
        self.pages, self.pinned = limits.ring_pages(kind.window, kind.sinks), int(kind.sinks > 0)
        self.bf16 = limits.kv_dtype == "bf16"
        shape = (len(group.layers), limits.slots * self.pages, PAGE_TOKENS, kind.kv_heads, kind.head_dim)
        self.keys, self.values = torch.full(shape, empty), torch.full(shape, empty)

    def page_table(self, slots: int, pages: int) -> np.ndarray:
        """[slots, pages]: each slot its own ring of pages, behind the page of its sinks."""
        ring, at = max(1, self.pages - self.pinned), np.arange(pages, dtype=np.int32)
        own = np.where(at < self.pinned, at, self.pinned + (at - self.pinned) % ring)
        return np.arange(slots, dtype=np.int32)[:, None] * self.pages + own

    def put(
        self, half: str, layer: int, pages: Sequence[int], positions: Sequence[int], first: int, new: Tensor
    ) -> None:
        """Write heads first.. of each row, [n, heads * head_dim], at its page and position."""
        pool = (self.keys if half == "k" else self.values)[layer]
        new = new.reshape(len(new), new.shape[1] // pool.shape[-1], pool.shape[-1])
        new = new.bfloat16().float() if self.bf16 else new
        for page, position, heads in zip(pages, positions, new, strict=True):
            pool[page, position % PAGE_TOKENS, first : first + len(heads)] = heads

    def read(self, layer: int, head: int, pages: np.ndarray, at: np.ndarray) -> tuple[Tensor, Tensor]:
        """Keys and values of one head at positions `at`, each [positions, head_dim]; `pages` by position / 64."""
        page, token = torch.from_numpy(pages[at // PAGE_TOKENS].astype(np.int64)), torch.from_numpy(at % PAGE_TOKENS)
        return self.keys[layer, page, token, head], self.values[layer, page, token, head]
