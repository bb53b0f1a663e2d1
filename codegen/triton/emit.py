"""Triton statements of the ops that fuse into prologues, epilogues and row phases.

A pointwise op is one expression (`POINTWISE`) over whatever tile its operands have; the rest are the few
functions below. Adding a pointwise op touches this table only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...ir.limits import PAGE_RUN, PARTIAL_HEADER
from ...ir.op import Op
from ...ir.ops import Append, Attend, ElementwiseOp, Embed, HeadNorm, RmsNorm, Rope, RopeAngles, Select
from ...ir.phases import Phase
from ...ir.schedule import padded
from ...ir.types import Value
from .formats import reader

GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)  # 0.5 (1 + tanh(y)) = sigmoid(2 y)
POINTWISE: dict[str, Callable[[Any, list[str]], str]] = {
    "add": lambda op, a: f"{a[0]} + {a[1]}",
    "mul": lambda op, a: f"{a[0]} * {a[1]}",
    "silu": lambda op, a: f"{a[0]} * tl.sigmoid({a[0]})",
    "gelu_tanh": lambda op, a: f"{a[0]} * tl.sigmoid({GELU_SLOPE} * ({a[0]} + 0.044715 * {a[0]} * {a[0]} * {a[0]}))",
    "scale": lambda op, a: f"{a[0]} * {op.by!r}",
    "softcap": lambda op, a: f"{op.cap!r} * (2.0 * tl.sigmoid(2.0 * {a[0]} / {op.cap!r}) - 1.0)",
}  # tanh(y) = 2 sigmoid(2 y) - 1


def ident(name: str) -> str:
    """A Python name for an IR value."""
    return "v_" + name.replace(".", "_")


def lanes(n: int) -> int:
    """The power of two that a tile of n values takes."""
    return 1 << (n - 1).bit_length()


def stride(value: Value) -> int:
    """Floats from one row of a value to the next in the workspace."""
    return padded(value.tensor.width)


def declare(name: str, position: int, align_words: int) -> str:
    """The pointer behind one argument: float32 in the workspace, or a vector or table among the weights."""
    offset = f"tl.load(args + {position}).to(tl.int64) * {align_words}"
    if name.startswith("w."):
        return f"{ident(name)} = weights + {offset}"
    return f"{ident(name)} = workspace + {offset}"


def vector(value: Value, index: str) -> str:
    """Elements of a weight vector, float32."""
    return f"tl.load({ident(value.name)} + {index}).to(tl.float32, bitcast=True)"


class RowEmitter:
    """Statements that compute ops on one whole row; values are tiles of `lanes(width)` values."""

    def __init__(self, graph_row: Callable[[Value], str]) -> None:
        self.row = graph_row  # the row index of a workspace value
        self.made: dict[str, str] = {}
        self.lines: list[str] = []

    def operand(self, value: Value) -> str:
        """The tile of a value: made here, or loaded; lanes past its width are zero."""
        if value.name in self.made:
            return self.made[value.name]
        width, name = value.tensor.width, ident(value.name)
        index = f"tl.arange(0, {lanes(width)})"
        mask = f"mask={index} < {width}, other=0"
        if len(value.tensor.shape) == 1:
            loaded = f"tl.load({name} + {index}, {mask}).to(tl.float32, bitcast=True)"
        else:
            loaded = f"tl.load({name} + {self.row(value)} * {stride(value)} + {index}, {mask})"
        tile = f"x_{name}"
        self.lines.append(f"{tile} = {loaded}")
        self.made[value.name] = tile
        return tile

    def emit(self, op: Op) -> None:
        tile = f"x_{ident(op.out.name)}"
        if isinstance(op, Select):
            width = op.x.tensor.width
            index = f"tl.arange(0, {lanes(width)})"
            at = f"{ident(op.x.name)} + tl.load(state + OUTPUT_ROW + row) * {stride(op.x)} + {index}"
            self.lines.append(f"{tile} = tl.load({at}, mask={index} < {width}, other=0.0)")
        else:
            self.lines += self._statements(op, tile)
        self.made[op.out.name] = tile

    def _statements(self, op: Op, tile: str) -> list[str]:
        match op:
            case RmsNorm():
                x, weight = self.operand(op.x), self.operand(op.weight)
                return [
                    f"{tile} = {x} * (1.0 / tl.sqrt(tl.sum({x} * {x}, axis=0) / {op.x.tensor.width} + {op.eps!r}))"
                    f" * {weight}"
                ]
            case Embed():
                return self._embed(op, tile)
            case RopeAngles():
                half = op.inv_freq.tensor.width
                return [
                    f"d = tl.arange(0, {lanes(2 * half)})",
                    f"inv_freq = tl.load({ident(op.inv_freq.name)} + d % {half}).to(tl.float32, bitcast=True)",
                    "turns = tl.load(state + ROW_POSITION + row).to(tl.float64) * inv_freq.to(tl.float64)",
                    # Whole turns go in float64, so that float32 sees only a small angle.
                    "angle = turns - tl.floor(turns * 0.15915494309189535) * 6.283185307179586",
                    "angle = angle.to(tl.float32)",
                    f"{tile} = tl.where(d < {half}, tl.cos(angle), tl.sin(angle)) * {op.factor!r}",
                ]
            case ElementwiseOp():
                return [f"{tile} = {POINTWISE[op.name](op, [self.operand(v) for v in op.operands])}"]
        raise TypeError(f"no row statement for `{op.name}`")

    def _embed(self, op: Embed, tile: str) -> list[str]:
        """One row of a packed table: each lane finds its word and value in the tile of 32 rows."""
        fmt, width = reader(op.table.tensor.dtype), op.table.tensor.width
        name = ident(op.table.name)
        values = len(fmt.values)
        lines = [
            "token = tl.load(state + ROW_TOKEN + row)",
            f"k = tl.arange(0, {lanes(width)})",
            f"number, inside, row_in_tile = k // {fmt.block_k}, k % {fmt.block_k}, token % 32",
            f"table = {name} + (token // 32).to(tl.int64) * {fmt.tile_words(padded(width))}",
            f"block = table + number // {fmt.blocks} * {fmt.super_words} + number % {fmt.blocks} * {fmt.block_words}",
        ]
        if values == 8:
            lines += ["j, i = inside % 16 // 4, inside % 4 + inside // 16 * 4"]
        elif values == 4:
            lines += ["j, i = inside // 4, inside % 4"]
        else:
            lines += ["j, i = inside * 0, inside"]
        lines += [
            f"q = tl.load(block + row_in_tile // 16 * {fmt.half} + row_in_tile % 16 + j * {fmt.line},"
            f" mask=k < {width}, other=0)",
            "row2 = row_in_tile",
        ]
        if fmt.tail_words:
            lines.append(f"tail = table + (number // {fmt.blocks} + 1) * {fmt.super_words} - {fmt.tail_words}")
        picked = "0.0"
        for i, (_, expression) in enumerate(fmt.values):
            picked = f"tl.where(i == {i}, ({expression}).to(tl.float32), {picked})"
        scaled = picked
        if fmt.scale:
            scaled = f"{picked} * ({fmt.scale.replace('row)', 'row2)')})"
            if fmt.minimum:
                scaled += f" + ({fmt.minimum.replace('row)', 'row2)')})"
        return [*lines, f"{tile} = tl.where(k < {width}, {scaled}, 0.0)"]

    def store(self, op: Op, pointer: str, pitch: int) -> None:
        """Write an op's row to memory."""
        width = op.out.tensor.width
        index = f"tl.arange(0, {lanes(width)})"
        at = f"{pointer} + row.to(tl.int64) * {pitch} + {index}"
        # A short row's lanes are held by several threads: all have read before one overwrites.
        self.lines += ["tl.debug_barrier()", f"tl.store({at}, {self.made[op.out.name]}, mask={index} < {width})"]


def combine(op: Attend, args: dict[str, int], partial_floats: int, split_tokens: int, store: str) -> list[str]:
    """Fold the partials of every head of a row and store the finished attention through `store`."""
    d, heads = op.kv.cache.head_dim, op.out.tensor.width // op.kv.cache.head_dim
    source = ident(op.out.name)
    return [
        f"splits, window = tl.load(args + {args['splits']}), tl.load(args + {args['window']})",
        "position = tl.load(state + ROW_POSITION + row)",
        "lowest = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)",
        f"count = tl.where(splits == 1, 1, position // {split_tokens} + 1 - lowest // {split_tokens})",
        f"head, d = tl.arange(0, {lanes(heads)}), tl.arange(0, {lanes(d)})",
        f"live = (head < {heads})[:, None] & (d < {d})[None, :]",
        f"partial = {source} + (row * {heads} + head).to(tl.int64) * splits * {partial_floats}",
        f"m = tl.load(partial, mask=head < {heads}, other=0.0)",
        f"l = tl.load(partial + 1, mask=head < {heads}, other=1.0)",
        f"o = tl.load(partial[:, None] + {PARTIAL_HEADER} + d[None, :], mask=live, other=0.0)",
        "for split in range(1, count):",
        f"    partial += {partial_floats}",
        f"    m2 = tl.load(partial, mask=head < {heads}, other=0.0)",
        f"    l2 = tl.load(partial + 1, mask=head < {heads}, other=1.0)",
        f"    o2 = tl.load(partial[:, None] + {PARTIAL_HEADER} + d[None, :], mask=live, other=0.0)",
        "    top = tl.maximum(m, m2)",
        "    keep, take = tl.exp2(m - top), tl.exp2(m2 - top)",
        "    m, l = top, l * keep + l2 * take",
        "    o = o * keep[:, None] + o2 * take[:, None]",
        f"at = head[:, None] * {d} + d[None, :]",
        store.format(at="at", value="o / l[:, None]", mask="live"),
    ]


def tile_epilogue(phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], stored: set[str]) -> list[str]:
    """Epilogue of plain and paired tiles, on `y` [outputs, rows]; `row` [1, rows], `live` its mask."""
    names = {op.out.name: ident(op.out.name) for op in (*part, *ops)}
    width = part[0].out.tensor.width
    lines = []
    if len(part) == 2:
        first, second = (names[op.out.name] for op in part)
        lines += [
            "y = tl.permute(tl.reshape(y, (2, 16, ROW_TILE)), (1, 2, 0))",
            f"{first}, {second} = tl.split(y)",
        ]
    else:
        lines.append(f"{names[part[0].out.name]} = y")
    lines += [f"column = u * {phase.unit} + tl.arange(0, {phase.unit})[:, None]", f"keep = live & (column < {width})"]

    def operand(value: Value) -> str:
        if value.name in names:
            return names[value.name]
        if len(value.tensor.shape) == 1:
            return f"tl.load({ident(value.name)} + column, mask=column < {width}, other=0).to(tl.float32, bitcast=True)"
        return f"tl.load({ident(value.name)} + row * {stride(value)} + column, mask=keep, other=0.0)"

    lines += [f"{names[op.out.name]} = {POINTWISE[op.name](op, [operand(v) for v in op.operands])}" for op in ops]
    if len(lines) > 3:  # a small tile's lanes are held by several threads: all read before one overwrites
        lines.append("tl.debug_barrier()")
    for op in (*part, *ops):
        if op.out.name in stored:
            at = f"{ident('out.' + op.out.name)} + row.to(tl.int64) * {stride(op.out)} + column"
            lines.append(f"tl.store({at}, {names[op.out.name]}, mask=keep)")
    return lines


def head_epilogue(
    phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], stored: set[str], width: int, append: list[str]
) -> list[str]:
    """Epilogue of one head of one row from the unit's scratch: `x` [head_lanes], `pair` its rotary partners."""
    d, half = phase.unit, phase.unit // 2
    names = {op.out.name for op in (*part, *ops)}
    lines = [f"x = tl.load(v_unit + m * {width} + d, mask=d < {d}, other=0.0)"]
    rotates = any(isinstance(op, Rope) for op in ops)
    if rotates:
        lines += [
            f"other = tl.where(d < {half}, d + {half}, d - {half})",
            f"pair = tl.load(v_unit + m * {width} + other, mask=d < {d}, other=0.0)",
        ]
    both = ("x", "pair") if rotates else ("x",)
    for op in ops:
        match op:
            case HeadNorm():
                lines.append(f"norm = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / {d} + {op.eps!r})")
                for name in both:
                    index = "d" if name == "x" else "other"
                    at = f"{ident(op.weight.name)} + {index}"
                    weight = f"tl.load({at}, mask=d < {d}, other=0).to(tl.float32, bitcast=True)"
                    lines.append(f"{name} = {name} * norm * {weight}")
            case Rope():
                base = f"{ident(op.angles.name)} + row * {stride(op.angles)}"
                lines += [
                    f"cosine = tl.load({base} + d % {half}, mask=d < {d}, other=0.0)",
                    f"sine = tl.load({base} + {half} + d % {half}, mask=d < {d}, other=0.0)",
                    f"x = x * cosine + tl.where(d < {half}, -pair, pair) * sine",
                ]
            case Append():
                lines += append
            case ElementwiseOp():
                for name in both:
                    index = "d" if name == "x" else "other"

                    def operand(value: Value, name: str = name, index: str = index) -> str:
                        if value.name in names:
                            return name
                        at = f"{ident(value.name)} + u * {d} + {index}"
                        return f"tl.load({at}, mask=d < {d}, other=0).to(tl.float32, bitcast=True)"

                    lines.append(f"{name} = {POINTWISE[op.name](op, [operand(v) for v in op.operands])}")
    last = next((op for op in reversed((*part, *ops)) if op.out.name in stored), None)
    if last is not None:
        at = f"{ident('out.' + last.out.name)} + row.to(tl.int64) * {stride(last.out)} + u * {d} + d"
        lines.append(f"tl.store({at}, x, mask=d < {d})")
    return lines


def append_lines(
    op: Append, half: str, kv_dtype: str, sizes: dict[str, int], kv_names: str, group: int, layer_word: int
) -> list[str]:
    """Store `x` [head_lanes] as one token's key or value in the cache tile of head `u`."""
    cache, dim = op.kv.cache, padded(op.kv.cache.head_dim, 16)
    if kv_dtype == "bf16":
        place = "d // 2 * 128 + t * 2 + d % 2" if half == "k" else f"{64 * dim} + t // 2 * {2 * dim} + d * 2 + t % 2"
    else:
        place = "d * 64 + t" if half == "k" else f"{64 * dim} + t * {dim} + d"
    return [
        f"group, layer = tl.load(args + {group}), tl.load(record + {layer_word})",
        "slot, position = tl.load(state + ROW_SLOT + row), tl.load(state + ROW_POSITION + row)",
        f"page = tl.load(state + PAGES + (group * {sizes['slots']} + slot) * {sizes['slot_pages']} + position // 64)",
        "t = position % 64",
        f"kv = kv_of(group, {kv_names})",
        f"head = kv + (layer * {cache.kv_heads} + u).to(tl.int64) * {PAGE_RUN * 128 * dim}",
        f"tile = head + (page // {PAGE_RUN}).to(tl.int64) * run_elements(group) + page % {PAGE_RUN} * {128 * dim}",
        f"tl.store(tile + {place}, x.to(kv.dtype.element_ty), mask=d < {cache.head_dim})",
    ]
