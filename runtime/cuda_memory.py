"""How much device memory a model takes, told before any is taken."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import HostError
from ..ir.limits import kv_pool_bytes
from .cuda_driver import Context
from .cuda_state import WORD
from .cuda_target import BUCKETS, CudaTarget
from .manifest import Manifest
from .memory import GUARD


def memory_plan(manifest: Manifest, target: CudaTarget, weights: int, kv_pages: Sequence[int]) -> dict[str, int]:
    """Bytes of device memory by kernel parameter, without the tables: they are small."""
    groups = zip(manifest.caches, kv_pages, strict=True)
    caches = {f"kv{g}": kv_pool_bytes(pages, group.page_bytes) for g, (group, pages) in enumerate(groups)}
    return {
        "control": len(BUCKETS) * control_bytes(target),
        "weights": weights + GUARD,  # kernels prefetch past the last tile
        "workspace": manifest.workspace_bytes,
        "state": -(-manifest.state_bytes // WORD) * WORD,
        **caches,
    }


def control_bytes(target: CudaTarget) -> int:
    """Bytes of one bucket's control buffer, on cache lines of its own."""
    return -(-4 * target.control_words // 256) * 256


def check_memory(context: Context, sizes: dict[str, int]) -> None:
    """HostError with what is needed and what is free, before gigabytes are read."""
    free, total = context.driver.call("cuMemGetInfo")
    needed = sum(sizes.values())
    if needed > free:
        kv = sum(size for name, size in sizes.items() if name.startswith("kv"))
        raise HostError(
            f"memory: expected {needed / 2**30:.2f} GiB on {context.device.name} (weights "
            f"{sizes['weights'] / 2**30:.2f}, KV cache {kv / 2**30:.2f}), got {free / 2**30:.2f} GiB free "
            f"of {total / 2**30:.2f}",
            hint="load with a smaller `kv_tokens`, or end what else uses this device",
        )
