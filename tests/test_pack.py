"""codegen/cpu/pack.py: packing loses nothing and puts each piece where its docstring says."""

from __future__ import annotations

import numpy as np
import pytest

from onelaunch.codegen.cpu import pack as pack_module
from onelaunch.codegen.cpu.pack import pack, unpack
from onelaunch.ir.formats import FORMATS, decode, packed_bytes, planes
from onelaunch.tests.test_formats import each_format, each_quantised, random_rows, same_bits


@each_format
@pytest.mark.parametrize(("n", "k"), [(1, 256), (32, 512), (70, 768)])
def test_unpack_returns_what_was_packed(fmt, n, k):
    raw = random_rows(fmt, n, k)
    packed = pack(fmt, raw, n, k)
    assert packed.nbytes == packed_bytes(fmt, n, k)
    assert same_bits(unpack(fmt, packed, n, k), decode(fmt, raw, k))


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "fp8", "fp8_128", "fp8_32", "mxfp8"])
def test_dense_rows_of_any_length_are_padded_with_zeros(name):
    fmt = FORMATS[name]
    raw = random_rows(fmt, 33, 77)
    packed = pack(fmt, raw, 33, 77)
    assert same_bits(unpack(fmt, packed, 33, 77), decode(fmt, raw, 77))
    padded = unpack(fmt, packed, 64, 96)
    assert not padded[33:].any()
    assert not padded[:, 77:].any()


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_dense_arrays_pack_like_their_bytes(name):
    fmt = FORMATS[name]
    raw = random_rows(fmt, 5, 64)
    assert np.array_equal(pack(fmt, raw.view(fmt.record), 5, 64), pack(fmt, raw, 5, 64))


@each_format
def test_chunks_do_not_show(fmt, monkeypatch):
    raw = random_rows(fmt, 200, 256)
    whole = pack(fmt, raw, 200, 256)
    monkeypatch.setattr(pack_module, "CHUNK", 1)
    assert np.array_equal(pack(fmt, raw, 200, 256), whole)


@each_quantised
def test_every_piece_is_whole_lines(fmt):
    assert fmt.packed_block_bytes % 64 == 0
    assert fmt.packed_lead_bytes % 64 == 0


def test_nibbles_and_scales_lie_where_the_kernel_reads_them():
    fmt = FORMATS["q4_0"]
    raw = random_rows(fmt, 64, 64)
    codes = planes(fmt, raw, 64).codes
    tiles = pack(fmt, raw, 64, 64).reshape(2, 2, 576)  # [tile, block, byte]
    for tile, block, half, j, r, i in [(0, 0, 0, 0, 0, 0), (1, 0, 1, 3, 15, 2), (0, 1, 1, 2, 7, 3)]:
        row, k = 32 * tile + 16 * half + r, 32 * block + 4 * j + i
        expected = codes[row, k] | codes[row, k + 16] << 4
        assert tiles[tile, block, 128 * j + 64 * half + 4 * r + i] == expected
    scales = tiles[:, :, 512:].view(np.float16)  # [tile, block, row]
    assert np.array_equal(scales.transpose(0, 2, 1).reshape(64, 2), planes(fmt, raw, 64).scales["d"])
