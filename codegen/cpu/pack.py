"""Pack weights into the tiles that codegen/cpu/templates/linear.h streams.

A matrix [N, K] becomes tiles of 32 rows by all of K, in row order; N is padded to 32 with zero rows, the K
of dense formats to 32 with zeros. Every piece is a multiple of 64 bytes. Rows of a half (16) are lanes.
Pieces lie in the order in which linear.h reads them (linear_formats.h says why).

    tile        K/32 blocks back to back; a lead precedes each 8 of formats with superblocks, each 2 of mxfp4
    lead        f16 d [, f16 dmin]; of mxfp4 the u8 d of the first block, then of the second
    block       codes, then 32 rows of each scale: f16 d [, f16 min], or u8 scale, u8 min (i8, i8 for q6_k)
    codes       [g][half][row][i] for k = 4g+i; 4 bits: g and g+4 share a byte, the low nibble is g
    5th bits    before the nibbles: [half][row][i], bit g
    bits 4-5    [half][row][i], two bits at 2(g%4): for g < 4 before the nibbles, for the others after
    dense       f32, f16: [K][32 rows]         bf16: [K/2][32 rows][2]

Permuting rows, or interleaving those of two matrices, is done on the raw rows beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...ir.formats import (
    BLOCK_K,
    TILE_ROWS,
    Array,
    Format,
    Planes,
    dense_view,
    dequantize,
    packed_bytes,
    planes,
)

UPPER_BYTES = 128  # of the bits past four that precede the nibbles
SIX_BITS_UPPER = 0, UPPER_BYTES + 512  # where bits 4-5 lie: of k 0-15, of k 16-31
CHUNK = 1 << 21  # weights packed at a time: the temporaries stay in cache


def pack(fmt: Format, raw: Array, n: int, k: int) -> Array:
    """Disk rows (u8 [N, row_bytes]; dense also [N, K]) to packed bytes u8 [packed_bytes]."""
    tiles = -(-n // TILE_ROWS)
    out = np.zeros((tiles, packed_bytes(fmt, n, k) // tiles), np.uint8)
    raw = raw.reshape(n, -1)
    step = max(1, CHUNK // (TILE_ROWS * k))
    for t in range(0, tiles, step):
        rows = raw[t * TILE_ROWS : (t + step) * TILE_ROWS]
        if fmt.dense:
            _pack_dense(fmt, dense_view(fmt, rows, k), out[t : t + step])
        else:
            _pack_planes(fmt, planes(fmt, rows, k), out[t : t + step])
    return out.reshape(-1)


def unpack(fmt: Format, packed: Array, n: int, k: int) -> Array:
    """Packed bytes back to f32 [N, K]."""
    tiles = packed.reshape(-(-n // TILE_ROWS), -1)
    values = _unpack_dense(fmt, tiles) if fmt.dense else dequantize(fmt, _unpack_planes(fmt, tiles, k))
    return values[:n, :k]


def _pack_dense(fmt: Format, x: Array, out: Array) -> None:
    """[rows, K] into tiles [T, bytes]: words of one k (a pair of k for bf16) become [word][row]."""
    rows, k = x.shape
    padded = np.zeros((len(out) * TILE_ROWS, -(-k // BLOCK_K) * BLOCK_K), fmt.record)
    padded[:rows, :k] = x
    words = padded.view(_word(fmt)).reshape(len(out), TILE_ROWS, -1)
    out.view(_word(fmt)).reshape(len(out), -1, TILE_ROWS)[...] = words.transpose(0, 2, 1)


def _unpack_dense(fmt: Format, tiles: Array) -> Array:
    words = tiles.view(_word(fmt)).reshape(len(tiles), -1, TILE_ROWS)
    rows = np.ascontiguousarray(words.transpose(0, 2, 1)).view(fmt.record)
    return rows.reshape(len(tiles) * TILE_ROWS, -1).astype(np.float32)


def _word(fmt: Format) -> str:
    return "u2" if fmt.name == "f16" else "u4"


class Scale(NamedTuple):
    """32 rows of one kind of scale: `per_block` of them at `offset` of each block, or of each lead."""

    field: str  # of Planes
    dtype: str
    offset: int
    per_block: int = 1
    in_lead: bool = False


def _scales(fmt: Format) -> Iterator[Scale]:
    """Where the scales of a format lie."""
    at = TILE_ROWS * BLOCK_K * fmt.bits // 8
    if fmt.scale == "super":
        per_block = BLOCK_K // fmt.block
        yield Scale("sub_d", "u1" if fmt.has_min else "i1", at, per_block)
        if fmt.has_min:
            yield Scale("sub_m", "u1", at + TILE_ROWS)
    if fmt.scale == "e8m0":
        yield Scale("d", "u1", 0, fmt.packed_blocks, in_lead=True)
        return
    at = 0 if fmt.scale == "super" else at
    yield Scale("d", "<f2", at, in_lead=fmt.scale == "super")
    if fmt.has_min:
        yield Scale("m", "<f2", at + 2 * TILE_ROWS, in_lead=fmt.scale == "super")


def _leads_and_blocks(fmt: Format, tiles: Array) -> tuple[Array, Array]:
    """Views of tiles [T, bytes]: leads [T, S, bytes] and blocks [T, S, blocks per lead, bytes]."""
    per, split = fmt.packed_blocks, fmt.packed_lead_bytes
    supers = tiles.reshape(len(tiles), -1, split + per * fmt.packed_block_bytes)
    return supers[:, :, :split], supers[:, :, split:].reshape(*supers.shape[:2], per, -1)


def _scale_view(scale: Scale, leads: Array, blocks: Array) -> Array:
    """The bytes of one kind of scale as [T, S * blocks, per_block, 32] (or [T, S, 1, 32] in the lead)."""
    home = leads[:, :, None] if scale.in_lead else blocks
    size = np.dtype(scale.dtype).itemsize * TILE_ROWS * scale.per_block
    field = home[..., scale.offset : scale.offset + size].view(scale.dtype)
    return field.reshape(*field.shape[:3], scale.per_block, TILE_ROWS)


def _pack_planes(fmt: Format, p: Planes, out: Array) -> None:
    leads, blocks = _leads_and_blocks(fmt, out)
    _put_codes(fmt, _pad_rows(p.codes, len(out)), blocks)
    for scale in _scales(fmt):
        to = _scale_view(scale, leads, blocks)
        rows = _pad_rows(getattr(p, scale.field), len(out))
        to[...] = rows.reshape(len(out), TILE_ROWS, *to.shape[1:4]).transpose(0, 2, 3, 4, 1)


def _unpack_planes(fmt: Format, tiles: Array, k: int) -> Planes:
    leads, blocks = _leads_and_blocks(fmt, tiles)
    fields = {"codes": _get_codes(fmt, blocks, k)}
    for scale in _scales(fmt):
        stored = _scale_view(scale, leads, blocks)
        fields[scale.field] = stored.transpose(0, 4, 1, 2, 3).reshape(len(tiles) * TILE_ROWS, -1)
    return Planes(**fields)


def _pad_rows(x: Array, tiles: int) -> Array:
    missing = tiles * TILE_ROWS - len(x)
    return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x


def _put_codes(fmt: Format, codes: Array, blocks: Array) -> None:
    """Codes u8 [32 T, K] into blocks. Four k travel as one u32: shifts of small codes never cross bytes."""
    t, s, per, _ = blocks.shape
    quads = np.ascontiguousarray(codes).view("u4").reshape(t, 2, 16, s, per, 8)  # tile half row super block g
    if fmt.bits == 8:
        _plane(blocks, 0, 8)[...] = quads.transpose(0, 3, 4, 5, 1, 2)
        return
    low = quads & np.uint32(0x0F0F0F0F)
    nibbles = UPPER_BYTES if fmt.bits > 4 else 0
    _plane(blocks, nibbles, 4)[...] = (low[..., :4] | low[..., 4:] << 4).transpose(0, 3, 4, 5, 1, 2)
    high = quads >> 4 & np.uint32(0x03030303)
    if fmt.bits == 5:
        fifth = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint32), axis=-1, keepdims=True)
        _plane(blocks, 0, 1)[...] = fifth.transpose(0, 3, 4, 5, 1, 2)
    if fmt.bits == 6:
        parts = high.reshape(t, 2, 16, s, per, 2, 4) << np.arange(0, 8, 2, dtype=np.uint32)
        upper = np.bitwise_or.reduce(parts, axis=-1).transpose(0, 3, 4, 5, 1, 2)
        for g, at in enumerate(SIX_BITS_UPPER):
            _plane(blocks, at, 1)[...] = upper[:, :, :, g : g + 1]


def _get_codes(fmt: Format, blocks: Array, k: int) -> Array:
    t = len(blocks)

    def rows(plane: Array) -> Array:  # back to [T, half, row, S, per, g]
        return plane.transpose(0, 4, 5, 1, 2, 3)

    if fmt.bits == 8:
        quads = rows(_plane(blocks, 0, 8))
    else:
        pairs = rows(_plane(blocks, UPPER_BYTES if fmt.bits > 4 else 0, 4))
        quads = np.concatenate([pairs, pairs >> 4], axis=-1) & np.uint32(0x0F0F0F0F)
    if fmt.bits == 5:
        fifth = rows(_plane(blocks, 0, 1)) >> np.arange(8, dtype=np.uint32)
        quads = quads | (fifth & np.uint32(0x01010101)) << 4
    if fmt.bits == 6:
        upper = [rows(_plane(blocks, at, 1)) for at in SIX_BITS_UPPER]
        parts = np.concatenate(upper, axis=-1)[..., None] >> np.arange(0, 8, 2, dtype=np.uint32)
        quads = quads | (parts & np.uint32(0x03030303)).reshape(quads.shape) << 4
    return np.ascontiguousarray(quads).view(np.uint8).reshape(t * TILE_ROWS, k)


def _plane(blocks: Array, offset: int, groups: int) -> Array:
    """u32 [T, S, per, groups, half, 16 rows] at `offset` of each block."""
    field = blocks[..., offset : offset + 128 * groups].view("u4")
    return field.reshape(*field.shape[:3], groups, 2, 16)
