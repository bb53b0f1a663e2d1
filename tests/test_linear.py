"""The compiled linear cores on every level of this host, against numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from onelaunch.codegen.cpu.pack import pack
from onelaunch.ir.formats import FORMATS, Format, decode, quantize
from onelaunch.tests.disk_rows import set_scales
from onelaunch.tests.native import build, host_levels
from onelaunch.tests.test_formats import each_format, each_quantised, extreme, random_rows, same_bits

LEVELS = host_levels()
HARNESS = "linear_harness.cpp"
ROWS = 13  # panels of 4, 4, 4, 1 with AVX-512 and of 2 and 1 without
N = 70
each_level = pytest.mark.parametrize("level", LEVELS)


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def pad(n: int) -> int:
    return -(-n // 32) * 32


def linear(level: int, fmt: Format, packed: np.ndarray, n: int, x: np.ndarray) -> np.ndarray:
    """y [R, N] for x [R, K], through pack_act and tile."""
    rows, k = x.shape
    act = np.zeros(rows * pad(k) * 4, np.uint8)
    y = np.full((rows, pad(n)), np.nan, np.float32)
    call = getattr(build(HARNESS, level), f"linear_{fmt.name}")
    call(pointer(packed), n, pad(k), pointer(x), k, rows, pointer(act), pointer(y))
    return y[:, :n]


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [R, K/32, 32] and f32 scales [R, K/32] of activations, as pack_q8 makes them."""
    blocks = x.reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(axis=2)
    inverse = np.where(amax > 0, np.float32(127) / np.where(amax > 0, amax, 1), 0).astype(np.float32)
    return np.rint(blocks * inverse[:, :, None]).astype(np.int8), amax / np.float32(127)


def seen_by(level: int, fmt: Format, x: np.ndarray) -> np.ndarray:
    """The activations that the core multiplies with, in float64."""
    if fmt.panel == "q8":
        q, d = quantised(x)
        return (q * d[:, :, None].astype(np.float64)).reshape(x.shape)
    if fmt.name == "bf16" and level == 2:
        return x.astype(fmt.record).astype(np.float64)
    return x.astype(np.float64)


def check(level: int, fmt: Format, raw: np.ndarray, x: np.ndarray) -> None:
    weights = decode(fmt, raw, x.shape[1]).astype(np.float64)
    acts = seen_by(level, fmt, x)
    y = linear(level, fmt, pack(fmt, raw, len(raw), x.shape[1]), len(raw), x)
    size = np.abs(acts) @ np.abs(weights).T
    if fmt.has_min:  # scale * code and min cancel: their own size counts
        size += np.abs(acts).sum(axis=1, keepdims=True) * np.abs(weights).max() * 2**fmt.bits
    np.testing.assert_array_less(np.abs(y - acts @ weights.T), 3e-6 * size + 1e-30)


def activations(rows: int, k: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)


@each_level
@each_format
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, ROWS])
def test_linear_equals_numpy(level, fmt, rows):
    check(level, fmt, random_rows(fmt, N, 512), activations(rows, 512))


@each_level
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "fp8", "fp8_128", "mxfp8"])
def test_dense_linear_takes_any_shape(level, name):
    for n, k in [(1, 1), (33, 77), (31, 95)]:
        check(level, FORMATS[name], random_rows(FORMATS[name], n, k), activations(3, k))


@each_level
@each_format
def test_a_row_is_the_same_in_any_company(level, fmt):
    packed = pack(fmt, random_rows(fmt, N, 768), N, 768)
    x = activations(ROWS, 768)
    together = linear(level, fmt, packed, N, x)
    for rows in range(1, 7):
        assert same_bits(linear(level, fmt, packed, N, x[:rows]), together[:rows])
    for row in range(ROWS):
        assert same_bits(linear(level, fmt, packed, N, x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.name != "bf16"], ids=lambda f: f.name)
def test_levels_agree_to_the_bit(fmt):
    packed = pack(fmt, random_rows(fmt, N, 512), N, 512)
    results = [linear(level, fmt, packed, N, activations(ROWS, 512)) for level in LEVELS]
    for other in results[1:]:
        assert same_bits(other, results[0])


@each_level
@each_quantised
def test_extreme_codes_do_not_saturate(level, fmt):
    for fill in (0x00, 0xFF, 0x80, 0x7F):
        raw = np.full((32, fmt.row_bytes(256)), fill, np.uint8)
        set_scales(fmt, raw, 256, lambda _, dtype, shape: np.full(shape, {"e8m0": 120, "e4m3": 0x7E}.get(dtype, 0.01)))
        for x in (np.ones((2, 256), np.float32), -np.ones((2, 256), np.float32)):
            check(level, fmt, raw, x)


@each_level
@each_format
def test_zeros_give_zero(level, fmt):
    raw = random_rows(fmt, 32, 256)
    assert not linear(level, fmt, pack(fmt, raw, 32, 256), 32, np.zeros((5, 256), np.float32)).any()
    blank = pack(fmt, np.zeros_like(raw), 32, 256)
    assert not linear(level, fmt, blank, 32, activations(5, 256)).any()


@each_level
@each_format
def test_decode_row_equals_decode(level, fmt):
    raw = random_rows(fmt, N, 512)
    packed, expected = pack(fmt, raw, N, 512), decode(fmt, raw, 512)
    assert getattr(build(HARNESS, level), f"tile_bytes_{fmt.name}")(512) == packed.nbytes // 3
    row = np.empty(512, np.float32)
    for n in (0, 15, 16, 33, N - 1):
        getattr(build(HARNESS, level), f"decode_row_{fmt.name}")(pointer(packed), 512, n, pointer(row))
        assert same_bits(row, expected[n])


@each_level
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8"])
def test_decode_row_is_exact_for_every_scale_of_8_bits(level, name):
    fmt = FORMATS[name]
    raw = random_rows(fmt, 255, 256)
    set_scales(fmt, raw, 256, lambda _, dtype, shape: extreme(dtype, shape[::-1], 1.0).T)
    packed, row = pack(fmt, raw, 255, 256), np.empty(256, np.float32)
    for n, expected in enumerate(decode(fmt, raw, 256)):
        getattr(build(HARNESS, level), f"decode_row_{name}")(pointer(packed), 256, n, pointer(row))
        assert same_bits(row, expected)


@each_level
def test_decode_row_is_exact_for_every_element_of_fp8(level):
    fmt = FORMATS["fp8"]
    elements = np.arange(256, dtype=np.uint8)
    elements[elements & 0x7F == 0x7F] = 0  # no numbers
    raw = np.append(elements, np.float32([1]).view(np.uint8))[None]
    packed, row = pack(fmt, raw, 1, 256), np.empty(256, np.float32)
    build(HARNESS, level).decode_row_fp8(pointer(packed), 256, 0, pointer(row))
    assert same_bits(row, decode(fmt, raw, 256)[0])


@each_level
def test_activations_are_quantised_to_nearest(level):
    x = activations(1, 160)
    x[0, :32] = 0
    x[0, 32:64] *= 1e-35  # counts as zero: its reciprocal would overflow
    x[0, 64:96] *= 1e30
    q, d = quantised(x)
    q[0, 1], d[0, 1] = 0, 0
    panel = np.empty(160 + 5 * 4 + 5 * 8, np.uint8)
    build(HARNESS, level).quantise_row(pointer(x), 160, pointer(panel))
    assert np.array_equal(panel[:160].view(np.int8), q.reshape(-1))
    assert same_bits(panel[160:180].view(np.float32), d[0])
    assert np.array_equal(panel[180:].view(np.int32), q.reshape(-1, 16).astype(np.int32).sum(axis=1))


@each_level
@pytest.mark.parametrize("k", [5, 16, 77, 1024])
def test_rms_norm_equals_numpy(level, k):
    x, weight, out = activations(1, k)[0], activations(1, k, seed=4)[0], np.empty(k, np.float32)
    build(HARNESS, level).rms_norm(pointer(x), pointer(weight), k, ctypes.c_float(1e-5), pointer(out))
    exact = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-5) * weight
    np.testing.assert_allclose(out, exact, rtol=2e-6)


@each_level
def test_exp2_is_within_two_ulp_and_exact_for_whole_numbers(level):
    x = np.concatenate([np.linspace(-130, 130, 4096), np.arange(-126, 126)]).astype(np.float32)
    x = np.resize(x, -(-len(x) // 16) * 16)
    out = np.empty_like(x)
    for i in range(0, len(x), 16):
        build(HARNESS, level).exp2_16(pointer(x[i:]), pointer(out[i:]))
    exact = np.exp2(np.clip(x, -126, 126).astype(np.float64))
    np.testing.assert_allclose(out, exact, rtol=2 * 2.0**-23)
    whole = x == np.rint(x)
    assert np.array_equal(out[whole], exact[whole].astype(np.float32))


@each_level
def test_fma_rounds_once(level):
    a = np.full(16, 1 + 2.0**-12, np.float32)  # a * a is half way between two floats: c decides
    c = np.float32([2.0**-80, -(2.0**-80), 0, np.inf, np.nan] + [2.0**-60] * 11)
    out = np.empty(16, np.float32)
    build(HARNESS, level).fma_16(pointer(a), pointer(a), pointer(c), pointer(out))
    low, high = np.float32(1 + 2.0**-11), np.float32(1 + 2.0**-11 + 2.0**-23)
    np.testing.assert_array_equal(out, np.float32([high, low, low, np.inf, np.nan] + [high] * 11))


def test_integers_survive_where_float_sums_would_not():
    """One block of q8_0 against one of activations is summed in integers: exact but for two roundings."""
    fmt = FORMATS["q8_0"]
    w = np.random.default_rng(5).integers(-127, 128, (32, 32)).astype(np.float32)
    w[:, 0] = 127  # makes the scale 1
    x = np.rint(activations(1, 32) * 40).clip(-127, 127)
    x[0, 0] = 127
    y = linear(LEVELS[0], fmt, pack(fmt, quantize(fmt, w), 32, 32), 32, x)
    assert np.array_equal(y, x @ w.T)
