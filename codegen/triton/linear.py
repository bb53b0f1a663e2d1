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
from .dots import ROWS, dot_asm
from .formats import PANEL_WORDS, DenseReader, Reader, reader
from .rows import PANEL_TYPES

TEMPLATES = Path(__file__).parent / "templates"
FEW_ROWS = 8  # rows that CUDA cores take through the weights at once
TILE_ROWS = {"vector": FEW_ROWS, "matrix": UNIT_ROWS}
DENSE_GROUPS = 4  # groups of lines in flight per thread
# Rows of a part: what is loaded of the panel must stay below one value per thread, or Triton moves it through
# shared memory. FEW_ROWS are made of parts.
PART_ROWS = {"f16": 2}
JOINED = {
    1: "tl.broadcast_to(y0, (32, {rows}))",
    2: "tl.reshape(tl.permute(tl.join(y0, y1), (0, 2, 1)), (32, {rows}))",
    4: "tl.reshape(tl.permute(tl.join(tl.join(y0, y1), tl.join(y2, y3)), (0, 3, 2, 1)), (32, {rows}))",
}


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
        rows_at=rows,
        tile_rows=TILE_ROWS[strategy],
        tile_words=_tile_words(fmt),
        plain=[m for m in mine if not m.heads],
        heads=[m for m in mine if m.heads],
    )
    return _core(fmt, strategy) + "\n\n" + str(dispatcher)


def _tile_words(fmt: Reader | DenseReader) -> str:
    if isinstance(fmt, Reader) and fmt.tail_words:
        return f"blocks // {fmt.blocks} * {fmt.super_words}"
    return f"blocks * {fmt.block_words}"


def _core(fmt: Reader | DenseReader, strategy: str) -> str:
    """The functions that multiply one packed tile."""
    rows = TILE_ROWS[strategy]
    dense = isinstance(fmt, DenseReader)
    values: dict[str, Any] = {"fmt": fmt, "tile_rows": rows, "panel_words": PANEL_WORDS, "warps": WARPS}
    if strategy == "vector":
        part = PART_ROWS.get(fmt.name, 4)
        counts = {"one": (1, 1), "several": (part, rows // part)}
        values["variants"] = [(name, m, parts) for name, (m, parts) in counts.items()]
        values["joined"] = {name: JOINED[parts].format(rows=rows) for name, (_, parts) in counts.items()}
    if isinstance(fmt, Reader) and strategy == "vector":
        asm, constraints = dot_asm(fmt)
        values |= {
            "asm": asm,
            "constraints": constraints,
            "asm_rows": ROWS,
            "planes": ", ".join(p.name for p in fmt.planes),
            "outputs": ", ".join(f"dots{p}" for p in range(len(fmt.scale))),
        }
    if dense:
        values |= {
            "panel_type": PANEL_TYPES["bf16" if fmt.name == "bf16" else "f32"],
            "groups": DENSE_GROUPS,
            "held": ", ".join(f"w{i}" for i in range(DENSE_GROUPS)),
            # Words of two rows have a sum for each.
            "halves": (halves := ["a", "b"] if fmt.name == "f16" else ["a"]),
            "sums": [", ".join(f"sums{p}_{half}" for half in halves) for p in range(4)],
        }
    return str(template(TEMPLATES, f"{strategy}{'_dense' if dense else ''}.py.j2").render(**values))
