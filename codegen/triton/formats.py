"""How a packed weight tile lies in memory, as the Triton templates read it.

The packed file is the CPU's (codegen/cpu/pack.py): tiles of 32 output rows by all of K, rows beside each
other. The main loops read it by planes of 32-bit words, four neighbouring words to a thread; everything else
asks for single codes. Both views of a format are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import CompileError
from ...ir.format import Level
from ...ir.formats import BLOCK_K, FORMATS, TILE_ROWS, Format, packed_bytes
from ...ir.records import TABLES
from ..cpu.pack import PLANES

WORD = 4
HALF_WORDS = 16  # a row each
# Of integer codes in a chunk of the weight stream: a quad of rows of a block per thread. Twice as many were 7 % slower
# on an H200; two chunks must fit into 100 KB beside what Triton takes, so formats of more bytes have half as many.
CHUNK_BYTES = 28 << 10
LEAST_BLOCKS = 16  # a superblock of 256 k twice
CHUNK_GROUPS = 4  # of lines, in a dense format's chunk: 16 bytes of each per thread
PANEL_WORDS = 12  # of 32 int8 activations: 8 words of codes, scale, sums of each 16 codes, scale times sum


@dataclass(frozen=True)
class Plane:
    """Words of one kind in a block: row r of half h is word `first + h * HALF_WORDS + r % 16`."""

    name: str
    first: int


@dataclass(frozen=True)
class Scale:
    """32 scales of one kind: elements of `dtype` (16 or 8 bits) from element `first` of `home`."""

    name: str
    dtype: str  # a Triton type
    first: int
    home: str = "at"  # the block, or "lead", or "own": what a block has in the lead for itself


@dataclass(frozen=True)
class Reader:
    """The Triton view of an integer format: scale * (code - zero) + minimum.

    upper:   where the upper bits of each group lie, if not with the others: plane, shift to the left, mask
    width:   bits of a code that are in its main plane
    scale:   expression of the scale of each part of a block (two parts where 16 k share one), of `scales`
    minimum: expression of what is added, '' = nothing
    single:  expression of one code, of `code` at `code_byte` and, where there is one, `extra` at `extra_byte`;
             templates of {k} in the block and {r} in the half
    """

    name: str
    block_words: int
    planes: tuple[Plane, ...]
    upper: tuple[tuple[str, int, str], ...]
    width: int
    scales: tuple[Scale, ...]
    scale: tuple[str, ...]
    minimum: str
    zero: int
    blocks: int  # of a superblock
    lead_words: int
    own_step: int  # words of the lead from what one block has for itself to the next's; 0: they have nothing
    row_scale: bool  # a tile ends with 32 float32 that multiply its rows
    code_byte: str
    extra_byte: str
    single: str
    table: tuple[int, ...] = ()  # what codes mean; `single` then gives it plus `zero`

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
        """The word at which the lead of block `n` begins."""
        return f"{n} // {self.blocks} * {self.super_words}"

    def own_at(self, n: str) -> str:
        """How many words after that block `n` has scales for itself."""
        return f"{n} % {self.blocks} * {self.own_step}"

    def chunk_blocks(self, most: int) -> int:
        whole = WORD * most // self.blocks * self.super_words
        return most if whole <= CHUNK_BYTES or most <= LEAST_BLOCKS else most // 2


@dataclass(frozen=True)
class Trailer:
    """Scales at the end of a tile, [scale][32 rows]: templates of {at}, the tile's words from there on, {k} and {row}.

    every: k that share one, 0: the whole row      words: of a tile of `blocks` times 32 k, an expression
    place: where one lies, typed                   value: its float32
    """

    every: int
    words: str
    place: str
    value: str = "{}"

    @property
    def is_bytes(self) -> bool:
        return "uint8" in self.place


@dataclass(frozen=True)
class DenseReader:
    """The Triton view of a dense format: lines of a few k for 32 rows.

    words: 32-bit words of a line          line_k: k of a line
    lines: lines that the threads of a CTA read at once, each four words of one
    """

    name: str
    words: int
    line_k: int
    lines: int
    element: str  # the Triton type of an element
    place: str  # element of a tile: a template of {k} and {row}
    value: str = "{}.to(tl.float32)"  # of a loaded element
    trailer: Trailer | None = None

    @property
    def panel(self) -> str:
        """The form of activation that it is multiplied with."""
        return "bf16" if self.name == "bf16" else "f32"

    @property
    def panel_words(self) -> int:
        """Words of activations to a line."""
        return self.line_k // 2 if self.panel == "bf16" else self.line_k

    @property
    def scale(self) -> Trailer | None:
        """Scales that change within a row."""
        return self.trailer if self.trailer and self.trailer.every else None

    @property
    def block_words(self) -> int:
        """Words of 32 k of a tile."""
        return BLOCK_K // self.line_k * self.words

    def chunk_blocks(self, most: int) -> int:
        """Of a dense format as many as its threads read at once, whatever was chosen."""
        return CHUNK_GROUPS * self.lines * self.line_k // BLOCK_K


def _upper(fmt: Format) -> tuple[tuple[str, int, str], ...]:
    """For each group of 4 k: the plane with its upper bits, how far left they move, and the mask then."""
    if fmt.bits == 3:
        return tuple(("h0", 2 - g, "0x04040404") for g in range(8))
    if fmt.bits == 5:
        return tuple(("h0", 4 - g, "0x10101010") for g in range(8))
    if fmt.bits == 6:
        return tuple((f"h{g // 4}", 4 - 2 * (g % 4), "0x30303030") for g in range(8))
    return ()


def _plane(fmt: Format, width: int) -> tuple[int, ...]:
    """The bytes of a block at which lines with so many bits of its codes begin."""
    return next((plane.at for plane in PLANES[fmt.bits] if plane.width == width), ())


def _planes(fmt: Format) -> tuple[Plane, ...]:
    *upper, codes = PLANES[fmt.bits]
    named = [("w", codes), *(("h", plane) for plane in upper)]
    return tuple(Plane(f"{letter}{i}", at // WORD) for letter, plane in named for i, at in enumerate(plane.at))


def _single(fmt: Format) -> tuple[str, str, str]:
    """Where one code lies: its byte, the byte of its upper bits, and how the two make the code."""
    if fmt.bits == 8:
        return "{k} // 4 * 128 + half * 64 + {r} * 4 + {k} % 4", "", "code"
    if fmt.bits == 3:
        byte = f"{{k}} // 16 * 128 + {_plane(fmt, 2)[0]} + half * 64 + {{r}} * 4 + {{k}} % 4"
        low, upper = "((code >> ({k} // 4 % 4 * 2)) & 3)", "half * 64 + {r} * 4 + {k} % 4"
        return byte, upper, low + " | (((extra >> ({k} // 4)) & 1) << 2)"
    byte = "{k} // 4 % 4 * 128 + half * 64 + {r} * 4 + {k} % 4"
    first = _plane(fmt, 4)[0]
    byte += f" + {first}" if first else ""
    low = "((code >> ({k} // 16 * 4)) & 15)"
    if fmt.bits == 5:
        return byte, "half * 64 + {r} * 4 + {k} % 4", low + " | (((extra >> ({k} // 4)) & 1) << 4)"
    if fmt.bits == 6:
        upper = f"{{k}} // 16 * {_plane(fmt, 2)[1]} + half * 64 + {{r}} * 4 + {{k}} % 4"
        return byte, upper, low + " | (((extra >> ({k} // 4 % 4 * 2)) & 3) << 4)"
    return byte, "", f"{table_name(fmt.table)}({low})" if fmt.table else low


TYPES = {
    "f16": "tl.float16",
    "bf16": "tl.bfloat16",
    "u8": "tl.uint8",
    "i8": "tl.int8",
    "e8m0": "tl.uint8",
    "e4m3": "tl.uint8",
}
FLOATS = {"e8m0": "half_e8m0({})", "e4m3": "half_e4m3({})"}  # both only with tables in halves


def table_name(table: tuple[int, ...]) -> str:
    return next(name for name, known in TABLES.items() if known == table)


def _scales(fmt: Format) -> tuple[Scale, ...]:
    """Every kind of scale in a block and its lead; of those with two parts, each."""
    found = []
    for place in fmt.places:
        dtype, size = TYPES[place.level.dtype], place.level.bytes // TILE_ROWS
        home = ("own" if place.step else "lead") if place.in_lead else "at"
        for part in range(place.count):
            name = place.level.field + (f"_{part}" if place.count > 1 else "")
            found.append(Scale(name, dtype, place.offset // size + part * TILE_ROWS, home))
    return tuple(found)


def _meaning(fmt: Format) -> tuple[tuple[str, ...], str]:
    """The scale of each part of a block, and what is added."""
    names = {
        p.level.field: [p.level.field] * 2 if p.count == 1 else [f"{p.level.field}_{i}" for i in (0, 1)]
        for p in fmt.places
    }

    def of(field: str, part: int) -> str:
        level = fmt.level(field)
        return FLOATS.get(level.dtype if level else "", "{}.to(tl.float32)").format(names[field][part])

    def scale(part: int) -> str:
        return " * ".join(of(field, part) for field in ("sub_d", "d") if field in names) or "1.0"

    minimum = ""
    if "m" in names:
        minimum = f"-({of('sub_m', 0)} * {of('m', 0)})" if "sub_m" in names else of("m", 0)
    if "z" in names:
        minimum = f"-({of('z', 0)} * {of('d', 0)})"
    return tuple(scale(part) for part in range(BLOCK_K // fmt.block)), minimum


def _integer(fmt: Format) -> Reader:
    step = next((p.step // WORD for p in fmt.places if p.step), 0)
    return Reader(
        fmt.name, fmt.packed_block_bytes // WORD, _planes(fmt), _upper(fmt), PLANES[fmt.bits][-1].width, _scales(fmt),
        *_meaning(fmt), max(fmt.zero, -min(fmt.table, default=0)), fmt.packed_blocks, fmt.packed_lead_bytes // WORD,
        step, fmt.trailer is not None, *_single(fmt), table=fmt.table,
    )  # fmt: skip


def _trailer(level: Level | None) -> Trailer | None:
    if level is None:
        return None
    if level.dtype == "e8m0":
        place = "({at}).to(tl.pointer_type(tl.uint8)) + {k} // 32 * 32 + {row}"
        return Trailer(32, "(blocks * 8 + 15) // 16 * 16", place, "2.0 * half_e8m0({})")
    place = "({at}).to(tl.pointer_type(tl.float32)) + " + (f"{{k}} // {level.every} * 32 + " if level.every else "")
    count = f"(blocks * 32 + {level.every - 1}) // {level.every} * " if level.every else ""
    return Trailer(level.every, f"{count}{TILE_ROWS}", place + "{row}")


def _fp8(fmt: Format) -> DenseReader:
    place = "{k} // 4 * 128 + {row} * 4 + {k} % 4"
    return DenseReader(fmt.name, 32, 4, 32, "tl.uint8", place, "e4m3({}.to(tl.int32), 24)", _trailer(fmt.trailer))


_DENSE = {
    "f32": DenseReader("f32", 32, 1, 32, "tl.float32", "{k} * 32 + {row}"),
    "bf16": DenseReader("bf16", 32, 2, 32, "tl.bfloat16", "{k} // 2 * 64 + {row} * 2 + {k} % 2"),
    "f16": DenseReader("f16", 16, 1, 64, "tl.float16", "{k} * 32 + {row}"),
} | {f.name: _fp8(f) for f in FORMATS.values() if f.dense and f.bits == 8}
READERS: dict[str, Reader | DenseReader] = _DENSE | {
    f.name: _integer(f) for f in FORMATS.values() if not f.dense and not (f.has_min and f.block < BLOCK_K)
}  # no reader has a minimum for each 16 k


def reader(name: str) -> Reader | DenseReader:
    """The reader of a weight format; CompileError names a format that has none."""
    if name not in READERS:
        raise CompileError(
            f"weight format `{name}` is not supported on GPU targets",
            hint=f"supported are {', '.join(READERS)}; or recompile an unquantised checkpoint with --quant",
        )
    return READERS[name]


def body_words(fmt: Reader | DenseReader) -> str:
    """Words of one tile of 32 rows by `blocks` times 32 k before its trailer, as Triton and Python read it."""
    if isinstance(fmt, Reader) and fmt.lead_words:
        return f"blocks // {fmt.blocks} * {fmt.super_words}"
    return f"blocks * {fmt.block_words}"


def trailer_words(fmt: Reader | DenseReader) -> str:
    """Of its trailer, with a sign; empty without one."""
    if isinstance(fmt, Reader):
        return f" + {TILE_ROWS}" if fmt.row_scale else ""
    return f" + {fmt.trailer.words}" if fmt.trailer else ""


def has_row_scale(fmt: Reader | DenseReader) -> bool:
    """Whether its trailer is a scale per row, which multiplies the results."""
    return fmt.row_scale if isinstance(fmt, Reader) else fmt.trailer is not None and not fmt.trailer.every


def body_word_count(fmt: Reader | DenseReader, blocks: int) -> int:
    """Words of one tile of 32 rows by `blocks` times 32 k before its trailer."""
    return blocks // fmt.blocks * fmt.super_words if isinstance(fmt, Reader) else blocks * fmt.block_words


def tile_words(fmt: Reader | DenseReader, blocks: int) -> int:
    """Words of one tile of 32 rows by `blocks` times 32 k."""
    return packed_bytes(FORMATS[fmt.name], TILE_ROWS, BLOCK_K * blocks) // WORD
