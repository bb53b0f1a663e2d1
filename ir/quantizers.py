"""Rounding weights to block formats: f32 [blocks, 32] to records, as llama.cpp's reference does."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def inverse(d: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def quantize_q4_0(x: Array, record: np.dtype) -> Array:
    """d = (the value of largest magnitude, with its sign) / -8: that value becomes code 0."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = peak / np.float32(-8)
    q = np.trunc(x * inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    out = np.empty(len(x), record)
    out["d"] = d[:, 0]
    out["qs"] = q[:, :16] | q[:, 16:] << 4
    return out


def quantize_q8_0(x: Array, record: np.dtype) -> Array:
    """d = largest magnitude / 127, codes rounded half away from zero."""
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * inverse(d)
    whole = np.trunc(scaled)
    q = whole + np.trunc(np.float32(2) * (scaled - whole))
    out = np.empty(len(x), record)
    out["d"] = d[:, 0]
    out["qs"] = q.astype(np.int8).view(np.uint8)
    return out


QUANTIZERS = {"q4_0": quantize_q4_0, "q8_0": quantize_q8_0}
