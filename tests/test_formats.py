"""ir/formats.py: the meaning of each weight format, against the `gguf` package and golden blocks."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest

from onelaunch.ir.errors import CompileError
from onelaunch.ir.formats import (
    FORMATS,
    Format,
    Planes,
    decode,
    dequantize,
    finite,
    planes,
    quantize,
    trailer_of,
    widened,
)
from onelaunch.tests.disk_rows import set_scales

QUANTISED = [f for f in FORMATS.values() if not f.dense]
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
of_gguf = pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.gguf >= 0], ids=lambda f: f.name)
each_quantised = pytest.mark.parametrize("fmt", QUANTISED, ids=lambda f: f.name)


def random_rows(fmt: Format, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Disk bytes [N, row_bytes] with any codes and scales, but finite floats of ordinary size."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, fmt.row_bytes(k)), dtype=np.uint8)
    body = raw[:, : fmt.body_bytes(k)]
    if fmt.dense and not fmt.floats:
        body[:] = rng.standard_normal((n, k)).astype(fmt.record).view(np.uint8).reshape(n, -1)
    set_scales(fmt, raw, k, lambda _, dtype, shape: random_scales(rng, dtype, shape))
    return raw


def random_scales(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    match dtype:
        case "e8m0":
            return rng.integers(112, 126, shape)
        case "e4m3":
            return rng.integers(0, 0x7F, shape)
    return rng.normal(0, 0.01, shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def from_gguf(fmt: Format, raw: np.ndarray, k: int) -> np.ndarray:
    """What the gguf package makes of disk rows; a scale of a whole row is in a tensor of its own there."""
    if fmt.name == "f32":
        return raw.view(np.float32)
    body = np.ascontiguousarray(raw[:, : fmt.body_bytes(k)])
    values = gguf.dequantize(body.view(np.float16) if fmt.name == "f16" else body, gguf.GGMLQuantizationType(fmt.gguf))
    return values * trailer_of(fmt, raw, k) if fmt.trailer else values


@of_gguf
def test_decode_equals_the_gguf_package(fmt):
    raw = random_rows(fmt, 7, 512)
    assert same_bits(decode(fmt, raw, 512), from_gguf(fmt, raw, 512))


@of_gguf
@pytest.mark.parametrize("d", [0, 6e-8, 65504.0, -65504.0])
def test_extreme_scales_decode_as_the_gguf_package_has_them(fmt, d):
    """Zero, the least subnormal, the largest; of scales of 8 bits every one."""
    raw = random_rows(fmt, 9, 512)
    set_scales(fmt, raw, 512, lambda _, dtype, shape: extreme(dtype, shape, d))
    assert same_bits(decode(fmt, raw, 512), from_gguf(fmt, raw, 512))


def extreme(dtype: str, shape: tuple[int, ...], d: float) -> np.ndarray:
    count = {"e8m0": 255, "e4m3": 127}.get(dtype)
    return np.resize(np.arange(count), shape) if count else np.full(shape, d)


@of_gguf
def test_disk_sizes_equal_the_gguf_package(fmt):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(fmt.gguf)]
    assert (fmt.disk_block, fmt.record.itemsize) == (block, size)


def test_golden_q4_0_block():
    raw = np.frombuffer(bytes.fromhex("003802030405060708090a0b0c0d0e0f1011"), np.uint8)
    row = decode(FORMATS["q4_0"], raw[None], 32)[0]
    assert row[[0, 1, 15, 16, 31]].tolist() == [-3, -2.5, -3.5, -4, -3.5]


def test_golden_mxfp4_block():
    raw = np.frombuffer(bytes.fromhex("800f1e2d3c4b5a69788796a5b4c3d2e1f0"), np.uint8)
    row = decode(FORMATS["mxfp4"], raw[None], 32)[0]
    assert row[[0, 1, 16, 17, 31]].tolist() == [-12, -8, 0, 1, -12]


def test_every_scale_of_mxfp4_decodes_as_the_gguf_package_has_it():
    raw = random_rows(FORMATS["mxfp4"], 255, 512)
    raw.view(FORMATS["mxfp4"].record)["d"] = np.arange(255)[:, None]  # subnormal ones too
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    assert same_bits(decode(FORMATS["mxfp4"], raw, 512), expected)


def test_golden_nvfp4_block():
    codes = "00070e151c232a31383f464d545b626970777e858c939aa1a8afb6bdc4cbd2d9"
    raw = np.frombuffer(bytes.fromhex("3840307e" + codes) + np.float32(1).tobytes(), np.uint8)
    row = decode(FORMATS["nvfp4"], raw[None], 64)[0]
    assert row[[1, 7, 15]].tolist() == [6, 0.5, 1.5]
    assert same_bits(
        decode(FORMATS["nvfp4"], np.append(raw[:-4], np.float32([3]).view(np.uint8))[None], 64)[0], 3 * row
    )


def test_every_scale_of_e4m3_is_what_ml_dtypes_has():
    codes = np.arange(127, dtype=np.uint8)
    assert same_bits(widened("e4m3", codes), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.isnan(widened("e4m3", np.arange(127, 256, dtype=np.uint8))).all()


@pytest.mark.parametrize(("name", "every"), [("fp8", 300), ("fp8_128", 128), ("fp8_32", 32), ("mxfp8", 32)])
def test_fp8_is_its_element_times_the_scale_of_its_columns(name, every):
    """300 columns: the last block of each is a part of one."""
    fmt = FORMATS[name]
    raw = random_rows(fmt, 5, 300)
    elements = raw[:, :300].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = widened(fmt.trailer.dtype, trailer_of(fmt, raw, 300))
    assert scales.shape == (5, -(-300 // every))
    assert same_bits(decode(fmt, raw, 300), elements * scales[:, np.arange(300) // every])


@pytest.mark.parametrize(("name", "zeros"), [("int4", None), ("int4_z", "z"), ("int4_bz", "z")])
def test_int4_is_exactly_code_less_zero_times_scale(name, zeros):
    fmt = FORMATS[name]
    raw = random_rows(fmt, 5, 64)
    found = planes(fmt, raw, 64)
    zero = found.scales[zeros].astype(np.float64) if zeros else np.full((5, 2), 8.0)
    exact = (found.codes.reshape(5, 2, 32) - zero[:, :, None]) * found.scales["d"].astype(np.float64)[:, :, None]
    assert np.array_equal(decode(fmt, raw, 64), exact.reshape(5, 64))


def odd_rows() -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((9, 256)).astype(np.float32)
    x[0] = 0  # a row of zeros
    x[1, :32] = 3e-8  # a scale that is subnormal in f16
    x[2, 5] = 3e4  # an outlier
    x[3] = np.tile([-8, 8, 7.5, 0.5], 64)  # ties
    return x


@pytest.mark.parametrize("name", ["q8_0", "bf16"])
def test_quantize_equals_the_gguf_package(name):
    expected = gguf.quantize(odd_rows(), gguf.GGMLQuantizationType(FORMATS[name].gguf))
    assert np.array_equal(quantize(FORMATS[name], odd_rows()), expected)


def test_int4_errs_no_more_than_the_gguf_package_in_any_block():
    fmt, x = FORMATS["q4_0"], odd_rows()
    ours, theirs = (
        np.square(decode(fmt, raw, 256) - x).reshape(-1, 32).sum(axis=1)
        for raw in (quantize(fmt, x), gguf.quantize(x, gguf.GGMLQuantizationType.Q4_0))
    )
    assert (ours <= theirs * 1.0001).all()
    normal = np.random.default_rng(3).standard_normal((256, 256)).astype(np.float32)
    raw = quantize(fmt, normal), gguf.quantize(normal, gguf.GGMLQuantizationType.Q4_0)
    errors = [np.square(decode(fmt, r, 256) - normal).sum() for r in raw]
    assert errors[0] < 0.9 * errors[1]  # 0.892; without fitting the scale to the codes 0.916


def test_quantize_does_not_depend_on_the_rows_around():
    x = np.random.default_rng(2).standard_normal((3000, 1024)).astype(np.float32)
    whole = quantize(FORMATS["q8_0"], x)
    assert np.array_equal(whole[2500:2502], quantize(FORMATS["q8_0"], x[2500:2502]))


@each_quantised
def test_planes_hold_codes_of_the_stated_width(fmt):
    codes = planes(fmt, random_rows(fmt, 40, 512), 512).codes
    assert codes.min() == 0
    assert codes.max() == 2**fmt.bits - 1


@each_quantised
def test_a_ragged_row_is_refused(fmt):
    with pytest.raises(CompileError, match=f"expected K to be a multiple of {fmt.disk_block}, got 48"):
        fmt.row_bytes(48)


def test_bytes_of_another_format_are_refused():
    with pytest.raises(CompileError, match="q4_1: expected 20 bytes per row of 32 weights, got 18"):
        decode(FORMATS["q4_1"], np.zeros((1, 18), np.uint8), 32)


def test_a_format_that_cannot_be_made_says_which_can():
    with pytest.raises(CompileError, match="use `q4_0`, `q8_0`, `mxfp4`, `nvfp4`, `fp8` or a dense"):
        quantize(FORMATS["q4_k"], np.zeros((1, 256), np.float32))


ROUNDED = ("mxfp4", "nvfp4", "fp8")


def heavy_tailed(n: int, k: int) -> np.ndarray:
    x = np.random.default_rng(7).standard_t(4, (n, k)).astype(np.float32)
    x[0] = 0  # a row of zeros
    x[1] *= np.float32(1e-30)
    x[2, :16] = 0
    return x


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_takes_the_nearest_code_of_the_scale_it_chose(name):
    """No code would be nearer: each value is as near as the nearest of all there are at its block's scale."""
    fmt, x = FORMATS[name], heavy_tailed(16, 128)
    raw = quantize(fmt, x)
    found = decode(fmt, raw, 128)
    if fmt.dense:
        scale = trailer_of(fmt, raw, 128)
        codes = np.arange(256, dtype=np.uint8).view(fmt.record).astype(np.float32)
        grid = np.sort(codes[np.isfinite(codes)])[None, None] * scale[:, :, None]
    else:
        steps = dequantize(fmt, Planes(np.ones((16, 128), np.uint8), planes(fmt, raw, 128).scales)) * 2
        grid = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6]) * steps[:, :, None]
    nearest = np.abs(grid - x[:, :, None]).min(axis=2)
    assert (np.abs(found - x) <= nearest + 1e-6 * np.abs(x).max(axis=1, keepdims=True)).all()
    assert finite(fmt, raw, 128)
    assert not found[0].any()


@pytest.mark.parametrize(("name", "block"), [("mxfp4", 32), ("nvfp4", 16)])
def test_the_scale_errs_no_more_than_the_one_that_puts_the_peak_at_six(name, block):
    """By blocks; in many the other candidate is better."""
    x = heavy_tailed(64, 256)
    found = np.square(decode(FORMATS[name], quantize(FORMATS[name], x), 256) - x).reshape(-1, block).sum(axis=1)
    peak = np.abs(x).reshape(-1, block).max(axis=1)
    scale = peak / 6
    if name == "mxfp4":
        scale = np.exp2(np.ceil(np.log2(np.maximum(scale, 1e-38))))
    else:
        row = np.repeat(np.abs(x).max(axis=1) / (6 * 256), 256 // block)
        row[row == 0] = 1
        scale = (scale / row).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * row
    grid = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    plain = np.square(np.abs(grid * scale[:, None, None] - np.abs(x).reshape(-1, block, 1)).min(axis=2)).sum(axis=1)
    assert (found <= plain * 1.0001 + 1e-30).all()
    assert (found < plain * 0.99).mean() > 0.2


def test_ties_go_to_the_even_code():
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)
    row = decode(FORMATS["mxfp4"], quantize(FORMATS["mxfp4"], np.tile(ties, 2)[None]), 64)[0, :8]
    assert row.tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
