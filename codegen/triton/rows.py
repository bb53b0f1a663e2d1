"""Triton statements of work on whole rows: prologues into activation panels, and phases without a matrix.

A row is computed in chunks of CHUNK values: each output is one loop over chunks in which its whole
expression is computed afresh, after a loop for each norm that it needs. So a row's width costs no registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.errors import expect
from ...ir.limits import PARTIAL_HEADER, SPLIT_TOKENS, partial_floats
from ...ir.op import Op
from ...ir.ops import (
    Attend,
    ElementwiseOp,
    Embed,
    GroupLimit,
    Normalize,
    Reorder,
    RmsNorm,
    RopeAngles,
    Select,
    Softmax,
    TopK,
)
from ...ir.record import ARGS
from ...ir.schedule import padded, value_floats
from ...ir.types import Value
from .emit import POINTWISE, ident, lanes, stride
from .formats import PANEL_WORDS, DenseReader, Reader, body_word_count, reader, tile_words

CHUNK = 4096  # values of a row at a time: all their loads are one latency
LOG2E = 1.4426950408889634
ROUTERS: dict[str, Callable[[Any, list[str]], str]] = {  # of whole rows: templates/route.py.j2
    "softmax": lambda op, a: f"softmax({a[0]}, inside)",
    "top_k": lambda op, a: f"top_k({a[0]}, {a[1]}, k, inside, {op.k})",
    "group_limit": lambda op, a: (
        f"group_limit({a[0]}, k, inside, {op.groups}, {op.keep}, {op.best}, {op.x.tensor.width // op.groups})"
    ),
    "normalize": lambda op, a: f"normalize({a[0]}, inside, {float(op.eps)!r})" if op.on else a[0],
}
PANEL_TYPES = {"q8": "tl.int32", "bf16": "tl.bfloat16", "f32": "tl.float32"}


class RowEmitter:
    """Statements for `row`; values are tiles [chunk] at indices `k`, zero where not `inside` the width.

    `attended` is the attention whose partials a row folds, with its arguments' places; `split`: tokens
    of one.
    """

    def __init__(self, ops: tuple[Op, ...], attended: Attend | None = None, numbers: dict[str, int] | None = None,
                 split: int = SPLIT_TOKENS):  # fmt: skip
        self.producer = {op.out.name: op for op in ops}
        self.attended, self.numbers, self.split = attended, numbers or {}, split
        self.norms: dict[str, str] = {}
        self.lines: list[str] = []
        self.made: dict[str, str] = {}

    def store(self, op: Op) -> None:
        """Write an op's row to the workspace."""
        width = op.out.tensor.width
        at = f"{ident('out.' + op.out.name)} + row.to(tl.int64) * {stride(op.out)} + k"

        def put(tile: str) -> list[str]:
            # A short row's lanes are held by several threads: all have read before one overwrites.
            return ["tl.debug_barrier()", f"tl.store({at}, {tile}, mask=inside)"]

        self._loop(width, op.out, put)

    def panel(self, value: Value, kind: str) -> None:
        """Write a row to the activation panel of a matrix."""
        width, k = value.tensor.width, value_floats(value)

        def put(tile: str) -> list[str]:
            if kind == "q8":
                return [f"store_q8(panel + row * {k // 32 * PANEL_WORDS}, {tile}, start, {k // 32}, {self._chunk(k)})"]
            return [f"tl.store(panel + row * {k} + k, {tile}.to({PANEL_TYPES[kind]}), mask=k < {k})"]

        if len(value.tensor.shape) == 2:
            self._loop(width, value, put)
        else:
            # A row's experts lie one after the other. Of those it does not have nothing was written.
            own = padded(width)
            self._loop(k, value, put, f"(k < used * {own}) & (k % {own} < {width})")

    def used(self, gates: Value, most: int) -> None:
        """Count the experts of `row` as `used`."""
        n = gates.tensor.width
        load = f"tl.load({ident(gates.name)} + row * {stride(gates)} + e, mask=e < {n}, other=0.0)"
        self.lines += [
            f"e = tl.arange(0, {lanes(n)})",
            f"used = tl.minimum(tl.sum(({load} != 0).to(tl.int32), axis=0), {most})",
        ]

    def _chunk(self, width: int) -> int:
        return max(32, min(CHUNK, lanes(width)))

    def _loop(self, width: int, value: Value, put, inside: str = "") -> None:  # type: ignore[no-untyped-def]
        """One loop over the chunks of a row; `put` gives the statements that take the value's tile."""
        self._prepare(value)
        size = self._chunk(width)
        self.made = {}
        outer, self.lines = self.lines, [f"k = start + tl.arange(0, {size})", f"inside = {inside or f'k < {width}'}"]
        tile = self._tile(value)
        body, self.lines = [*self.lines, *put(tile)], outer
        if width <= size:
            self.lines += ["start = 0", *body]
        else:
            self.lines += [f"for start in range(0, {width}, {size}):", *("    " + line for line in body)]

    def _prepare(self, value: Value) -> None:
        """The norms that a value needs, innermost first, and the numbers of a fold."""
        op = self.producer.get(value.name)
        if op is None:
            if self.attended is not None and value.name == self.attended.out.name and "" not in self.norms:
                self.norms[""] = "splits"
                self.lines += self._fold_numbers()
            return
        for operand in op.operands:
            self._prepare(operand)
        if isinstance(op, RmsNorm) and op.out.name not in self.norms:
            name, width = f"norm_{ident(op.out.name)}", op.x.tensor.width
            size = self._chunk(width)
            self.lines.append(f"squares = tl.zeros(({size},), tl.float32)")
            self._loop(width, op.x, lambda tile: [f"squares += {tile} * {tile}"])
            self.lines.append(f"{name} = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / {width} + {op.eps!r})")
            self.norms[op.out.name] = name

    def _tile(self, value: Value) -> str:
        """The tile of a value at `k`: computed here, or loaded."""
        if value.name in self.made:
            return self.made[value.name]
        op, tile = self.producer.get(value.name), f"x_{ident(value.name)}"
        if op is not None:
            self.lines += self._statements(op, tile)
        elif self.attended is not None and value.name == self.attended.out.name:
            self.lines += self._fold(self.attended, tile)
        elif len(value.tensor.shape) == 1:
            self.lines.append(f"{tile} = {self._load(ident(value.name), 'k')}.to(tl.float32, bitcast=True)")
        else:
            at = f"row.to(tl.int64) * {stride(value)}" + ("" if value.tensor.shape[1:] == (1,) else " + k")
            self.lines.append(f"{tile} = {self._load(ident(value.name), at)}")
        self.made[value.name] = tile
        return tile

    def _load(self, pointer: str, at: str) -> str:
        return f"tl.load({pointer} + {at}, mask=inside, other=0)"

    def _statements(self, op: Op, tile: str) -> list[str]:
        match op:
            case Select():
                at = f"tl.load(state + OUTPUT_ROW + row).to(tl.int64) * {stride(op.x)} + k"
                return [f"{tile} = {self._load(ident(op.x.name), at)}"]
            case RmsNorm():
                return [f"{tile} = {self._tile(op.x)} * {self.norms[op.out.name]} * {self._tile(op.weight)}"]
            case Reorder():
                return self._reordered(op, tile)
            case Embed():
                return embed_lines(op, tile)
            case RopeAngles():
                return _angles(op, tile)
            case Softmax() | TopK() | GroupLimit() | Normalize():
                width = op.out.tensor.width
                expect(width <= CHUNK, f"{op.name}: expected rows of at most {CHUNK} values on a GPU, got {width}")
                return [f"{tile} = {ROUTERS[op.name](op, [self._tile(v) for v in op.operands])}"]
            case ElementwiseOp():
                return [f"{tile} = {POINTWISE[op.name](op, [self._tile(v) for v in op.operands])}"]
        raise TypeError(f"no row statement for `{op.name}`")

    def _reordered(self, op: Reorder, tile: str) -> list[str]:
        """The value that is read, at other indices `k`; what is known at these ones is not of use there."""
        outer, made = self.lines, self.made
        order = f"tl.load({ident(op.order.name)} + k, mask=inside, other=0).to(tl.float32, bitcast=True)"
        self.lines, self.made = [f"k_{tile}, k = k, {order}.to(tl.int32)"], {}
        value = self._tile(op.x)
        lines, self.lines, self.made = self.lines, outer, made
        return [*lines, f"{tile}, k = {value}, k_{tile}"]

    def _fold_numbers(self) -> list[str]:
        return [
            f"splits = word(record, {ARGS + self.numbers['splits']})",
            f"window = word(record, {ARGS + self.numbers['window']})",
            "position = tl.load(state + ROW_POSITION + row)",
            "lowest = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)",
            f"count = tl.where(splits == 1, 1, position // {self.split} + 1 - lowest // {self.split})",
        ]

    def _fold(self, op: Attend, tile: str) -> list[str]:
        """Fold the partials of every head: each value finds its head's."""
        d = op.kv.cache.head_dim
        heads, floats, size = op.out.tensor.width // d, partial_floats(d), self._chunk(op.out.tensor.width)
        return [
            f"head, part = k // {d}, k % {d}",
            f"partial = {ident(op.out.name)} + (row * {heads} + head).to(tl.int64) * splits * {floats}",
            "m = tl.load(partial, mask=inside, other=0.0)",
            "l = tl.load(partial + 1, mask=inside, other=1.0)",
            f"o = tl.load(partial + {PARTIAL_HEADER} + part, mask=inside, other=0.0)",
            "for split in range(1, count):",
            f"    partial += {floats}",
            "    m2 = tl.load(partial, mask=inside, other=0.0)",
            "    l2 = tl.load(partial + 1, mask=inside, other=1.0)",
            f"    o2 = tl.load(partial + {PARTIAL_HEADER} + part, mask=inside, other=0.0)",
            "    top = tl.maximum(m, m2)",
            "    keep, take = tl.exp2(m - top), tl.exp2(m2 - top)",
            "    m, l, o = top, l * keep + l2 * take, o * keep + o2 * take",
            *_sink(op),
            f"{tile} = o / l + tl.zeros(({size},), tl.float32)",
        ]


def _sink(op: Attend) -> list[str]:
    """The score that takes weight and has no value. Not before all splits: their number must not matter."""
    if op.sinks is None:
        return []
    return [
        f"sink = tl.load({ident(op.sinks.name)} + head, mask=inside, other=0).to(tl.float32, bitcast=True) * {LOG2E}",
        "top = tl.maximum(m, sink)",
        "keep = tl.exp2(m - top)",
        "l, o = l * keep + tl.exp2(sink - top), o * keep",
    ]


def _angles(op: RopeAngles, tile: str) -> list[str]:
    half = op.inv_freq.tensor.width
    return [
        f"inv_freq = tl.load({ident(op.inv_freq.name)} + k % {half}).to(tl.float32, bitcast=True)",
        "turns = tl.load(state + ROW_POSITION + row).to(tl.float64) * inv_freq.to(tl.float64)",
        # Whole turns go in float64, so that float32 sees only a small angle.
        "angle = (turns - tl.floor(turns * 0.15915494309189535) * 6.283185307179586).to(tl.float32)",
        f"{tile} = tl.where(k < {half}, tl.cos(angle), tl.sin(angle)) * {op.factor!r}",
    ]


def embed_lines(op: Embed, tile: str) -> list[str]:
    """One row of a packed table: each lane finds its code and scales in the tile of 32 rows."""
    table = op.table.tensor
    fmt, blocks = reader(table.dtype), padded(table.width) // 32
    lines = [
        "token = tl.load(state + ROW_TOKEN + row)",
        f"table, r = {ident(op.table.name)} + (token // 32).to(tl.int64) * {tile_words(fmt, blocks)}, token % 32",
    ]
    if isinstance(fmt, DenseReader):
        element = f"table.to(tl.pointer_type({fmt.element})) + {fmt.place.format(k='k', row='r')}"
        value = fmt.value.format(f"tl.load({element}, mask=inside, other=0)")
        if fmt.trailer:
            place = fmt.trailer.place.format(at=f"table + {body_word_count(fmt, blocks)}", k="k", row="r")
            within = ", mask=inside, other=0" if fmt.scale else ""  # else one scale for all of a row
            value += " * " + fmt.trailer.value.format(f"tl.load({place}{within})")
        return [*lines, f"{tile} = {value}"]
    return [*lines, *_embed_code(fmt), f"{tile} = tl.where(inside, {_value(fmt)}, 0.0){_row_scale(fmt, blocks)}"]


def _embed_code(fmt: Reader) -> list[str]:
    """Statements that load one code and its scales for each lane; `k` is its index in the row."""
    byte, extra, single = (
        text.format(k="(k % 32)", r="(r % 16)") for text in (fmt.code_byte, fmt.extra_byte, fmt.single)
    )
    lines = [
        f"block = table + {fmt.block_at('k // 32')}",
        "half, octets = r // 16, block.to(tl.pointer_type(tl.uint8))",
        f"code = tl.load(octets + {byte}, mask=inside, other=0)",
    ]
    if fmt.lead_words:
        lines.append(f"lead = table + {fmt.lead_at('k // 32')}")
    if fmt.own_step:
        lines.append(f"own = lead + {fmt.own_at('(k // 32)')}")
    if extra:
        lines.append(f"extra = tl.load(octets + {extra}, mask=inside, other=0)")
    lines.append(f"code = ({single}).to(tl.float32) - {float(fmt.zero)}")
    for scale in fmt.scales:
        home = "block" if scale.home == "at" else scale.home
        at = f"{home}.to(tl.pointer_type({scale.dtype})) + r + {scale.first}"
        lines.append(f"{scale.name} = tl.load({at}, mask=inside, other=0)")
    return lines


def _value(fmt: Reader) -> str:
    scale = fmt.scale[0]
    if len(fmt.scale) == 2:
        scale = f"tl.where(k % 32 < 16, {fmt.scale[0]}, {fmt.scale[1]})"
    return f"({scale}) * code" + (f" + {fmt.minimum}" if fmt.minimum else "")


def _row_scale(fmt: Reader, blocks: int) -> str:
    place = f"table + {body_word_count(fmt, blocks)} + r"
    return f" * tl.load({place}).to(tl.float32, bitcast=True)" if fmt.row_scale else ""
