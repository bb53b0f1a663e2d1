"""Pack weights into the tiles that codegen/cpu/templates/linear.h streams.

A matrix [N, K] becomes tiles of 32 rows by all of K, in row order; N is padded to 32 with zero rows, the K
of dense formats to 32 with zeros. Every piece is a multiple of 64 bytes. Rows of a half (16) are lanes.
Pieces lie in the order in which linear.h reads them (linear_formats.h says why).

    tile        K/32 blocks back to back; a lead precedes each 8 of formats with superblocks, each 2 of mxfp4
    lead        f16 d [, f16 dmin]; before them what is no whole line of a block: u8 d of mxfp4, i8 scales of iq4_xs
    block       codes, then 32 rows of each scale: f16 d [, f16 min], or u8 scale, u8 min (i8, i8 for q6_k)
    trailer     at the end of a tile, of formats that have one: [scale][32 rows]
    codes       [g][half][row][i] for k = 4g+i; 4 bits: g and g+4 share a byte, the low nibble is g
    1 bit       [half][row][i], bit g          2 bits      [g/4][half][row][i], two bits at 2(g%4)
    dense       f32, f16: [K][32 rows]         bf16: [K/2][32 rows][2], fp8: 4, nf4: [K/8][32 rows], 4 bytes

A code of 3, 5 or 6 bits is in two planes (`PLANES` says where): what is needed first is first.

Permuting rows, or interleaving those of two matrices, is done on the raw rows beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...ir.format import DTYPES, Level, Place
from ...ir.formats import (
    BLOCK_K,
    TILE_ROWS,
    Array,
    Format,
    Planes,
    decode,
    dense_view,
    dequantize,
    packed_bytes,
    planes,
    trailer_of,
    values_of,
)

CHUNK = 1 << 21  # weights packed at a time: the temporaries stay in cache


@dataclass(frozen=True)
class Plane:
    """`width` bits of every code, from bit `low` on: lines of 128 bytes for 32 rows, at these bytes of a block.

    A group is 4 k. Of nibbles, groups g and g + 4 share a line; of fewer bits, neighbouring groups do.
    """

    width: int
    low: int
    at: tuple[int, ...]

    @property
    def split(self) -> tuple[int, int]:
        """How the 8 groups are arranged: lines and what shares them, in one order or the other."""
        return (2, 4) if self.width == 4 else (self.width, 8 // self.width)

    @property
    def axis(self) -> int:
        """Of those that share a line."""
        return -2 if self.width == 4 else -1

    @property
    def shifts(self) -> Array:
        shared = np.arange(8 // self.width, dtype=np.uint32) * np.uint32(self.width)
        return shared[:, None] if self.width == 4 else shared

    @property
    def mask(self) -> np.uint32:
        return np.uint32(0x01010101 * ((1 << self.width) - 1))


def _lines(first: int, count: int) -> tuple[int, ...]:
    return tuple(first + 4 * TILE_ROWS * i for i in range(count))


PLANES = {
    2: (Plane(2, 0, _lines(0, 2)),),
    3: (Plane(1, 2, (0,)), Plane(2, 0, _lines(128, 2))),
    4: (Plane(4, 0, _lines(0, 4)),),
    5: (Plane(1, 4, (0,)), Plane(4, 0, _lines(128, 4))),
    6: (Plane(2, 4, (0, 640)), Plane(4, 0, _lines(128, 4))),
    8: (Plane(8, 0, _lines(0, 8)),),
}


def pack(fmt: Format, raw: Array, n: int, k: int) -> Array:
    """Disk rows (u8 [N, row_bytes]; dense also [N, K]) to packed bytes u8 [packed_bytes]."""
    tiles = -(-n // TILE_ROWS)
    out = np.zeros((tiles, packed_bytes(fmt, n, k) // tiles), np.uint8)
    raw = raw.reshape(n, -1)
    step = max(1, CHUNK // (TILE_ROWS * k))
    for t in range(0, tiles, step):
        rows = raw[t * TILE_ROWS : (t + step) * TILE_ROWS]
        if fmt.dense:
            _pack_dense(fmt, rows, out[t : t + step], k)
        else:
            _pack_planes(fmt, planes(fmt, rows, k), out[t : t + step], k)
    return out.reshape(-1)


def unpack(fmt: Format, packed: Array, n: int, k: int) -> Array:
    """Packed bytes back to f32 [N, K]."""
    tiles = packed.reshape(-(-n // TILE_ROWS), -1)
    values = _unpack_dense(fmt, tiles, k) if fmt.dense else dequantize(fmt, _unpack_planes(fmt, tiles, k))
    return values[:n, :k]


def _pack_dense(fmt: Format, raw: Array, out: Array, k: int) -> None:
    """Rows into tiles [T, bytes]: words of as many k as fit become [word][row]."""
    x = dense_view(fmt, raw, k)
    body, trailer = _body_and_trailer(fmt, out, k)
    padded = np.zeros((len(out) * TILE_ROWS, -(-k // BLOCK_K) * BLOCK_K // fmt.disk_block), fmt.record)
    padded[: len(x), : x.shape[1]] = x
    words = padded.view(_word(fmt)).reshape(len(out), TILE_ROWS, -1)
    body.view(_word(fmt)).reshape(len(out), -1, TILE_ROWS)[...] = words.transpose(0, 2, 1)
    if fmt.trailer:
        _put_trailer(fmt.trailer, trailer_of(fmt, raw, k), trailer)


def _unpack_dense(fmt: Format, tiles: Array, k: int) -> Array:
    body, trailer = _body_and_trailer(fmt, tiles, k)
    words = np.ascontiguousarray(body).view(_word(fmt)).reshape(len(tiles), -1, TILE_ROWS)
    rows = np.ascontiguousarray(words.transpose(0, 2, 1)).view(fmt.record).reshape(len(tiles) * TILE_ROWS, -1)
    if fmt.trailer is None:
        return values_of(fmt, rows)
    body_rows = rows.view(np.uint8).reshape(len(rows), -1)[:, : fmt.body_bytes(k)]
    return decode(fmt, np.hstack([body_rows, np.ascontiguousarray(_get_trailer(fmt, trailer, k)).view(np.uint8)]), k)


def _word(fmt: Format) -> str:
    return "u2" if fmt.name == "f16" else "u4"


def _leads_and_blocks(fmt: Format, tiles: Array) -> tuple[Array, Array]:
    """Views of tiles [T, bytes]: leads [T, S, bytes] and blocks [T, S, blocks per lead, bytes]."""
    per, split = fmt.packed_blocks, fmt.packed_lead_bytes
    supers = tiles.reshape(len(tiles), -1, split + per * fmt.packed_block_bytes)
    return supers[:, :, :split], supers[:, :, split:].reshape(*supers.shape[:2], per, -1)


def _scale_view(place: Place, leads: Array, blocks: Array) -> Array:
    """The bytes of one kind of scale as [T, S, per record, count, 32] (or [T, S, 1, 1, 32], shared in the lead)."""
    dtype = DTYPES[place.level.dtype]
    size, per = place.count * place.level.bytes, blocks.shape[2] if place.step else 1
    home = leads[:, :, None] if place.in_lead else blocks
    field = home[..., place.offset : place.offset + size * per].view(dtype)
    return field.reshape(*field.shape[:2], per if place.in_lead else -1, place.count, TILE_ROWS)


def _pack_planes(fmt: Format, p: Planes, out: Array, k: int) -> None:
    body, trailer = _body_and_trailer(fmt, out, k)
    leads, blocks = _leads_and_blocks(fmt, body)
    _put_codes(fmt, _pad_rows(p.codes, len(out)), blocks)
    for place in fmt.places:
        to = _scale_view(place, leads, blocks)
        rows = _pad_rows(p.scales[place.level.field], len(out))
        to[...] = rows.reshape(len(out), TILE_ROWS, *to.shape[1:4]).transpose(0, 2, 3, 4, 1)
    if fmt.trailer:
        _put_trailer(fmt.trailer, p.scales[fmt.trailer.field], trailer)


def _unpack_planes(fmt: Format, tiles: Array, k: int) -> Planes:
    body, trailer = _body_and_trailer(fmt, tiles, k)
    leads, blocks = _leads_and_blocks(fmt, body)
    scales = {}
    for place in fmt.places:
        stored = _scale_view(place, leads, blocks)
        scales[place.level.field] = stored.transpose(0, 4, 1, 2, 3).reshape(len(tiles) * TILE_ROWS, -1)
    if fmt.trailer:
        scales[fmt.trailer.field] = _get_trailer(fmt, trailer, k)
    return Planes(_get_codes(fmt, blocks, k), scales)


def _body_and_trailer(fmt: Format, tiles: Array, k: int) -> tuple[Array, Array]:
    split = tiles.shape[1] - fmt.packed_trailer_bytes(k)
    return tiles[:, :split], tiles[:, split:]


def _put_trailer(level: Level, scales: Array, out: Array) -> None:
    """Scales [rows, count] into [T, bytes] as [count][32 rows]."""
    rows = np.ascontiguousarray(_pad_rows(scales, len(out)).reshape(len(out), TILE_ROWS, -1).transpose(0, 2, 1))
    used = rows.shape[1] * level.bytes
    out[:, :used] = rows.view(np.uint8).reshape(len(out), used)


def _get_trailer(fmt: Format, trailer: Array, k: int) -> Array:
    assert fmt.trailer is not None
    used = fmt.trailer_count(k) * fmt.trailer.bytes
    rows = np.ascontiguousarray(trailer[:, :used]).view(DTYPES[fmt.trailer.dtype]).reshape(len(trailer), -1, TILE_ROWS)
    return rows.transpose(0, 2, 1).reshape(len(trailer) * TILE_ROWS, -1)


def _pad_rows(x: Array, tiles: int) -> Array:
    missing = tiles * TILE_ROWS - len(x)
    return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x


def _put_codes(fmt: Format, codes: Array, blocks: Array) -> None:
    """Codes u8 [32 T, K] into blocks. Four k travel as one u32: shifts of small codes never cross bytes."""
    t, s, per, _ = blocks.shape
    quads = np.ascontiguousarray(codes).view("u4").reshape(t, 2, 16, s, per, 8)  # tile half row super block g
    for plane in PLANES[fmt.bits]:
        part = (quads >> plane.low & plane.mask).reshape(*quads.shape[:5], *plane.split) << plane.shifts
        whole = np.bitwise_or.reduce(part, axis=plane.axis)
        for line, at in enumerate(plane.at):
            _line(blocks, at)[...] = whole[..., line].transpose(0, 3, 4, 1, 2)


def _get_codes(fmt: Format, blocks: Array, k: int) -> Array:
    quads: Array = np.uint32(0)  # type: ignore[assignment]
    for plane in PLANES[fmt.bits]:
        lines = np.stack([_line(blocks, at).transpose(0, 3, 4, 1, 2) for at in plane.at], axis=-1)
        part = np.expand_dims(lines, plane.axis) >> plane.shifts & plane.mask
        quads = quads | part.reshape(*lines.shape[:5], 8) << plane.low
    return np.ascontiguousarray(quads).view(np.uint8).reshape(len(blocks) * TILE_ROWS, k)


def _line(blocks: Array, at: int) -> Array:
    """u32 [T, S, per, half, 16 rows] at byte `at` of each block."""
    field = blocks[..., at : at + 4 * TILE_ROWS].view("u4")
    return field.reshape(*field.shape[:3], 2, 16)
