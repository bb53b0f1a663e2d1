"""C++ statements of the ops that fuse into prologues, epilogues and row phases.

A pointwise op is one expression over 16 lanes (`POINTWISE`); everything else is a call of a function in the
headers. Adding a pointwise op touches this table only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.op import Op
from ...ir.ops import (
    Append,
    Attend,
    ElementwiseOp,
    Embed,
    GroupLimit,
    HeadNorm,
    Normalize,
    Reorder,
    RmsNorm,
    Rope,
    RopeAngles,
    Select,
    Softmax,
    TopK,
)
from ...ir.phases import Phase
from ...ir.schedule import padded, value_floats
from ...ir.types import Value

POINTWISE: dict[str, Callable[[Any, list[str]], str]] = {
    "add": lambda op, a: f"f_add({a[0]}, {a[1]})",
    "mul": lambda op, a: f"f_mul({a[0]}, {a[1]})",
    "silu": lambda op, a: f"silu({a[0]})",
    "sigmoid": lambda op, a: f"sigmoid({a[0]})",
    "gelu_tanh": lambda op, a: f"gelu_tanh({a[0]})",
    "scale": lambda op, a: f"f_mul({a[0]}, f_set1({real(op.by)}))",
    "shift": lambda op, a: f"f_add({a[0]}, f_set1({real(op.by)}))",
    # In this order of operands a not-a-number stays one.
    "clamp": lambda op, a: f"f_max(f_set1({real(op.low)}), f_min(f_set1({real(op.high)}), {a[0]}))",
    "softcap": lambda op, a: f"softcap({a[0]}, {real(op.cap)})",
}


def real(x: float) -> str:
    """A float literal that C++ reads back to the same float32."""
    text = repr(float(x))
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def ident(name: str) -> str:
    """A C++ name for an IR value."""
    return "v_" + name.replace(".", "_")


def stride(value: Value) -> int:
    """Floats from one row of a value to the next in the workspace."""
    return value_floats(value)


def declare(name: str, position: int) -> str:
    """The pointer behind one argument."""
    if name.startswith("w."):
        return f"const float* {ident(name)} = (const float*)s.weight(r, {position});"
    if name.startswith("out."):
        return f"float* {ident(name)} = s.value(r, {position});"
    return f"const float* {ident(name)} = s.value(r, {position});"


def at(value: Value, row: str, column: str) -> str:
    """Address of a value's element: weights are one row for all."""
    if len(value.tensor.shape) == 1:
        return f"{ident(value.name)} + {column}"
    return f"{ident(value.name)} + size_t({row}) * {stride(value)} + {column}"


def load(value: Value, row: str, column: str) -> str:
    """16 columns of a value; a value of one column is the same in all."""
    if value.tensor.shape[1:] == (1,):
        return f"f_set1({ident(value.name)}[size_t({row}) * {stride(value)}])"
    return f"f_load({at(value, row, column)})"


def pointwise(op: Op, operand: Callable[[Value], str]) -> str:
    return POINTWISE[op.name](op, [operand(v) for v in op.operands])


class RowEmitter:
    """Statements that compute ops on one whole row, each into a buffer of its own or into a given place.

    `place(op)` names the destination of an op's row (a float pointer expression) or '' for a local array.
    """

    def __init__(self, place: Callable[[Op], str], args: dict[str, int], index: str) -> None:
        self.place, self.args, self.index = place, args, index
        self.pointers: dict[str, str] = {}
        self.lines: list[str] = []

    def operand(self, value: Value) -> str:
        """The row of a value: computed here, a weight vector, or a row of the workspace."""
        if value.name in self.pointers:
            return self.pointers[value.name]
        if len(value.tensor.shape) == 1:
            return ident(value.name)
        return f"({ident(value.name)} + size_t({self.index}) * {stride(value)})"

    def lanes(self, value: Value) -> str:
        """16 columns of a value at column `c`; a value of one column is the same in all."""
        place = self.operand(value)
        return f"f_set1({place}[0])" if value.tensor.shape[1:] == (1,) else f"f_load({place} + c)"

    def emit(self, op: Op) -> None:
        if isinstance(op, Select):
            source = f"{ident(op.x.name)} + size_t(s.state.output_row()[{self.index}]) * {stride(op.x)}"
            self.pointers[op.out.name] = f"({source})"
            return
        target = self.place(op)
        if not target:
            target = f"row_{ident(op.out.name)}"
            self.lines.append(f"alignas(64) float {target}[{padded(op.out.tensor.width)}];")
        self.lines += self._statements(op, target)
        self.pointers[op.out.name] = target

    def _statements(self, op: Op, target: str) -> list[str]:
        width = op.out.tensor.width
        match op:
            case RmsNorm():
                call = f"{self.operand(op.x)}, {ident(op.weight.name)}, {width}, {real(op.eps)}, {target}"
                return [f"rms_norm_row({call});"]
            case HeadNorm():
                d = op.weight.tensor.width
                return [
                    f"std::memcpy({target}, {self.operand(op.x)}, {4 * width});",
                    f"for (int c = 0; c < {width}; c += {d}) "
                    f"head_norm({target} + c, {ident(op.weight.name)}, {d}, {real(op.eps)});",
                ]
            case Reorder():
                value = f"{self.operand(op.x)}[int({ident(op.order.name)}[c])]"
                return [f"for (int c = 0; c < {width}; ++c) {target}[c] = {value};"]
            case Embed():
                table = f"s.weight(r, {self.args[op.table.name]})"
                fmt = format_struct(op.table.tensor.dtype)
                return [f"decode_row<{fmt}>({table}, {padded(width)}, s.state.row_token()[row], {target});"]
            case RopeAngles():
                call = f"{target}, {ident(op.inv_freq.name)}, {width}, s.state.row_position()[row]"
                return [f"rope_angles({call}, {real(op.factor)});"]
            case Softmax():
                return [f"softmax_row({self.operand(op.x)}, {width}, {target});"]
            case TopK():
                return [f"top_k_row<{op.k}>({self.operand(op.x)}, {self.operand(op.order)}, {width}, {target});"]
            case GroupLimit():
                kind = f"{op.groups}, {op.keep}, {op.best}"
                return [f"group_limit_row<{kind}>({self.operand(op.x)}, {width}, {target});"]
            case Normalize():
                return [f"normalize_row({self.operand(op.x)}, {width}, {real(op.eps)}, {target});"]
            case ElementwiseOp():
                body = pointwise(op, self.lanes)
                return [f"for (int c = 0; c < {padded(width)}; c += 16) f_store({target} + c, {body});"]
        raise TypeError(f"no row statement for `{op.name}`")


def combine(op: Attend, target: str, index: str, args: dict[str, int]) -> list[str]:
    """One row of finished attention, head by head, from its partials."""
    d, heads = op.kv.cache.head_dim, op.out.tensor.width // op.kv.cache.head_dim
    splits, window = f"r[ARGS + {args['splits']}]", f"r[ARGS + {args['window']}]"
    source = f"{ident(op.out.name)} + (size_t({index}) * {heads} + h) * {splits} * partial_floats({d})"
    position = f"s.state.row_position()[{index}]"
    sink = f", {ident(op.sinks.name)} + h" if op.sinks is not None else ""
    return [
        f"for (int h = 0; h < {heads}; ++h)",
        f"  combine_head({source}, {splits}, {position}, {window}, {d}, {target} + h * {d}{sink});",
    ]


def lane_epilogue(
    phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], stored: set[str], past_caches: bool = False
) -> list[str]:
    """Epilogue of plain and paired tiles: values stay in registers, 16 columns at a time.

    past_caches: what is kept goes straight to memory, and stays in `out`.
    """
    paired = len(part) == 2
    registers = {op.out.name: ident(op.out.name) for op in (*part, *ops)}
    column = f"u * {phase.unit} + c"

    def operand(value: Value) -> str:
        return registers.get(value.name) or load(value, "row", column)

    lines = [f"for (int c = 0; c < {phase.unit}; c += 16) {{"]
    for i, anchor in enumerate(part):
        offset = f"out + {16 * i}" if paired else "out + c"
        lines.append(f"  F {registers[anchor.out.name]} = f_load({offset});")
    lines += [f"  F {registers[op.out.name]} = {pointwise(op, operand)};" for op in ops]
    for op in (*part, *ops):
        if op.out.name in stored:
            place = f"{ident('out.' + op.out.name)} + size_t(row) * {stride(op.out)} + {column}"
            lines.append(f"  {'f_stream' if past_caches else 'f_store'}({place}, {registers[op.out.name]});")
            if past_caches:
                lines.append(f"  f_store(out + c, {registers[op.out.name]});")
    return [*lines, "}"]


def head_epilogue(phase: Phase, part: tuple[Op, ...], ops: tuple[Op, ...], stored: set[str], group: int) -> list[str]:
    """Epilogue of a whole head: in place on its `unit` values, which lie together."""
    d = phase.unit
    lines: list[str] = []
    names = {op.out.name for op in (*part, *ops)}
    for op in ops:
        match op:
            case HeadNorm():
                lines.append(f"head_norm(out, {ident(op.weight.name)}, {d}, {real(op.eps)});")
            case Rope():
                lines.append(f"rope(out, {ident(op.angles.name)} + size_t(row) * {stride(op.angles)}, {d});")
            case Append():
                lines += _append(op, "k" if op.k.name in names else "v", d, group)
            case ElementwiseOp():
                body = pointwise(
                    op, lambda v: "f_load(out + c)" if v.name in names else f"f_load({at(v, 'row', f'u * {d} + c')})"
                )
                lines.append(f"for (int c = 0; c < {d}; c += 16) f_store(out + c, {body});")
    last = next((op for op in reversed((*part, *ops)) if op.out.name in stored), None)
    if last is not None:
        place = f"{ident('out.' + last.out.name)} + size_t(row) * {stride(last.out)} + u * {d}"
        lines.append(f"std::memcpy({place}, out, {4 * d});")
    return lines


def _append(op: Append, half: str, d: int, group: int) -> list[str]:
    return [
        "const int slot = s.state.row_slot()[row], position = s.state.row_position()[row];",
        f"const int page = s.pages(r[ARGS + {group}], slot)[position / PAGE_TOKENS];",
        f"uint8_t* head = s.kv_head(r[ARGS + {group}], r[LAYER], {op.kv.cache.kv_heads}, u, {d});",
        f"head += kv_page_offset<Kv>(page, KV_RUN_BYTES[r[ARGS + {group}]], {d});",
        f"append_{half}<Kv>(head, position % PAGE_TOKENS, out, {d});",
    ]


def format_struct(name: str) -> str:
    """The C++ struct of a weight format in linear_formats.h."""
    return name.upper()
