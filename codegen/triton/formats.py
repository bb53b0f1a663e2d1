"""How a packed weight tile lies in memory, as the Triton templates read it.

The packed file is the CPU's (codegen/cpu/pack.py): tiles of 32 output rows by all of K, rows beside each
other. The main loops read it by planes of 32-bit words, four neighbouring words to a thread; everything else
asks for single codes. Both views of a format are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import CompileError
from ...ir.formats import BLOCK_K, FORMATS, Format
from ..cpu.pack import SIX_BITS_UPPER, UPPER_BYTES

WORD = 4
HALF_WORDS = 16  # a row each
# Of integer codes in a chunk of the weight stream: a quad of rows of a block per thread. Twice as many were 7 % slower
# on an H200; two chunks must fit into 100 KB beside what Triton takes, so formats of more bytes have half as many.
CHUNK_BLOCKS, CHUNK_BYTES = 32, 28 << 10
CHUNK_GROUPS = 4  # of lines, in a dense format's chunk: 16 bytes of each per thread
PANEL_WORDS = 12  # of 32 int8 activations: 8 words of codes, scale, sums of each 16 codes, scale times sum


@dataclass(frozen=True)
class Plane:
    """Words of one kind in a block: row r of half h is word `first + h * HALF_WORDS + r % 16`."""

    name: str
    first: int


@dataclass(frozen=True)
class Scale:
    """32 scales of one kind: elements of `dtype` (16 or 8 bits) from element `first` of the block or the lead."""

    name: str
    dtype: str  # a Triton type
    first: int
    in_lead: bool = False


@dataclass(frozen=True)
class Reader:
    """The Triton view of an integer format: scale * (code - zero) + minimum.

    upper:   where the bits past four of each group lie: plane, shift to the left, mask
    scale:   expression of the scale of each part of a block (two parts where 16 k share one), of `scales`
    minimum: expression of what is added, '' = nothing
    single:  expression of one code, of `code` at `code_byte` and, where there is one, `extra` at `extra_byte`;
             templates of {k} in the block and {r} in the half
    """

    name: str
    block_words: int
    planes: tuple[Plane, ...]
    upper: tuple[tuple[str, int, str], ...]
    scales: tuple[Scale, ...]
    scale: tuple[str, ...]
    minimum: str
    zero: int
    blocks: int  # of a superblock
    lead_words: int
    lead_step: int  # words of the lead from one block's scales to the next's; 0: they share them
    code_byte: str
    extra_byte: str
    single: str
    table: tuple[int, ...] = ()  # what codes mean, halved; `single` then gives it plus `zero`

    @property
    def super_words(self) -> int:
        return self.blocks * self.block_words + self.lead_words

    def block_at(self, n: str) -> str:
        """The word of a tile at which block `n`, a simple expression, begins."""
        if self.blocks == 1:
            return f"{n} * {self.block_words}"
        lead = f"{n} // {self.blocks} * {self.super_words} + {self.lead_words}"
        return f"{lead} + {n} % {self.blocks} * {self.block_words}"

    def lead_at(self, n: str) -> str:
        """The word at which what the lead has for block `n` begins."""
        own = f" + {n} % {self.blocks} * {self.lead_step}" if self.lead_step else ""
        return f"{n} // {self.blocks} * {self.super_words}{own}"

    @property
    def chunk_blocks(self) -> int:
        whole = WORD * CHUNK_BLOCKS // self.blocks * self.super_words
        return CHUNK_BLOCKS if whole <= CHUNK_BYTES else CHUNK_BLOCKS // 2


@dataclass(frozen=True)
class DenseReader:
    """The Triton view of a dense format: lines of one k, or of a pair of k, for 32 rows.

    words: 32-bit words of a line          line_k: k of a line
    lines: lines that the threads of a CTA read at once, each four words of one
    """

    name: str
    words: int
    line_k: int
    lines: int
    element: str  # the Triton type of an element
    place: str  # element of a tile: a template of {k} and {row}

    @property
    def block_words(self) -> int:
        """Words of 32 k of a tile."""
        return BLOCK_K // self.line_k * self.words

    @property
    def chunk_blocks(self) -> int:
        return CHUNK_GROUPS * self.lines * self.line_k // BLOCK_K


def _upper(fmt: Format) -> tuple[tuple[str, int, str], ...]:
    """For each group of 4 k: the plane with the bits past four, how far left they move, and the mask then."""
    if fmt.bits == 5:
        return tuple(("h0", 4 - g, "0x10101010") for g in range(8))
    if fmt.bits == 6:
        return tuple((f"h{g // 4}", 4 - 2 * (g % 4), "0x30303030") for g in range(8))
    return ()


def _nibbles(fmt: Format) -> int:
    """The byte of a block at which the low four bits of its codes begin."""
    return UPPER_BYTES if fmt.bits in (5, 6) else 0


def _upper_at(fmt: Format) -> tuple[int, ...]:
    """The bytes at which planes of the bits past four begin."""
    return {5: (0,), 6: SIX_BITS_UPPER}.get(fmt.bits, ())


def _planes(fmt: Format) -> tuple[Plane, ...]:
    lines, at = 8 if fmt.bits == 8 else 4, _nibbles(fmt) // WORD
    codes = [Plane(f"w{j}", at + 2 * HALF_WORDS * j) for j in range(lines)]
    upper = [Plane(f"h{i}", at // WORD) for i, at in enumerate(_upper_at(fmt))]
    return (*codes, *upper)


def _single(fmt: Format) -> tuple[str, str, str]:
    """Where one code lies: its byte, the byte of its upper bits, and how the two make the code."""
    if fmt.bits == 8:
        return "{k} // 4 * 128 + half * 64 + {r} * 4 + {k} % 4", "", "code"
    byte = "{k} // 4 % 4 * 128 + half * 64 + {r} * 4 + {k} % 4"
    byte += f" + {_nibbles(fmt)}" if _nibbles(fmt) else ""
    low = "((code >> ({k} // 16 * 4)) & 15)"
    if fmt.bits == 5:
        return byte, "half * 64 + {r} * 4 + {k} % 4", low + " | (((extra >> ({k} // 4)) & 1) << 4)"
    if fmt.bits == 6:
        upper = f"{{k}} // 16 * {SIX_BITS_UPPER[1]} + half * 64 + {{r}} * 4 + {{k}} % 4"
        return byte, upper, low + " | (((extra >> ({k} // 4 % 4 * 2)) & 3) << 4)"
    return byte, "", f"e2m1({low})" if fmt.table else low


def _scales(fmt: Format) -> tuple[tuple[Scale, ...], tuple[str, ...], str]:
    """What leads a superblock or follows the codes, and the scale of each part and the minimum that they make."""
    at = 32 * BLOCK_K * fmt.bits // 8
    if fmt.scale == "f16":
        d = Scale("d", "tl.float16", at // 2)
        if fmt.has_min:
            return (d, Scale("m", "tl.float16", at // 2 + 32)), ("d.to(tl.float32)",), "m.to(tl.float32)"
        return (d,), ("d.to(tl.float32)",), ""
    if fmt.scale == "e8m0":
        return (Scale("d", "tl.uint8", 0, in_lead=True),), ("half_e8m0(d)",), ""
    lead = Scale("d", "tl.float16", 0, in_lead=True)
    if fmt.has_min:
        sub = Scale("sub_d", "tl.uint8", at), Scale("sub_m", "tl.uint8", at + 32)
        scale, low = "sub_d.to(tl.float32) * d.to(tl.float32)", "-(sub_m.to(tl.float32) * m.to(tl.float32))"
        return (*sub, lead, Scale("m", "tl.float16", 32, in_lead=True)), (scale,), low
    halves = Scale("sub_0", "tl.int8", at), Scale("sub_1", "tl.int8", at + 32)
    return (*halves, lead), tuple(f"sub_{p}.to(tl.float32) * d.to(tl.float32)" for p in (0, 1)), ""


def _integer(fmt: Format) -> Reader:
    scales, scale, minimum = _scales(fmt)
    lead = fmt.packed_lead_bytes // WORD
    step = lead // fmt.packed_blocks if fmt.scale == "e8m0" else 0
    return Reader(
        fmt.name, fmt.packed_block_bytes // WORD, _planes(fmt), _upper(fmt), scales, scale, minimum,
        max(fmt.zero, *fmt.table, 0), fmt.packed_blocks, lead, step, *_single(fmt), table=fmt.table,
    )  # fmt: skip


_DENSE = {
    "f32": DenseReader("f32", 32, 1, 32, "tl.float32", "{k} * 32 + {row}"),
    "bf16": DenseReader("bf16", 32, 2, 32, "tl.bfloat16", "{k} // 2 * 64 + {row} * 2 + {k} % 2"),
    "f16": DenseReader("f16", 16, 1, 64, "tl.float16", "{k} * 32 + {row}"),
}
READERS: dict[str, Reader | DenseReader] = _DENSE | {f.name: _integer(f) for f in FORMATS.values() if not f.dense}


def reader(name: str) -> Reader | DenseReader:
    """The reader of a weight format; CompileError names a format that has none."""
    if name not in READERS:
        raise CompileError(
            f"weight format `{name}` is not supported on GPU targets",
            hint=f"supported are {', '.join(READERS)}; or recompile an unquantised checkpoint with --quant",
        )
    return READERS[name]


def tile_words(fmt: Reader | DenseReader, blocks: int) -> int:
    """Words of one tile of 32 rows by `blocks` times 32 k."""
    if isinstance(fmt, DenseReader):
        return blocks * fmt.block_words
    return blocks // fmt.blocks * fmt.super_words
