"""Memory a step works on: zeroed, 2 MiB aligned, on huge pages where the system has them.

A decode step streams all weights once, so it is bound by address translation as much as by bandwidth:
on 4 KiB pages the same read takes 10-20 % longer.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import HostError
from ..ir.limits import PAGE_RUN, kv_pool_bytes
from .manifest import Manifest

HUGE_PAGE = 2 << 20
GUARD = 4096  # bytes after the end, mapped: kernels prefetch past the last tile

Bytes = NDArray[np.uint8]


class Buffer:
    """Anonymous memory as `view`, a numpy array of `nbytes` zero bytes. `close` gives it back."""

    def __init__(self, nbytes: int, what: str = "a buffer") -> None:
        size = max(nbytes, 1) + HUGE_PAGE + GUARD
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise HostError(
                f"memory: expected {nbytes / 2**30:.2f} GiB for {what}, got `{error}`",
                hint="load with a smaller `kv_tokens`, or compile with fewer slots or a shorter context",
            ) from error
        with contextlib.suppress(OSError, AttributeError):  # a hint only: absent on macOS and old kernels
            self._map.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(self._map, np.uint8, 1).ctypes.data
        self.view: Bytes = np.frombuffer(self._map, np.uint8, nbytes, offset=-address % HUGE_PAGE)

    def close(self) -> None:
        """Unmap now if nobody holds a view; otherwise the last view to go unmaps it."""
        self.view = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


@dataclass(frozen=True)
class Memory:
    """Everything a backend works on. `tables` is int32 [2 buckets, workers, records, 32], the rest is bytes.

    `kv[g]` holds cache group g; `pool` shows its tiles. A short context touches few memory pages.
    """

    tables: NDArray[np.int32]
    weights: Bytes
    workspace: Bytes
    state: Bytes
    kv: tuple[Bytes, ...]
    kv_pages: tuple[int, ...]
    buffers: tuple[Buffer, ...] = ()

    @classmethod
    def allocate(
        cls, manifest: Manifest, tables: NDArray[np.int32], weights: Buffer, kv_pages: Sequence[int]
    ) -> Memory:
        """Zeroed state, workspace and caches beside `weights`; `tables` is copied to aligned memory."""
        table = Buffer(tables.nbytes, "the task tables")
        table.view[:] = tables.reshape(-1).view(np.uint8)
        workspace = Buffer(manifest.workspace_bytes, "the workspace")
        state = Buffer(manifest.state_bytes, "the step state")
        kv = [
            Buffer(kv_pool_bytes(pages, group.page_bytes), f"the KV cache ({pages} pages)")
            for group, pages in zip(manifest.caches, kv_pages, strict=True)
        ]
        return cls(
            tables=table.view.view(np.int32).reshape(tables.shape),
            weights=weights.view,
            workspace=workspace.view,
            state=state.view,
            kv=tuple(buffer.view for buffer in kv),
            kv_pages=tuple(kv_pages),
            buffers=(table, weights, workspace, state, *kv),
        )

    def pool(self, group: int, heads: int) -> Bytes:
        """Cache group `group` as [runs, heads = layers * kv_heads, PAGE_RUN, tile bytes]; see kv_pool_bytes."""
        runs = -(-self.kv_pages[group] // PAGE_RUN)
        return self.kv[group].reshape(runs, heads, PAGE_RUN, -1)
