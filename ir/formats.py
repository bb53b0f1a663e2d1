"""Weight formats: what the bytes of a matrix mean.

A matrix is [N out, K in]. On disk a row is K / disk_block records of GGUF's layout, described by a numpy
record type. Every quantised format is one sentence, which `dequantize` spells out:

    weight = scale * (code - zero) [+ min]

A format with a `table` has other numbers in its codes' places, halved: E2M1 is `scale / 2 * table[code]`.
`planes` splits a row into unsigned codes and scales without losing anything; packing starts from those.
To add a format: one entry in FORMATS with its record type and a function from records to codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .errors import expect
from .quantizers import QUANTIZERS

Array = np.ndarray

TILE_ROWS = 32  # packed layouts pad N to this
BLOCK_K = 32  # and K, for dense formats, to this


@dataclass(frozen=True)
class Format:
    """How one weight matrix is stored. Quantised formats have `codes`; dense ones do not.

    record:  numpy type of one disk block; fields d, m (f16), scales, qs, qh as the format has them
    block:   weights that share a scale: 16, 32, or 1 for dense
    scale:   "none" | "f16" (one per block) | "super" (an integer per block times one f16 per 256) |
             "e8m0" (one byte e per block: 2^(e - 127))
    """

    name: str
    gguf: int  # type id in a GGUF file
    bits: int
    record: np.dtype
    disk_block: int = 1  # weights per record
    block: int = 1
    zero: int = 0
    scale: str = "none"
    has_min: bool = False
    codes: Callable[[Array], Array] | None = None
    table: tuple[int, ...] = ()

    @property
    def dense(self) -> bool:
        return self.codes is None

    @property
    def disk_bits(self) -> float:
        """Bits per weight on disk."""
        return 8 * self.record.itemsize / self.disk_block

    @property
    def packed_block_bytes(self) -> int:
        """Bytes of a packed block of 32 rows x 32 k: codes, then scales and mins."""
        codes = TILE_ROWS * BLOCK_K * self.bits // 8
        return codes + {"none": 0, "f16": 64 * (1 + self.has_min), "super": 64, "e8m0": 0}[self.scale]

    @property
    def packed_blocks(self) -> int:
        """Packed blocks that share a lead: a superblock, or as many as fill a line with their scales."""
        return {"super": 8, "e8m0": 2}.get(self.scale, 1)

    @property
    def packed_lead_bytes(self) -> int:
        """Bytes that precede `packed_blocks` blocks: the f16 scales of a superblock, or the bytes of two blocks."""
        return {"super": 64 * (1 + self.has_min), "e8m0": 64}.get(self.scale, 0)

    @property
    def packed_bits(self) -> float:
        """Bits per weight when packed."""
        return 8 * (self.packed_block_bytes + self.packed_lead_bytes / self.packed_blocks) / (TILE_ROWS * BLOCK_K)

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights on disk."""
        expect(
            k % self.disk_block == 0,
            f"{self.name}: expected K to be a multiple of {self.disk_block}, got {k}",
            hint="keep this matrix in `f16` or `bf16`",
        )
        return k // self.disk_block * self.record.itemsize


@dataclass(frozen=True)
class Planes:
    """A quantised matrix, losslessly: unsigned codes and scales. `B` = K / block, `S` = K / disk_block."""

    codes: Array  # u8 [N, K]
    d: Array  # f16 [N, S], u8 of "e8m0"
    m: Array | None = None  # f16 [N, S]: the min itself, or what multiplies sub_m (and is subtracted)
    sub_d: Array | None = None  # u8 or i8 [N, B]
    sub_m: Array | None = None  # u8 [N, B]


def decode(fmt: Format, raw: Array, k: int) -> Array:
    """Disk bytes u8 [N, row_bytes] to f32 [N, K]: the exact meaning of the format."""
    if fmt.dense:
        return dense_view(fmt, raw, k).astype(np.float32)
    return dequantize(fmt, planes(fmt, raw, k))


def planes(fmt: Format, raw: Array, k: int) -> Planes:
    """Split disk bytes u8 [N, row_bytes] of a quantised format into codes and scales."""
    assert fmt.codes is not None, f"{fmt.name} is dense: it has no codes"
    records = _records(fmt, raw, k)
    n = len(records)
    m = records["m"] if fmt.has_min else None
    sub_d = sub_m = None
    if "scales" in (fmt.record.names or ()):
        if fmt.has_min:
            sub_d, sub_m = (s.reshape(n, -1) for s in _six_bit_scales(records["scales"]))
        else:
            sub_d = records["scales"].reshape(n, -1)
    return Planes(fmt.codes(records).reshape(n, k), records["d"], m, sub_d, sub_m)


def dequantize(fmt: Format, p: Planes) -> Array:
    """f32 [N, K]. The order of the roundings is llama.cpp's, so the bits are too."""
    n, k = p.codes.shape
    scale = e8m0(p.d) if fmt.scale == "e8m0" else p.d.astype(np.float32)  # [N, S]
    if p.sub_d is not None:
        scale = _each(scale, p.sub_d) * p.sub_d.astype(np.float32)
    codes = p.codes.reshape(n, -1, fmt.block)
    if fmt.table:
        values = np.array(fmt.table, np.float32)[codes] / np.float32(2)
    else:
        values = codes.astype(np.float32) - np.float32(fmt.zero)
    values *= scale[:, :, None]
    if p.m is not None:
        low = p.m.astype(np.float32)
        if p.sub_m is not None:
            low = -(_each(low, p.sub_m) * p.sub_m.astype(np.float32))
        values += low[:, :, None]
    return values.reshape(n, k)


def e8m0(exponents: Array) -> Array:
    """Powers of two 2^(e - 127) of bytes e, f32; 255 is not-a-number."""
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)
    return np.where(exponents == 255, np.float32(np.nan), powers)


def quantize(fmt: Format, x: Array) -> Array:
    """f32 [N, K] to disk bytes u8 [N, row_bytes], nearest; q4_0 and q8_0 as llama.cpp's reference does."""
    n, k = x.shape
    if fmt.dense:
        return np.ascontiguousarray(x.astype(fmt.record)).view(np.uint8).reshape(n, fmt.row_bytes(k))
    known = ", ".join(f"`{name}`" for name in QUANTIZERS)
    expect(fmt.name in QUANTIZERS, f"cannot quantize to `{fmt.name}`", hint=f"use {known} or a dense format")
    out = np.empty((n, fmt.row_bytes(k)), np.uint8)
    step = max(1, (1 << 20) // k)  # rows at a time, to bound the temporaries
    for start in range(0, n, step):
        rows = np.ascontiguousarray(x[start : start + step], np.float32)
        records = QUANTIZERS[fmt.name](rows.reshape(-1, fmt.disk_block), fmt.record)
        out[start : start + step] = records.view(np.uint8).reshape(len(rows), -1)
    return out


def packed_bytes(fmt: Format, n: int, k: int) -> int:
    """Bytes of a packed [N, K] matrix (layout: codegen/cpu/pack.py)."""
    fmt.row_bytes(k)
    blocks = -(-k // BLOCK_K)
    expect(
        blocks % fmt.packed_blocks == 0,
        f"{fmt.name}: expected K to be a multiple of {BLOCK_K * fmt.packed_blocks}, got {k}",
        hint="keep this matrix in `f16` or `bf16`",
    )
    tile = blocks * fmt.packed_block_bytes + blocks // fmt.packed_blocks * fmt.packed_lead_bytes
    return -(-n // TILE_ROWS) * tile


def dense_view(fmt: Format, raw: Array, k: int) -> Array:
    """Bytes, or an array of the right width already, as [N, K] of the format's type."""
    return _records(fmt, raw, k) if raw.dtype == np.uint8 else raw.view(fmt.record).reshape(-1, k)


def _records(fmt: Format, raw: Array, k: int) -> Array:
    expected = fmt.row_bytes(k)
    expect(
        raw.shape[-1] == expected,
        f"{fmt.name}: expected {expected} bytes per row of {k} weights, got {raw.shape[-1]}",
        hint="the tensor is of another format, or of another shape",
    )
    return np.ascontiguousarray(raw).view(fmt.record)


def _each(per_super: Array, sub: Array) -> Array:
    """Repeat [N, S] along the last axis to the shape of `sub`."""
    return np.repeat(per_super, sub.shape[1] // per_super.shape[1], axis=1)


def _low_high(qs: Array) -> Array:
    """Bytes [..., n] to nibbles [..., 2, n]: all low ones, then all high ones."""
    return np.stack([qs & 15, qs >> 4], axis=-2)


def _codes_4(r: Array) -> Array:
    return _low_high(r["qs"])


def _codes_q5_0(r: Array) -> Array:
    fifth = np.unpackbits(r["qh"], axis=-1, bitorder="little")
    return _low_high(r["qs"]).reshape(fifth.shape) | fifth << 4


def _codes_q8_0(r: Array) -> Array:
    return r["qs"] ^ np.uint8(0x80)  # i8 + 128


def _codes_q4_k(r: Array) -> Array:
    return _low_high(r["qs"].reshape(*r.shape, 4, 32))


def _codes_q5_k(r: Array) -> Array:
    fifth = r["qh"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _codes_q4_k(r).reshape(fifth.shape) | fifth << 4


def _codes_q6_k(r: Array) -> Array:
    low = _low_high(r["qs"].reshape(*r.shape, 2, 64)).reshape(*r.shape, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = r["qh"].reshape(*r.shape, 2, 1, 32) >> shifts & 3
    return low | high << 4


def _six_bit_scales(packed: Array) -> tuple[Array, Array]:
    """12 bytes to 8 scales and 8 mins of 6 bits: four whole ones each, the rest in two pieces."""
    low, mid, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    mins = np.concatenate([mid & 63, high >> 4 | mid >> 6 << 4], axis=-1)
    return scales, mins


def _dense(name: str, gguf: int, dtype: type) -> Format:
    return Format(name, gguf, 8 * np.dtype(dtype).itemsize, np.dtype(dtype))


def _quant(
    name: str, gguf: int, bits: int, zero: int, codes: Callable[[Array], Array], record: list[Any], block: int = 32
) -> Format:
    dtype = np.dtype(record)
    names = dtype.names or ()
    is_super = "scales" in names
    return Format(
        name,
        gguf,
        bits,
        dtype,
        disk_block=256 if is_super else 32,
        block=block,
        zero=zero,
        scale="super" if is_super else "f16",
        has_min="m" in names,
        codes=codes,
    )


_D, _M, _SCALES = ("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12)


def _bytes(field: str, count: int) -> tuple[str, str, int]:
    return field, "u1", count


# E2M1: a sign, two bits of exponent, one of fraction. Minus zero is zero.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_MXFP4 = np.dtype([("d", "u1"), _bytes("qs", 16)])
_Q6_K = [_bytes("qs", 128), _bytes("qh", 64), ("scales", "i1", 16), _D]

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _dense("f32", 0, np.float32),
        _dense("f16", 1, np.float16),
        _dense("bf16", 30, ml_dtypes.bfloat16),
        _quant("q4_0", 2, 4, 8, _codes_4, [_D, _bytes("qs", 16)]),
        _quant("q4_1", 3, 4, 0, _codes_4, [_D, _M, _bytes("qs", 16)]),
        _quant("q5_0", 6, 5, 16, _codes_q5_0, [_D, _bytes("qh", 4), _bytes("qs", 16)]),
        _quant("q8_0", 8, 8, 128, _codes_q8_0, [_D, _bytes("qs", 32)]),
        _quant("q4_k", 12, 4, 0, _codes_q4_k, [_D, _M, _SCALES, _bytes("qs", 128)]),
        _quant("q5_k", 13, 5, 0, _codes_q5_k, [_D, _M, _SCALES, _bytes("qh", 32), _bytes("qs", 128)]),
        _quant("q6_k", 14, 6, 32, _codes_q6_k, _Q6_K, block=16),
        Format("mxfp4", 39, 4, _MXFP4, 32, 32, scale="e8m0", codes=_codes_4, table=_E2M1),
    )
}
