"""NVFP4 in a GGUF: the scale of a whole matrix is a tensor beside it, `NAME.scale` or `NAME.weight.scale`.

Our rows of the format end with it. `NAME.input_scale` is for activations of four bits, which no kernel of ours has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .checkpoint import TensorInfo

Read = Callable[[str], np.ndarray]
IGNORED = "activations are rounded to eight bits by blocks, not by a scale of the checkpoint"


def with_scales(
    tensors: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], Read, dict[str, str], list[str]]:
    """Tensors without those scales, a `read` that appends them, what is ignored, and what does not fit."""
    homes: dict[str, str] = {}
    ignored: dict[str, str] = {}
    reasons: list[str] = []
    for name, info in tensors.items():
        if info.format != "nvfp4":
            continue
        base = name.removesuffix(".weight")
        ignored |= {n: IGNORED for n in (f"{base}.input_scale", f"{name}.input_scale") if n in tensors}
        found = [tensors[n] for n in (f"{base}.scale", f"{name}.scale") if n in tensors]
        count = info.shape[0] if len(info.shape) == 3 else 1
        fits = [t for t in found if t.format == "f32" and np.prod(t.shape) in (1, count)]
        if found and len(fits) == 1:
            homes[name] = fits[0].name
        elif found:
            reasons.append(f"tensor `{found[-1].name}`: expected one scale in f32 (or one per expert) of `{name}`")

    def reading(name: str) -> np.ndarray:
        raw = read(name)
        if tensors[name].format != "nvfp4":
            return raw
        scale = read(homes[name]).astype("<f4").reshape(-1) if name in homes else np.ones(1, "<f4")
        rows = np.broadcast_to(scale.reshape(-1, *(1,) * (raw.ndim - 1)), (*raw.shape[:-1], 1))
        return np.concatenate([raw, np.ascontiguousarray(rows).view(np.uint8)], axis=-1)

    hidden = set(homes.values()) | set(ignored)
    return {n: t for n, t in tensors.items() if n not in hidden}, reading, ignored, reasons
