"""What a weight format is: its bits on disk and its bits packed, as data.

Quantised formats are one sentence, which `formats.dequantize` spells out:

    weight = scale * (code - zero) [+ min] [* trailer]

Where each piece of a packed tile lies follows from the widths alone (`places`); codegen/cpu/pack.py writes it, the
two targets read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import ml_dtypes
import numpy as np

from .errors import expect

Array = np.ndarray

TILE_ROWS = 32  # packed layouts pad N to this
BLOCK_K = 32  # and K, for dense formats, to this
LINE = 64  # every piece of a packed tile is whole lines
ROW = 0  # `every` of a level with one scale per row

DTYPES: dict[str, np.dtype] = {
    "f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype("<f4"), "u8": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "e8m0": np.dtype("u1"),  # 2^(e - 127)
    "e4m3": np.dtype("u1"),  # a float of 8 bits; as a scale never negative
    "u4u4": np.dtype("u1"),  # a scale in the low nibble, what multiplies the min in the high one
}  # fmt: skip


@dataclass(frozen=True)
class Level:
    """Scales of one kind: `d`, `m`; `sub_d`, `sub_m`, `sub` (both), whole numbers that multiply them; `z`, zero points.

    every: how many weights of a row one of them serves.
    """

    field: str
    dtype: str
    every: int

    @property
    def bytes(self) -> int:
        """Of 32 rows of one."""
        return TILE_ROWS * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Place:
    """Where a level lies: `count` times 32 rows at byte `offset` of each block, or of the lead of a run of blocks.

    step: bytes of the lead from one block's to the next's; 0: the blocks share them.
    """

    level: Level
    count: int
    offset: int
    in_lead: bool = False
    step: int = 0


@dataclass(frozen=True)
class Format:
    """How one weight matrix is stored. Quantised formats have `codes`, dense ones (floats of any width) do not.

    record:  numpy type of `disk_block` weights on disk; a row is K / disk_block of them, then its trailer
    block:   weights that share a scale: 16 or 32
    table:   what codes mean in place of code - zero, in units of `unit`
    floats:  what codes of a dense format mean, if its elements are codes
    levels:  the scales in the blocks; `scales` gives them, of records (as they are named if it is not there)
    trailer: scales that follow a row, and in a packed tile its blocks
    gguf:    type id in a GGUF file, -1 = none
    """

    name: str
    bits: int
    record: np.dtype
    gguf: int = -1
    disk_block: int = 1
    block: int = 1
    zero: int = 0
    levels: tuple[Level, ...] = ()
    codes: Callable[[Array], Array] | None = None
    scales: Callable[[Array], dict[str, Array]] | None = None
    table: tuple[int, ...] = ()
    unit: float = 1.0
    floats: tuple[float, ...] = ()
    trailer: Level | None = None

    @property
    def dense(self) -> bool:
        return self.codes is None

    @property
    def panel(self) -> str:
        """The form of activation that it is multiplied with."""
        return "bf16" if self.name == "bf16" else "f32" if self.dense else "q8"

    def level(self, field: str) -> Level | None:
        return next((level for level in self.levels if level.field == field), None)

    @property
    def has_min(self) -> bool:
        return any(level.field in ("m", "z") for level in self.levels)

    @property
    def disk_bits(self) -> float:
        """Bits per weight on disk, scales of whole rows left out."""
        return 8 * self.record.itemsize / self.disk_block + self._trailer_bits

    @property
    def _trailer_bits(self) -> float:
        trailer = self.trailer
        return 8 * DTYPES[trailer.dtype].itemsize / trailer.every if trailer and trailer.every else 0.0

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Every level's place. What is no whole line of a block by itself goes to the lead, unless two make one."""
        own = [level for level in self.levels if level.every <= BLOCK_K]
        odd = [level for level in own if BLOCK_K // level.every * level.bytes % LINE]
        if sum(level.bytes for level in odd) % LINE == 0:
            odd = []
        run = self.packed_blocks
        at = accumulate((BLOCK_K // v.every * v.bytes for v in own if v not in odd), initial=self._code_bytes)
        found = [Place(v, BLOCK_K // v.every, o) for v, o in zip((v for v in own if v not in odd), at, strict=False)]
        lead = odd + [level for level in self.levels if level.every > BLOCK_K]
        at = accumulate((v.bytes * (run if v in odd else 1) for v in lead), initial=0)
        found += [Place(v, 1, o, True, v.bytes if v in odd else 0) for v, o in zip(lead, at, strict=False)]
        return tuple(found)

    @property
    def _code_bytes(self) -> int:
        return TILE_ROWS * BLOCK_K * self.bits // 8

    @property
    def packed_block_bytes(self) -> int:
        """Bytes of a packed block of 32 rows x 32 k: codes, then scales."""
        return self._code_bytes + sum(p.count * p.level.bytes for p in self.places if not p.in_lead)

    @cached_property
    def packed_blocks(self) -> int:
        """Packed blocks that share a lead: a superblock, or as many as fill a line with their scales."""
        widest = max((level.every for level in self.levels), default=0)
        if widest > BLOCK_K:
            return widest // BLOCK_K
        loose = sum(BLOCK_K // v.every * v.bytes for v in self.levels) % LINE
        return LINE // loose if loose else 1

    @property
    def packed_lead_bytes(self) -> int:
        """Bytes that precede `packed_blocks` blocks."""
        return sum(p.level.bytes * (self.packed_blocks if p.step else 1) for p in self.places if p.in_lead)

    @property
    def packed_bits(self) -> float:
        """Bits per weight when packed, scales of whole rows left out."""
        run = self.packed_block_bytes + self.packed_lead_bytes / self.packed_blocks
        return 8 * run / (TILE_ROWS * BLOCK_K) + self._trailer_bits

    def trailer_count(self, k: int) -> int:
        """Scales that follow a row of k weights."""
        if self.trailer is None:
            return 0
        return -(-k // self.trailer.every) if self.trailer.every else 1

    def packed_trailer_bytes(self, k: int) -> int:
        """Bytes at the end of a packed tile: [scale][32 rows], whole lines."""
        return -(-self.trailer_count(k) * self.trailer.bytes // LINE) * LINE if self.trailer else 0

    def body_bytes(self, k: int) -> int:
        """Bytes of a row of k weights on disk before its trailer."""
        expect(
            k % self.disk_block == 0,
            f"{self.name}: expected K to be a multiple of {self.disk_block}, got {k}",
            hint="keep this matrix in `f16` or `bf16`",
        )
        return k // self.disk_block * self.record.itemsize

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights on disk."""
        trailer = DTYPES[self.trailer.dtype].itemsize if self.trailer else 0
        return self.body_bytes(k) + self.trailer_count(k) * trailer
