"""The matrix code of the GPU step: per weight format and row bucket one function for every phase that uses it.

K, the number of tiles and the epilogue come from the record, so a program has as many of these functions as
it has formats, however many matrices. In the `few` bucket rows meet weights on CUDA cores, in `many` on
tensor cores (`ir.schedule.STRATEGIES`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.bodies import UNIT_ROWS
from ...ir.formats import FORMATS
from ...ir.limits import Limits
from ...ir.schedule import STRATEGIES
from ...ir.tuning import UNTUNED, Tuning
from ..rendering import template
from .dots import PANEL, QUAD, Ahead, Dots, load_asm, scale_names, word_names
from .formats import (
    CHUNK_GROUPS,
    PANEL_WORDS,
    READERS,
    DenseReader,
    Reader,
    body_words,
    has_row_scale,
    reader,
    table_name,
    trailer_words,
)
from .rows import PANEL_TYPES

TEMPLATES = Path(__file__).parent / "templates"
FEW_ROWS = 8  # rows that CUDA cores take through the weights at once, at most
PART_ROWS = 4  # rows of activations that one unpacking of codes serves: more do not fit in registers


@dataclass(frozen=True)
class Matrix:
    """A body of a linear phase: its number, title and format, whether it needs whole heads or output rows."""

    code: int
    title: str
    format: str
    heads: bool
    outputs: bool


def tile_rows(bucket: str, limits: Limits) -> int:
    """Rows that a bucket takes through the weights at once: for CUDA cores each is code of its own."""
    if STRATEGIES[bucket] == "matrix":
        return UNIT_ROWS
    return PART_ROWS if min(limits.few_rows, limits.rows) <= PART_ROWS else FEW_ROWS


def linear_text(
    name: str, bucket: str, matrices: Sequence[Matrix], common: Mapping[str, Any], drafter: bool, chunk: int
) -> str:
    """What runs the matrices of format `name` in a bucket, on its `core_text`; `common` is what all templates get.

    drafter: whether a second model's rows come behind, in a step that may have no outputs. chunk: blocks of 32 k in a
    chunk of the weight stream at most.
    """
    fmt, mine = reader(name), [m for m in matrices if m.format == name]
    strategy = STRATEGIES[bucket]
    rows, outputs = common["n_rows"], [m for m in mine if m.outputs]
    if outputs:
        chosen = " | ".join(f"(body == {m.code})" for m in outputs)
        rows = f"tl.where({chosen}, {common['n_outputs']}, {rows})"
    return str(
        template(TEMPLATES, "linear.py.j2").render(
            **common,
            bucket=bucket,
            name=name,
            streamed=strategy == "vector",
            rows_at=rows,
            passes_by=drafter and bool(outputs) and strategy == "vector",
            chunk_blocks=fmt.chunk_blocks(chunk),
            tile_words=tile_words_text(fmt),
            row_scale=row_scale_text(fmt),
            plain=[m for m in mine if not m.heads],
            heads=[m for m in mine if m.heads],
        )
    )


def tile_words_text(fmt: Reader | DenseReader) -> str:
    return body_words(fmt) + trailer_words(fmt)


def row_scale_text(fmt: Reader | DenseReader) -> str:
    """The scales of a tile's rows, [32, 1]; empty if they have none."""
    if not has_row_scale(fmt):
        return ""
    return f"tl.load((tile + {body_words(fmt)}).to(tl.pointer_type(tl.float32)) + tl.arange(0, 32))[:, None]"


def tables_text(names: Sequence[str]) -> str:
    """What formats with a table of codes' meanings and those of 8-bit floats are read by; empty for other `names`."""
    tables = {r.table: r.zero for name in names if isinstance(r := READERS.get(name), Reader) and r.table}
    if not tables and not any(FORMATS[name].dense and FORMATS[name].bits == 8 for name in names):
        return ""
    listed = [Table(table_name(table), tuple(zero + v for v in table), zero) for table, zero in tables.items()]
    return str(template(TEMPLATES, "tables.py.j2").render(tables=listed))


@dataclass(frozen=True)
class Table:
    """What 16 codes mean, `zero` added."""

    name: str
    values: tuple[int, ...]
    zero: int

    @property
    def sizes(self) -> int | None:
        """Of a table whose second half is the first one negative, and small: its sizes, four bits each."""
        size = [v - self.zero for v in self.values[:8]]
        if min(size) < 0 or max(size) > 15 or [self.zero - v for v in self.values[8:]] != size:
            return None
        return _signed(sum(v << 4 * i for i, v in enumerate(size)))

    @property
    def words(self) -> list[int]:
        return [_signed(int.from_bytes(bytes(self.values[i : i + 4]), "little")) for i in range(0, 16, 4)]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def core_text(name: str, bucket: str, rows: int, streamed: bool, held: bool, tuning: Tuning = UNTUNED) -> str:
    """The functions that multiply one packed tile of a format with up to `rows` rows in a bucket.

    In the bucket that walks the weight stream: of tiles that are `streamed`, and of experts', `held` in registers.
    """
    fmt, strategy = reader(name), STRATEGIES[bucket]
    dense = isinstance(fmt, DenseReader)
    kinds = [kind for kind, wanted in ((False, streamed), (True, held)) if wanted]
    names = [
        (f"{'expert_' if kind else ''}{n}", count, kind)
        for kind in kinds
        for n, count in (("one", 1), ("several", rows))
    ]
    values: dict[str, Any] = {
        "fmt": fmt,
        "tile_rows": rows,
        "panel_words": PANEL_WORDS,
        "warps": tuning["warps"],
        "quad": QUAD,
    }
    if isinstance(fmt, DenseReader):
        values |= {
            "panel_type": PANEL_TYPES[fmt.panel],
            "body_words": body_words(fmt),
            "groups": CHUNK_GROUPS,
            "sums": ", ".join(f"sums_{half}" for half in _halves(fmt)),
            "x": ", ".join(f"x{i}" for i in range(fmt.panel_words)),
            "held": held,
            "variants": [DenseVariant(f"{n}_{fmt.name}", count, rows, kind, fmt) for n, count, kind in names],
        }
    elif strategy == "vector":
        values |= {
            "chunk_blocks": fmt.chunk_blocks(tuning["chunk"]),
            "held": Ahead(fmt) if held else None,
            "found": ", ".join([*(f"dots{p}" for p in range(len(fmt.scale))), *(s.name for s in fmt.scales)]),
            "variants": [Variant(f"{n}_{fmt.name}", count, rows, kind, fmt) for n, count, kind in names],
        }
    return str(template(TEMPLATES, f"{strategy}{'_dense' if dense else ''}.py.j2").render(**values))


def _halves(fmt: DenseReader) -> str:
    """Names of the sums that a word adds to: words of two rows have a sum for each."""
    return "ab" if fmt.name == "f16" else "a"


class _Tile:
    """How what the threads have is added up and becomes a tile.

    All in one reduction, before it is put beside each other: its order does not depend on how many rows there are, so
    that one row and several agree to the bit, and what is put beside each other is small.
    """

    name: str
    rows: int
    room: int  # rows of a tile's result: of one row it has as many copies
    held: bool  # codes come from device memory, and rows by their routes, not from the ring and one after the other
    sums: list[str]  # what each thread has, in the order of a tile's rows, then of rows of activations
    axis: int  # along which threads share a sum

    @property
    def source(self) -> str:
        """The arguments that say where codes and activations come from."""
        return "route, each" if self.held else "ring, slot, queue, weights, piece, STAGES: tl.constexpr"

    @property
    def result(self) -> str:
        wide = f"tl.broadcast_to(tl.reshape(y, (32, {self.rows})), (32, {self.room}))"
        return wide if self.held else f"{wide}, slot, queue"

    @property
    def added(self) -> str:
        """The function by which the reduction adds all of them at once."""
        a, b = ([f"{side}{i}" for i in range(len(self.sums))] for side in "ab")
        total = ", ".join(f"{x} + {y}" for x, y in zip(a, b, strict=True))
        return f"@triton.jit\ndef added_{self.name}({', '.join(a + b)}):\n    return {total}"

    @property
    def whole(self) -> str:
        """The statements that make `y` of them."""
        listed = ", ".join(self.sums)
        together = f"{listed} = tl.reduce(({listed}), {self.axis}, added_{self.name})"
        return f"{together}\ny = {joined(self.sums)}"


@dataclass(frozen=True)
class Variant(_Tile):
    """The code of an integer format for some rows of activations at once."""

    name: str
    rows: int
    room: int
    held: bool
    fmt: Reader
    axis = 1

    @property
    def sums(self) -> list[str]:  # type: ignore[override]
        return [f"sums{p}_{j}" for j in range(QUAD) for p in range(self.rows)]

    @property
    def parts(self) -> list[Dots]:
        steps = range(0, self.rows, PART_ROWS)
        each = [tuple(range(p, min(p + PART_ROWS, self.rows))) for p in steps]
        return [Dots(self.fmt, rows, self.rows > 1, self.held) for rows in each]

    @property
    def words(self) -> str:
        """What is held of a block: codes and scales."""
        return ", ".join(self._words)

    @property
    def coming(self) -> str:
        return ", ".join(f"next_{name}" for name in self._words)

    @property
    def _words(self) -> list[str]:
        return [*word_names(self.fmt), *scale_names(self.fmt)]

    @property
    def activations(self) -> str:
        return ", ".join({"d": "scale0", "t": "whole0"}.get(name, name) for name in PANEL)

    load_asm, load_constraints, load_types = load_asm()


@dataclass(frozen=True)
class DenseVariant(_Tile):
    """The code of a dense format for some rows of activations at once."""

    name: str
    rows: int
    room: int
    held: bool
    fmt: DenseReader
    axis = 0

    @property
    def sums(self) -> list[str]:  # type: ignore[override]
        return [f"sums{p}_{half}{j}" for j in range(QUAD) for half in _halves(self.fmt) for p in range(self.rows)]

    def far(self, i: int) -> str:
        """The words of group i of lines, from device memory."""
        return ", ".join(f"far{i}_{j}" for j in range(QUAD))

    def of(self, p: int, j: int) -> str:
        return ", ".join(f"sums{p}_{half}{j}" for half in _halves(self.fmt))

    def x(self, i: int) -> str:
        """The activations to group i of lines."""
        return ", ".join(f"x{i}_{n}" for n in range(self.fmt.panel_words))

    def scales(self, i: int) -> str:
        """Those of four rows, of group i of lines."""
        return ", ".join(f"scale{i}_{j}" for j in range(QUAD))


def joined(names: Sequence[str]) -> str:
    """The Triton expression that puts a power of two of tiles beside each other, in order, in new last axes."""
    if len(names) == 1:
        return names[0]
    return f"tl.join({joined(names[::2])}, {joined(names[1::2])})"
