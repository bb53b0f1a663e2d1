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
from ...ir.schedule import STRATEGIES
from ..rendering import template
from .build import WARPS
from .dots import PANEL, Dots, load_asm
from .formats import CHUNK_GROUPS, PANEL_WORDS, DenseReader, Reader, reader
from .rows import PANEL_TYPES

TEMPLATES = Path(__file__).parent / "templates"
FEW_ROWS = 8  # rows that CUDA cores take through the weights at once
TILE_ROWS = {"vector": FEW_ROWS, "matrix": UNIT_ROWS}
PART_ROWS = 4  # rows of activations that one unpacking of codes serves: more do not fit in registers


@dataclass(frozen=True)
class Matrix:
    """A body of a linear phase: its number, title and format, whether it needs whole heads or output rows."""

    code: int
    title: str
    format: str
    heads: bool
    outputs: bool


def linear_text(name: str, bucket: str, matrices: Sequence[Matrix], common: Mapping[str, Any]) -> str:
    """Everything that runs the matrices of format `name` in a bucket; `common` is what all templates get."""
    fmt, mine = reader(name), [m for m in matrices if m.format == name]
    strategy = STRATEGIES[bucket]
    rows, outputs = common["n_rows"], [m for m in mine if m.outputs]
    if outputs:
        chosen = " | ".join(f"(body == {m.code})" for m in outputs)
        rows = f"tl.where({chosen}, {common['n_outputs']}, {rows})"
    dispatcher = template(TEMPLATES, "linear.py.j2").render(
        **common,
        bucket=bucket,
        name=name,
        streamed=strategy == "vector",
        rows_at=rows,
        tile_rows=TILE_ROWS[strategy],
        tile_words=_tile_words(fmt),
        plain=[m for m in mine if not m.heads],
        heads=[m for m in mine if m.heads],
    )
    return _core(fmt, strategy, common["chunks"][name]) + "\n\n" + str(dispatcher)


def _tile_words(fmt: Reader | DenseReader) -> str:
    if isinstance(fmt, Reader) and fmt.tail_words:
        return f"blocks // {fmt.blocks} * {fmt.super_words}"
    return f"blocks * {fmt.block_words}"


def _core(fmt: Reader | DenseReader, strategy: str, chunk_blocks: int) -> str:
    """The functions that multiply one packed tile."""
    dense, rows = isinstance(fmt, DenseReader), TILE_ROWS[strategy]
    values: dict[str, Any] = {"fmt": fmt, "tile_rows": rows, "panel_words": PANEL_WORDS, "warps": WARPS}
    if isinstance(fmt, DenseReader):
        values |= {
            "panel_type": PANEL_TYPES["bf16" if fmt.name == "bf16" else "f32"],
            "groups": CHUNK_GROUPS,
            # Words of two rows have a sum for each.
            "halves": ["a", "b"] if fmt.name == "f16" else ["a"],
            "sums": "sums_a, sums_b" if fmt.name == "f16" else "sums_a",
            "variants": [DenseVariant("one", 1, fmt.name), DenseVariant("several", rows, fmt.name)],
        }
    elif strategy == "vector":
        values |= {
            "chunk_blocks": chunk_blocks,
            "dots": ", ".join(f"dots{p}" for p in range(len(fmt.scale))),
            "scales": ", ".join(s.name for s in fmt.scales),
            "variants": [Variant("one", 1, fmt), Variant("several", rows, fmt)],
        }
    return str(template(TEMPLATES, f"{strategy}{'_dense' if dense else ''}.py.j2").render(**values))


@dataclass(frozen=True)
class Variant:
    """The code of an integer format for some rows of activations at once."""

    name: str
    rows: int
    fmt: Reader

    @property
    def parts(self) -> list[Dots]:
        steps = range(0, self.rows, PART_ROWS)
        return [Dots(self.fmt, tuple(range(p, min(p + PART_ROWS, self.rows))), self.rows > 1) for p in steps]

    @property
    def activations(self) -> str:
        return ", ".join({"d": "scale0", "t": "whole0"}.get(name, name) for name in PANEL)

    @property
    def joined(self) -> str:
        return joined([f"y{p}" for p in range(self.rows)])

    load_asm, load_constraints, load_types = load_asm()


@dataclass(frozen=True)
class DenseVariant:
    """The code of a dense format for some rows of activations at once."""

    name: str
    rows: int
    format: str

    def sums(self, p: int, j: int) -> str:
        return ", ".join(f"sums{p}_{half}{j}" for half in ("ab" if self.format == "f16" else "a"))

    @property
    def joined(self) -> str:
        return joined([f"y{p}" for p in range(self.rows)])


def joined(names: Sequence[str]) -> str:
    """The Triton expression that puts a power of two of tiles beside each other, in order, in new last axes."""
    if len(names) == 1:
        return names[0]
    return f"tl.join({joined(names[::2])}, {joined(names[1::2])})"
