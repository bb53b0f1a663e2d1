"""Rounding weights: f32 [N, K] to disk rows u8 [N, row bytes].

To the nearest code; q8_0 as llama.cpp's reference does, those of four bits with the block's scale that errs least, of
a few candidates. `ir/gptq.py` rounds to the same grids by what a calibration text says about the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Array = np.ndarray


def inverse(d: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def quantize_q8_0(x: Array, record: np.dtype) -> Array:
    """d = largest magnitude / 127, codes rounded half away from zero."""
    n, x = len(x), x.reshape(-1, 32)
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * inverse(d)
    whole = np.trunc(scaled)
    q = whole + np.trunc(np.float32(2) * (scaled - whole))
    out = np.empty(len(x), record)
    out["d"] = d[:, 0]
    out["qs"] = q.astype(np.int8).view(np.uint8)
    return out.view(np.uint8).reshape(n, -1)


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


E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
INT4_VALUES = np.arange(-8, 8, dtype=np.float32)


def int4_codes(x: Array) -> Array:
    """The nearest whole number from -8 to 7, plus 8."""
    return (np.rint(x).clip(-8, 7) + 8).astype(np.uint8)


@dataclass(frozen=True)
class Grid:
    """A format of 4 bits whose weights are what a code means times the scale of its block.

    block:      weights that share a scale
    values:     what each code means, f32 [16]
    codes:      the nearest code of values in units of the scale
    candidates: blocks f32 [B, block] to scales [B] to choose from, as they are stored
    widen:      stored scales to f32
    rows:       f32 [N, K] to a scale of each row [N, 1], of a format that has them
    refit:      whether to try the scale that suits the codes of the best candidate, too
    """

    block: int
    values: Array
    codes: Callable[[Array], Array]
    candidates: Callable[[Array], list[Array]]
    widen: Callable[[Array], Array]
    rows: Callable[[Array], Array] | None = None
    refit: bool = False

    def round(self, x: Array, scales: Array) -> Array:
        """Codes u8 of x [B, n] at the scales [B], f32."""
        return self.codes(x * inverse(scales)[:, None])

    def search(self, blocks: Array, importance: Array | float = 1.0) -> tuple[Array, Array]:
        """The stored scale [B] of each block with the least squared error (of each weight times its importance),
        and its codes u8 [B, block]."""
        least = np.full(len(blocks), np.inf, np.float32)
        candidates = self.candidates(blocks)
        best, codes = candidates[0].copy(), np.zeros(blocks.shape, np.uint8)

        def consider(stored: Array) -> None:
            scales = self.widen(stored)
            found = self.round(blocks, scales)
            error = (np.square(self.values[found] * scales[:, None] - blocks) * importance).sum(axis=1)
            better = error < least
            least[better], best[better], codes[better] = error[better], stored[better], found[better]

        for stored in candidates:
            consider(stored)
        if self.refit:
            means = self.values[codes]
            size = (means * means * importance).sum(axis=1)
            consider(((means * blocks * importance).sum(axis=1) * inverse(size)).astype(best.dtype))
        return best, codes

    def disk_rows(self, codes: Array, stored: Array, rows: Array | None, record: np.dtype) -> Array:
        """u8 [N, row bytes] of codes [N, K], block scales [N, K / block] and row scales [N, 1]."""
        n, half = len(codes), self.block // 2
        blocks = codes.reshape(-1, self.block)
        packed = blocks[:, :half] | blocks[:, half:] << 4
        out = np.empty((n, packed.nbytes // n // record["qs"].itemsize), record)
        out["d"], out["qs"] = stored.reshape(out["d"].shape), packed.reshape(out["qs"].shape)
        body = out.view(np.uint8).reshape(n, -1)
        return body if rows is None else np.concatenate([body, rows.astype("<f4").view(np.uint8)], axis=1)

    def nearest(self, x: Array, record: np.dtype) -> Array:
        """f32 [N, K] to disk rows, each weight by itself."""
        rows = self.rows(x) if self.rows else None
        stored, codes = self.search((x if rows is None else x / rows).reshape(-1, self.block))
        return self.disk_rows(codes.reshape(x.shape), stored.reshape(len(x), -1), rows, record)


INT4_PEAKS = (8, 7.5, 8.5, 7, 9)  # codes that the value of largest magnitude is put at, with its sign turned


def _int4_candidates(blocks: Array) -> list[Array]:
    """llama.cpp's scale, which makes the peak code 0, and some steps of half a code to both sides."""
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    return [(peak / np.float32(-at)).astype(np.float16) for at in INT4_PEAKS]


def _mxfp4_candidates(blocks: Array) -> list[Array]:
    """The power of two below which the peak would be cut off, and its half."""
    peak = np.abs(blocks).max(axis=1)
    exponent = np.ceil(np.log2(np.maximum(peak, np.float32(2.0**-120)) / 6)).astype(np.int32)
    return [(e + 127).astype(np.uint8) for e in (exponent, exponent - 1)]


def _nvfp4_candidates(blocks: Array) -> list[Array]:
    """The E4M3 that puts the peak at 6, and that at 4: between 4 and 6 there is no code, so a block with its peak at 4
    has finer steps near it ("four over six", arXiv 2512.02010)."""
    peak = np.abs(blocks).max(axis=1)
    return [(peak / np.float32(top)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for top in (6, 4)]


NVFP4_PEAK = 256  # of a row's block scales: 448 leaves no room to take a larger one


def _nvfp4_rows(x: Array) -> Array:
    whole = np.abs(x).max(axis=1, keepdims=True) / np.float32(6 * NVFP4_PEAK)
    whole[whole == 0] = 1
    return whole


def _power(stored: Array) -> Array:
    return np.ldexp(np.float32(1), stored.astype(np.int32) - 127)


def _e4m3(stored: Array) -> Array:
    return stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


GRIDS = {
    "q4_0": Grid(32, INT4_VALUES, int4_codes, _int4_candidates, lambda d: d.astype(np.float32), refit=True),
    "mxfp4": Grid(32, E2M1_VALUES, e2m1_codes, _mxfp4_candidates, _power),
    "nvfp4": Grid(16, E2M1_VALUES, e2m1_codes, _nvfp4_candidates, _e4m3, _nvfp4_rows),
}


def quantize_fp8(rows: Array, record: np.dtype) -> Array:
    """A scale per row that makes its peak the largest E4M3, 448; its steps are relative: none to search for."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(448)
    scale[scale == 0] = 1
    elements = np.clip(rows / scale, -448, 448).astype(record)
    return np.concatenate([elements.view(np.uint8), scale.astype("<f4").view(np.uint8)], axis=1)


QUANTIZERS: dict[str, Callable[[Array, np.dtype], Array]] = {  # f32 [N, K] to disk rows
    "q4_0": GRIDS["q4_0"].nearest, "q8_0": quantize_q8_0, "mxfp4": GRIDS["mxfp4"].nearest,
    "nvfp4": GRIDS["nvfp4"].nearest, "fp8": quantize_fp8,
}  # fmt: skip
