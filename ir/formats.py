"""Weight formats: what the bytes of a matrix mean.

A matrix is [N out, K in]. On disk a row is K / disk_block records, described by a numpy record type, then the scales
of its trailer. `planes` splits a row into unsigned codes and scales without losing anything; packing starts from
those, and `dequantize` spells out what they mean. `FORMATS` (records.py) is the list, `Format` (format.py) its terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import expect
from .format import BLOCK_K, DTYPES, TILE_ROWS, Array, Format, Level
from .quantizers import QUANTIZERS
from .records import FORMATS

__all__ = [
    "BLOCK_K", "FORMATS", "TILE_ROWS", "Array", "Format", "Planes", "decode", "dense_view", "dequantize", "finite",
    "packed_body_bytes", "packed_bytes", "planes", "quantize", "trailer_of", "values_of", "widened",
]  # fmt: skip


@dataclass(frozen=True)
class Planes:
    """A quantised matrix, losslessly: unsigned codes u8 [N, K], and of every level and the trailer [N, scales]."""

    codes: Array
    scales: dict[str, Array]


def decode(fmt: Format, raw: Array, k: int) -> Array:
    """Disk bytes u8 [N, row_bytes] to f32 [N, K]: the exact meaning of the format."""
    if not fmt.dense:
        return dequantize(fmt, planes(fmt, raw, k))
    values = values_of(fmt, dense_view(fmt, raw, k))
    return values if fmt.trailer is None else _times_trailer(fmt.trailer, values, trailer_of(fmt, raw, k))


def planes(fmt: Format, raw: Array, k: int) -> Planes:
    """Split disk bytes u8 [N, row_bytes] of a quantised format into codes and scales."""
    assert fmt.codes is not None, f"{fmt.name} is dense: it has no codes"
    records = _records(fmt, raw, k)
    return Planes(fmt.codes(records).reshape(len(records), k), _scales(fmt, records, raw, k))


def _scales(fmt: Format, records: Array, raw: Array, k: int) -> dict[str, Array]:
    found = fmt.scales(records) if fmt.scales else {level.field: records[level.field] for level in fmt.levels}
    scales = {field: values.reshape(len(records), -1) for field, values in found.items()}
    return scales | ({fmt.trailer.field: trailer_of(fmt, raw, k)} if fmt.trailer else {})


def dequantize(fmt: Format, p: Planes) -> Array:
    """f32 [N, K]. The order of the roundings is llama.cpp's, so the bits are too."""
    n, k = p.codes.shape
    s = {v.field: widened(v.dtype, p.scales[v.field]) for v in fmt.levels if v.dtype != "u4u4"}
    if "sub" in p.scales:
        s |= {"sub_d": (p.scales["sub"] & 15).astype(np.float32), "sub_m": (p.scales["sub"] >> 4).astype(np.float32)}
    codes = p.codes.reshape(n, -1, fmt.block)
    if fmt.table:
        values = (np.array(fmt.table, np.float32) * np.float32(fmt.unit))[codes]
    else:
        values = codes.astype(np.float32) - np.float32(fmt.zero)
    if "d" in s:
        values *= _times(s["d"], s.get("sub_d"))[:, :, None]
    if "m" in s:
        values += (-_times(s["m"], s["sub_m"]) if "sub_m" in s else s["m"])[:, :, None]
    if "z" in s:  # exact: a scale has 11 bits or less, a zero point 8
        values -= (s["z"] * s["d"])[:, :, None]
    values = values.reshape(n, k)
    return _times_trailer(fmt.trailer, values, p.scales[fmt.trailer.field]) if fmt.trailer else values


def _times(scale: Array, sub: Array | None) -> Array:
    """Scales [N, S], each times its share of `sub` [N, B]."""
    return scale if sub is None else np.repeat(scale, sub.shape[1] // scale.shape[1], axis=1) * sub


def _times_trailer(trailer: Level, values: Array, scales: Array) -> Array:
    scale = widened(trailer.dtype, scales)
    k = values.shape[1]
    return values * (np.repeat(scale, trailer.every, axis=1)[:, :k] if trailer.every else scale)


def widened(dtype: str, stored: Array) -> Array:
    """Scales as they are stored (`format.DTYPES`) to f32, exactly; what stands for no number is NaN."""
    if dtype == "e8m0":
        powers = np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
        return np.where(stored == 255, np.float32(np.nan), powers)
    if dtype == "e4m3":
        return np.where(stored >= 0x7F, np.float32(np.nan), E4M3[stored])
    return stored.astype(np.float32)


E4M3 = np.array([(8 + c % 8) * 2.0 ** (c // 8 - 10) if c >= 8 else c * 2.0**-9 for c in range(128)] * 2, np.float32)


def values_of(fmt: Format, x: Array) -> Array:
    """The elements of a dense format as f32, scales left out."""
    if not fmt.floats:
        return x.astype(np.float32)
    codes = np.stack([x["qs"] >> 4, x["qs"] & 15], axis=-1)  # the first of a byte's two is its high one
    return np.array(fmt.floats, np.float32)[codes].reshape(len(x), -1)


def trailer_of(fmt: Format, raw: Array, k: int) -> Array:
    """The scales after the rows, as they are stored: [N, count]."""
    assert fmt.trailer is not None
    _expect_bytes(fmt, raw, k)
    return np.ascontiguousarray(raw[..., fmt.body_bytes(k) :]).view(DTYPES[fmt.trailer.dtype])


def finite(fmt: Format, raw: Array, k: int) -> bool:
    """Whether disk rows hold numbers only."""
    if fmt.dense and not fmt.floats:
        x = dense_view(fmt, raw, k)
        if not np.isfinite(x.astype(np.float32, copy=False)).all():
            return False
    scales = _scales(fmt, _records(fmt, raw, k), raw, k) if fmt.levels or fmt.trailer else {}
    levels = (*fmt.levels, fmt.trailer) if fmt.trailer else fmt.levels
    return all(bool(np.isfinite(widened(v.dtype, scales[v.field])).all()) for v in levels)


def quantize(fmt: Format, x: Array) -> Array:
    """f32 [N, K] to disk bytes u8 [N, row_bytes], each weight by itself."""
    n, k = x.shape
    if fmt.dense and not fmt.trailer:
        return np.ascontiguousarray(x.astype(fmt.record)).view(np.uint8).reshape(n, fmt.row_bytes(k))
    known = ", ".join(f"`{name}`" for name in QUANTIZERS)
    expect(fmt.name in QUANTIZERS, f"cannot quantize to `{fmt.name}`", hint=f"use {known} or a dense format")
    out = np.empty((n, fmt.row_bytes(k)), np.uint8)
    step = max(1, (1 << 20) // k)  # rows at a time, to bound the temporaries
    for start in range(0, n, step):
        rows = np.ascontiguousarray(x[start : start + step], np.float32)
        out[start : start + step] = QUANTIZERS[fmt.name](rows, fmt.record)
    return out


def packed_bytes(fmt: Format, n: int, k: int) -> int:
    """Bytes of a packed [N, K] matrix (layout: codegen/cpu/pack.py)."""
    return -(-n // TILE_ROWS) * (packed_body_bytes(fmt, k) + fmt.packed_trailer_bytes(k))


def packed_body_bytes(fmt: Format, k: int) -> int:
    """Bytes of one packed tile of 32 rows by K before its trailer."""
    fmt.body_bytes(k)
    blocks = -(-k // BLOCK_K)
    expect(
        blocks % fmt.packed_blocks == 0,
        f"{fmt.name}: expected K to be a multiple of {BLOCK_K * fmt.packed_blocks}, got {k}",
        hint="keep this matrix in `f16` or `bf16`",
    )
    return blocks * fmt.packed_block_bytes + blocks // fmt.packed_blocks * fmt.packed_lead_bytes


def dense_view(fmt: Format, raw: Array, k: int) -> Array:
    """Bytes, or an array of the right width already, as [N, K] of the format's type, trailer left out."""
    return _records(fmt, raw, k) if raw.dtype == np.uint8 else raw.view(fmt.record).reshape(-1, k)


def _records(fmt: Format, raw: Array, k: int) -> Array:
    _expect_bytes(fmt, raw, k)
    return np.ascontiguousarray(raw[..., : fmt.body_bytes(k)]).view(fmt.record)


def _expect_bytes(fmt: Format, raw: Array, k: int) -> None:
    expected = fmt.row_bytes(k)
    expect(
        raw.shape[-1] == expected,
        f"{fmt.name}: expected {expected} bytes per row of {k} weights, got {raw.shape[-1]}",
        hint="the tensor is of another format, or of another shape",
    )
