"""ir/formats.py: the meaning of each weight format, against the `gguf` package and golden blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from onelaunch.ir.errors import CompileError
from onelaunch.ir.formats import FORMATS, Format, decode, planes, quantize

QUANTISED = [f for f in FORMATS.values() if not f.dense]
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
each_quantised = pytest.mark.parametrize("fmt", QUANTISED, ids=lambda f: f.name)


def random_rows(fmt: Format, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Disk bytes [N, row_bytes] with any codes and scales, but finite f16 values of ordinary size."""
    rng = np.random.default_rng(seed)
    if fmt.dense:
        return rng.standard_normal((n, k)).astype(fmt.record).view(np.uint8)
    raw = rng.integers(0, 256, (n, fmt.row_bytes(k)), dtype=np.uint8)
    records = raw.view(fmt.record)
    if fmt.scale == "e8m0":
        records["d"] = rng.integers(112, 126, records.shape)
        return raw
    for field in {"d", "m"} & set(fmt.record.names or ()):
        records[field] = rng.normal(0, 0.01, records.shape)
    return raw


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@each_format
def test_decode_equals_the_gguf_package(fmt):
    raw = random_rows(fmt, 7, 512)
    if fmt.name == "f32":
        expected = raw.view(np.float32)
    else:
        stored = raw.view(np.float16) if fmt.name == "f16" else raw
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType(fmt.gguf))
    assert same_bits(decode(fmt, raw, 512), expected)


@each_format
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


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "bf16"])
def test_quantize_equals_the_gguf_package(name):
    x = np.random.default_rng(1).standard_normal((9, 256)).astype(np.float32)
    x[0] = 0  # a row of zeros
    x[1, :32] = 3e-8  # a scale that is subnormal in f16
    x[2, 5] = 3e4  # an outlier
    x[3] = np.tile([-8, 8, 7.5, 0.5], 64)  # ties
    expected = gguf.quantize(x, gguf.GGMLQuantizationType(FORMATS[name].gguf))
    assert np.array_equal(quantize(FORMATS[name], x), expected)


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
    with pytest.raises(CompileError, match="use `q4_0`, `q8_0` or a dense format"):
        quantize(FORMATS["q4_k"], np.zeros((1, 256), np.float32))
