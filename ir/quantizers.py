"""Rounding weights to block formats: f32 [blocks, 32] to records, or rows to disk rows.

To the nearest code; q4_0 and q8_0 as llama.cpp's reference does, the others with the scale that errs least.
"""

from __future__ import annotations

import ml_dtypes
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


# Half way between two codes of E2M1, ties to the even one: the first four go down, the others up.
DOWN, UP = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)


def e2m1_codes(x: Array) -> Array:
    """The nearest code of each value, beyond 6 that of 6."""
    size = np.abs(x)
    codes = np.signbit(x).astype(np.uint8) << 3
    for threshold in DOWN:
        codes += size > threshold
    for threshold in UP:
        codes += size >= threshold
    return codes


E2M1_SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _best(blocks: Array, scales: list[Array]) -> tuple[Array, Array]:
    """Of scales [B] for blocks [B, n] the index [B] of the one with the least squared error, and its codes."""
    least, best = np.full(len(blocks), np.inf, np.float32), np.zeros(len(blocks), int)
    codes = np.zeros(blocks.shape, np.uint8)
    for i, scale in enumerate(scales):
        found = e2m1_codes(blocks * inverse(scale)[:, None])
        error = np.square(E2M1_SIZES[found & 7] * scale[:, None] - np.abs(blocks)).sum(axis=1)
        better = error < least
        least[better], best[better], codes[better] = error[better], i, found[better]
    return best, codes


def quantize_mxfp4(x: Array, record: np.dtype) -> Array:
    """The power of two with the least squared error, of that below which the peak would be cut off and its half."""
    peak = np.abs(x).max(axis=1)
    exponent = np.ceil(np.log2(np.maximum(peak, np.float32(2.0**-120)) / 6)).astype(np.int32)
    exponents = [exponent, exponent - 1]
    best, codes = _best(x, [np.ldexp(np.float32(1), e) for e in exponents])
    out = np.empty(len(x), record)
    out["d"] = np.choose(best, exponents) + 127
    out["qs"] = codes[:, :16] | codes[:, 16:] << 4
    return out


NVFP4_PEAK = 256  # of a row's block scales: 448 leaves no room to take a larger one


def quantize_nvfp4(rows: Array, record: np.dtype) -> Array:
    """A scale per row, and per 16 weights the E4M3 that puts their peak at 6 or at 4, whichever errs less: between 4
    and 6 there is no code, so a block with its peak at 4 has finer steps near it."""
    n, k = rows.shape
    whole = np.abs(rows).max(axis=1, keepdims=True) / np.float32(6 * NVFP4_PEAK)
    whole[whole == 0] = 1
    blocks = (rows / whole).reshape(-1, 16)
    peak = np.abs(blocks).max(axis=1)
    stored = [(peak / np.float32(top)).astype(ml_dtypes.float8_e4m3fn) for top in (6, 4)]
    best, codes = _best(blocks, [s.astype(np.float32) for s in stored])
    out = np.empty((n, k // 64), record)
    out["d"] = np.choose(best, [s.view(np.uint8) for s in stored]).reshape(n, -1, 4)
    out["qs"] = (codes[:, :8] | codes[:, 8:] << 4).reshape(n, -1, 32)
    return np.concatenate([out.view(np.uint8).reshape(n, -1), whole.astype("<f4").view(np.uint8)], axis=1)


def quantize_fp8(rows: Array, record: np.dtype) -> Array:
    """A scale per row that makes its peak the largest E4M3, 448; its steps are relative: none to search for."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(448)
    scale[scale == 0] = 1
    elements = np.clip(rows / scale, -448, 448).astype(record)
    return np.concatenate([elements.view(np.uint8), scale.astype("<f4").view(np.uint8)], axis=1)


QUANTIZERS = {"q4_0": quantize_q4_0, "q8_0": quantize_q8_0, "mxfp4": quantize_mxfp4}
ROW_QUANTIZERS = {"nvfp4": quantize_nvfp4, "fp8": quantize_fp8}  # of whole rows, to disk rows
