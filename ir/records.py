"""Weight formats as data: the bytes on disk of each, and how to read them. Adding one is an entry here.

`FORMATS` holds GGUF's under GGUF's names. Those of other checkpoints are in records of the same kind, made by their
readers (models/); `int4*` are groups of 32 with their scale and zero point, which larger groups repeat.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .format import ROW, Format, Level
from .unpacking import (
    codes_4,
    codes_iq4_xs,
    codes_nvfp4,
    codes_q2_k,
    codes_q3_k,
    codes_q4_k,
    codes_q5,
    codes_q5_k,
    codes_q6_k,
    codes_q8_0,
    scales_iq4_xs,
    scales_q3_k,
    scales_q4_k,
)

# E2M1: a sign, two bits of exponent, one of fraction, in halves. Minus zero is zero.
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TABLES = {"e2m1": E2M1, "iq4": IQ4}
# Quantiles of a normal distribution, from -1 to 1 (bitsandbytes' `nf4`).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_D, _M, _BRAIN = ("d", "<f2"), ("m", "<f2"), ("d", ml_dtypes.bfloat16)
_BRAIN32 = Level("d", "bf16", 32)
_D32, _M32, _D256, _M256 = Level("d", "f16", 32), Level("m", "f16", 32), Level("d", "f16", 256), Level("m", "f16", 256)
_SUB32 = Level("sub_d", "u8", 32), Level("sub_m", "u8", 32)
_ROW = Level("t", "f32", ROW)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def _bytes(field: str, count: int) -> tuple[str, str, int]:
    return field, "u1", count


def _dense(name: str, gguf: int, dtype: type) -> Format:
    return Format(name, 8 * np.dtype(dtype).itemsize, np.dtype(dtype), gguf)


def _blocks(name: str, gguf: int, bits: int, record: list[tuple], levels: tuple[Level, ...], **more) -> Format:  # type: ignore[no-untyped-def, type-arg]
    """Of 32 weights, or 256 where a scale serves so many."""
    widest = max((level.every for level in levels), default=32)
    return Format(
        name, bits, np.dtype(record), gguf, **{"disk_block": max(widest, 32), "block": 32, "levels": levels, **more}
    )


def _fp8(name: str, trailer: Level) -> Format:
    return Format(name, 8, _FP8, trailer=trailer)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _dense("f32", 0, np.float32),
        _dense("f16", 1, np.float16),
        _dense("bf16", 30, ml_dtypes.bfloat16),
        _blocks("q4_0", 2, 4, [_D, _bytes("qs", 16)], (_D32,), zero=8, codes=codes_4),
        _blocks("q4_1", 3, 4, [_D, _M, _bytes("qs", 16)], (_D32, _M32), codes=codes_4),
        _blocks("q5_0", 6, 5, [_D, _bytes("qh", 4), _bytes("qs", 16)], (_D32,), zero=16, codes=codes_q5),
        _blocks("q5_1", 7, 5, [_D, _M, _bytes("qh", 4), _bytes("qs", 16)], (_D32, _M32), codes=codes_q5),
        _blocks("q8_0", 8, 8, [_D, _bytes("qs", 32)], (_D32,), zero=128, codes=codes_q8_0),
        _blocks(
            "q2_k", 10, 2, [_bytes("sub", 16), _bytes("qs", 64), _D, _M], (Level("sub", "u4u4", 16), _D256, _M256),
            block=16, codes=codes_q2_k,
        ),
        _blocks(
            "q3_k", 11, 3, [_bytes("qh", 32), _bytes("qs", 64), _bytes("scales", 12), _D],
            (Level("sub_d", "i8", 16), _D256), block=16, zero=4, codes=codes_q3_k, scales=scales_q3_k,
        ),
        _blocks(
            "q4_k", 12, 4, [_D, _M, _bytes("scales", 12), _bytes("qs", 128)], (*_SUB32, _D256, _M256),
            codes=codes_q4_k, scales=scales_q4_k,
        ),
        _blocks(
            "q5_k", 13, 5, [_D, _M, _bytes("scales", 12), _bytes("qh", 32), _bytes("qs", 128)],
            (*_SUB32, _D256, _M256), codes=codes_q5_k, scales=scales_q4_k,
        ),
        _blocks(
            "q6_k", 14, 6, [_bytes("qs", 128), _bytes("qh", 64), ("sub_d", "i1", 16), _D],
            (Level("sub_d", "i8", 16), _D256), block=16, zero=32, codes=codes_q6_k,
        ),
        _blocks("iq4_nl", 20, 4, [_D, _bytes("qs", 16)], (_D32,), codes=codes_4, table=IQ4),
        _blocks(
            "iq4_xs", 23, 4, [_D, ("high", "<u2"), _bytes("low", 4), _bytes("qs", 128)],
            (Level("sub_d", "i8", 32), _D256), codes=codes_iq4_xs, scales=scales_iq4_xs, table=IQ4,
        ),
        _blocks(
            "mxfp4", 39, 4, [("d", "u1"), _bytes("qs", 16)], (Level("d", "e8m0", 32),), codes=codes_4, table=E2M1,
            unit=0.5,
        ),
        _blocks(
            "nvfp4", 40, 4, [_bytes("d", 4), _bytes("qs", 32)], (Level("d", "e4m3", 16),), disk_block=64, block=16,
            codes=codes_nvfp4, table=E2M1, unit=0.5, trailer=_ROW,
        ),
        _blocks("int4", -1, 4, [_BRAIN, _bytes("qs", 16)], (_BRAIN32,), zero=8, codes=codes_4),
        _blocks("int4_z", -1, 4, [_D, ("z", "u1"), _bytes("qs", 16)], (_D32, Level("z", "u8", 32)), codes=codes_4),
        _blocks(
            "int4_bz", -1, 4, [_BRAIN, ("z", "u1"), _bytes("qs", 16)], (_BRAIN32, Level("z", "u8", 32)), codes=codes_4,
        ),
        _blocks("int8", -1, 8, [_bytes("qs", 32)], (), zero=128, codes=codes_q8_0, trailer=_ROW),
        _fp8("fp8", _ROW),
        _fp8("fp8_128", Level("t", "f32", 128)),
        _fp8("fp8_32", Level("t", "f32", 32)),
        _fp8("mxfp8", Level("t", "e8m0", 32)),
        Format("nf4", 4, np.dtype([_bytes("qs", 32)]), disk_block=64, floats=NF4, trailer=Level("t", "f32", 64)),
    )
}  # fmt: skip
