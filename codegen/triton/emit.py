"""Triton statements of the ops that fuse into epilogues, and what they share with rows.py.

A pointwise op is one expression (`POINTWISE`) over whatever tile its operands have; the rest are the few
functions below. Adding a pointwise op touches this table only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...ir.limits import PAGE_RUN
from ...ir.op import Op
from ...ir.ops import Append, ElementwiseOp, HeadNorm, Rope
from ...ir.phases import Phase
from ...ir.record import ARGS
from ...ir.schedule import padded, value_floats
from ...ir.types import Value

GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)  # 0.5 (1 + tanh(y)) = sigmoid(2 y)
POINTWISE: dict[str, Callable[[Any, list[str]], str]] = {
    "add": lambda op, a: f"{a[0]} + {a[1]}",
    "mul": lambda op, a: f"{a[0]} * {a[1]}",
    "silu": lambda op, a: f"{a[0]} * tl.sigmoid({a[0]})",
    "sigmoid": lambda op, a: f"tl.sigmoid({a[0]})",
    "gelu_tanh": lambda op, a: f"{a[0]} * tl.sigmoid({GELU_SLOPE} * ({a[0]} + 0.044715 * {a[0]} * {a[0]} * {a[0]}))",
    "scale": lambda op, a: f"{a[0]} * {float(op.by)!r}",
    "shift": lambda op, a: f"{a[0]} + {float(op.by)!r}",
    # Compared, not taken as a minimum: a not-a-number stays one.
    "clamp": lambda op, a: (
        f"tl.where({a[0]} > {float(op.high)!r}, {float(op.high)!r}, "
        f"tl.where({a[0]} < {float(op.low)!r}, {float(op.low)!r}, {a[0]}))"
    ),
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
    return value_floats(value)


def declare(name: str, position: int, align_words: int) -> str:
    """The pointer behind one argument: float32 in the workspace, or a vector or table among the weights."""
    offset = f"word(record, {ARGS + position}).to(tl.int64) * {align_words}"
    if name.startswith("w."):
        return f"{ident(name)} = weights + {offset}"
    return f"{ident(name)} = workspace + {offset}"


def tile_epilogue(phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], stored: set[str]) -> list[str]:
    """Epilogue of plain and paired tiles, on `y` [outputs, rows]; `row` [1, rows], `live` its mask."""
    names = {op.out.name: ident(op.out.name) for op in (*part, *ops)}
    width = part[0].out.tensor.width
    lines = [*tile_columns(phase, width), *tile_values(part, names)]
    lines += [pointwise(op, names, width) for op in ops]
    if ops:  # a small tile's lanes are held by several threads: all read before one overwrites
        lines.append("tl.debug_barrier()")
    return lines + [store(op.out, names) for op in (*part, *ops) if op.out.name in stored]


def tile_columns(phase: Phase, width: int) -> list[str]:
    """Which columns of its outputs a tile has, and which of them there are."""
    return [f"column = u * {phase.unit} + tl.arange(0, {phase.unit})[:, None]", f"keep = live & (column < {width})"]


def tile_values(part: tuple[Op, ...], names: dict[str, str]) -> list[str]:
    """The results of a part's matrices, from a tile `y`: those of a pair lie in it beside each other."""
    if len(part) == 1:
        return [f"{names[part[0].out.name]} = y"]
    first, second = (names[op.out.name] for op in part)
    return ["y = tl.permute(tl.reshape(y, (2, 16, ROWS)), (1, 2, 0))", f"{first}, {second} = tl.split(y)"]


def pointwise(op: Op, names: dict[str, str], width: int) -> str:
    """The statement of a pointwise op on a tile; `names`: of the values that are in registers."""

    def operand(value: Value) -> str:
        if value.name in names:
            return names[value.name]
        if len(value.tensor.shape) == 1:
            return f"tl.load({ident(value.name)} + column, mask=column < {width}, other=0).to(tl.float32, bitcast=True)"
        if value.tensor.shape[1:] == (1,):  # the same for all columns
            return f"tl.load({ident(value.name)} + row * {stride(value)}, mask=live, other=0.0)"
        return f"tl.load({place(value)}, mask=keep, other=0.0)"

    return f"{names[op.out.name]} = {POINTWISE[op.name](op, [operand(v) for v in op.operands])}"


def place(value: Value, prefix: str = "") -> str:
    """Address of a value's columns of a row, or of one of its experts."""
    slot = f" + slot * {padded(value.tensor.width)}" if len(value.tensor.shape) == 3 else ""
    return f"{ident(prefix + value.name)} + row.to(tl.int64) * {stride(value)}{slot} + column"


def store(value: Value, names: dict[str, str]) -> str:
    return f"tl.store({place(value, 'out.')}, {names[value.name]}, mask=keep)"


def head_epilogue(
    phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], stored: set[str], append: list[str]
) -> list[str]:
    """Epilogue of one head of each row from the unit's memory: `x` [rows, head_lanes], `pair` its rotary partners."""
    d, half = phase.unit, phase.unit // 2
    names = {op.out.name for op in (*part, *ops)}
    lines = ["x = tl.load(at + d, mask=keep, other=0.0)"]
    rotates = any(isinstance(op, Rope) for op in ops)
    if rotates:
        lines += [
            f"other = tl.where(d < {half}, d + {half}, d - {half})",
            "pair = tl.load(at + other, mask=keep, other=0.0)",
        ]
    both = {"x": "d", "pair": "other"} if rotates else {"x": "d"}
    for op in ops:
        match op:
            case HeadNorm():
                lines.append(f"norm = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / {d} + {op.eps!r})[:, None]")
                for name, index in both.items():
                    at = f"{ident(op.weight.name)} + {index}"
                    weight = f"tl.load({at}, mask=d < {d}, other=0).to(tl.float32, bitcast=True)"
                    lines.append(f"{name} = {name} * norm * {weight}")
            case Rope():
                base = f"{ident(op.angles.name)} + row * {stride(op.angles)}"
                lines += [
                    f"cosine = tl.load({base} + d % {half}, mask=keep, other=0.0)",
                    f"sine = tl.load({base} + {half} + d % {half}, mask=keep, other=0.0)",
                    f"x = x * cosine + tl.where(d < {half}, -pair, pair) * sine",
                ]
            case Append():
                lines += append
            case ElementwiseOp():
                for name, index in both.items():
                    operands = [
                        name if v.name in names else _head_vector(v, f"u * {d} + {index}", d) for v in op.operands
                    ]
                    lines.append(f"{name} = {POINTWISE[op.name](op, operands)}")
    last = next((op for op in reversed((*part, *ops)) if op.out.name in stored), None)
    if last is not None:
        at = f"{ident('out.' + last.out.name)} + row.to(tl.int64) * {stride(last.out)} + u * {d} + d"
        lines.append(f"tl.store({at}, x, mask=keep)")
    return lines


def _head_vector(value: Value, index: str, width: int) -> str:
    """Elements of a weight vector for one head."""
    return f"tl.load({ident(value.name)} + {index}, mask=d < {width}, other=0).to(tl.float32, bitcast=True)"


def append_lines(
    op: Append, half: str, kv_dtype: str, sizes: dict[str, int], kv_names: str, group: int, layer_word: int
) -> list[str]:
    """Store `x` [rows, head_lanes] as tokens' keys or values in the cache tiles of head `u`."""
    cache, dim = op.kv.cache, padded(op.kv.cache.head_dim, 16)
    if kv_dtype == "bf16":
        place = "d // 2 * 128 + t * 2 + d % 2" if half == "k" else f"{64 * dim} + t // 2 * {2 * dim} + d * 2 + t % 2"
    else:
        place = "d * 64 + t" if half == "k" else f"{64 * dim} + t * {dim} + d"
    return [
        f"group, layer = word(record, {ARGS + group}), word(record, {layer_word})",
        "slot = tl.load(state + ROW_SLOT + row, mask=live, other=0)",
        "position = tl.load(state + ROW_POSITION + row, mask=live, other=0)",
        f"page_at = state + PAGES + (group * {sizes['slots']} + slot) * {sizes['slot_pages']} + position // 64",
        "page = tl.load(page_at, mask=live, other=0)",
        "t = position % 64",
        f"kv = kv_of(group, {kv_names})",
        f"head = kv + (layer * {cache.kv_heads} + u).to(tl.int64) * {PAGE_RUN * 128 * dim}",
        f"tile = head + (page // {PAGE_RUN}).to(tl.int64) * run_elements(group) + page % {PAGE_RUN} * {128 * dim}",
        f"tl.store(tile + {place}, x.to(kv.dtype.element_ty), mask=keep)",
    ]
