"""Evaluate model text with a model's hyper-parameters: the Program, its types inferred op by op.

Layers that run the same block but hold weights in other formats become kinds of their own
(`decoder`, `decoder_2`), since a kind is what code is generated for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir.errors import CompileError, OnelaunchError, expect, nearest
from ..ir.graph import Graph, Program
from ..ir.model_text import Assign, Binary, BlockText, Call, Expression, Layers, ModelText, Name, Number
from ..ir.op import Op
from ..ir.ops import OPS
from ..ir.types import CacheType, StateType, TensorType, Value

Resolve = Callable[[str, int], tuple[str, TensorType]]  # (weight, layer or -1) -> (name of its tensor, type)
Hyper = Mapping[str, Any]

ROWS_VALUE = Value("rows", StateType("rows"))
SLOTS_VALUE = Value("slots", StateType("slots"))


def evaluate_number(expression: Expression, hyper: Hyper) -> Any:
    """A hyper-parameter expression; whole results are ints."""
    match expression:
        case Number(text):
            number = float(text)
        case Name(text):
            expect(text in hyper, f"unknown hyper-parameter `{text}`", nearest(text, hyper))
            return hyper[text]
        case Binary(left, sign, right):
            a, b = evaluate_number(left, hyper), evaluate_number(right, hyper)
            number = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if sign == "/" else 0}[sign]
        case Call(name):
            raise CompileError(f"expected a number, got a call of `{name}`")
    return int(number) if float(number).is_integer() else number


@dataclass
class _Builder:
    """Collects the ops of one graph; `values` binds names of the text to the newest value."""

    hyper: Hyper
    weight: Callable[[str], tuple[str, TensorType]]
    values: dict[str, Value] = field(default_factory=dict)
    params: dict[str, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def param(self, name: str, value: Value) -> None:
        self.values[name] = value
        self.params[value.name] = value
        self.names.add(value.name)

    def assign(self, assign: Assign) -> None:
        self.values[assign.name] = self.value(assign.value, assign.name)

    def value(self, expression: Expression, hint: str) -> Value:
        match expression:
            case Name(text, at):
                return self.name(text, at)
            case Call(at=at):
                try:
                    return self.call(expression, hint)
                except OnelaunchError as error:
                    raise error.at(at) from None
        raise CompileError(f"expected a value, got `{expression}`")

    def name(self, text: str, at: Any) -> Value:
        if text.startswith("w."):
            if text not in self.values:
                name, kind = self.weight(text[2:])
                self.param(text, Value(f"w.{name}", kind))
        elif text in ("rows", "slots") and text not in self.values:
            self.param(text, ROWS_VALUE if text == "rows" else SLOTS_VALUE)
        if text not in self.values:
            raise CompileError(f"unknown value `{text}`", span=at, hint=nearest(text, self.values))
        return self.values[text]

    def call(self, call: Call, hint: str) -> Value:
        if call.name == "cache":
            sizes = [int(evaluate_number(a, self._numbers())) for a in call.arguments]
            expect(len(sizes) == 3, "cache: expected (kv_heads, head_dim, window)")
            self.param("kv", Value("kv", CacheType(*sizes)))
            return self.values["kv"]
        expect(call.name in OPS, f"unknown op `{call.name}`", nearest(call.name, OPS))
        cls = OPS[call.name]
        operands = [self.value(a, _hint(a)) for a in call.arguments]
        named = cls.named(operands)
        attributes = {k: self.attribute(cls, k, v) for k, v in call.keywords}
        made = cls(Value(self.fresh(hint), StateType("rows")), **named, **attributes, at=call.at)
        out = Value(made.out.name, made.infer())
        self.ops.append(cls(out, **named, **attributes, at=call.at))
        return out

    def attribute(self, cls: type[Op], name: str, given: Expression) -> int | float:
        expect(name in cls.attribute_names(), f"{cls.name}: unknown attribute `{name}`")
        number = evaluate_number(given, self._numbers())
        return int(number) if cls.__dataclass_fields__[name].type == "int" else float(number)

    def _numbers(self) -> dict[str, Any]:
        return dict(self.hyper)

    def fresh(self, hint: str) -> str:
        name, count = hint, 1
        while name in self.names or name in ("rows", "slots"):
            name, count = f"{hint}{count}", count + 1
        self.names.add(name)
        return name

    def graph(self, name: str, results: tuple[Value, ...]) -> Graph:
        order = sorted(self.params.values(), key=lambda v: v.is_weight)
        return Graph(name, tuple(order), tuple(self.ops), results)


def _hint(argument: Expression) -> str:
    """A name for an inner value: its weight's, else its op's."""
    if not isinstance(argument, Call):
        return ""
    weights = [a.text[2:] for a in argument.arguments if isinstance(a, Name) and a.text.startswith("w.")]
    return f"{weights[0]}_{argument.name}" if weights and argument.name != "linear" else (weights or [argument.name])[0]


def instantiate(text: ModelText, hyper: Hyper, resolve: Resolve) -> Program:
    """The Program of one model. `resolve` names the tensor that holds a weight (a tied head's is the embedding)."""
    stack = next((i for i, item in enumerate(text.step) if isinstance(item, Layers)), -1)
    expect(stack >= 0, f"model `{text.name}`: expected `layers` in its step")
    entry = _Builder(hyper, lambda name: resolve(name, -1))
    for item in text.step[:stack]:
        assert isinstance(item, Assign)
        entry.assign(item)
    layers = text.step[stack]
    assert isinstance(layers, Layers)
    kinds, sequence = _layers(text, layers, hyper, entry, resolve)
    running = entry.values["x"]
    last = _Builder(hyper, lambda name: resolve(name, -1))
    last.param("x", running)
    for name, value in entry.values.items():
        if name not in ("x", "rows", "slots") and not value.is_weight:
            last.values[name] = value
    for item in text.step[stack + 1 :]:
        assert isinstance(item, Assign)
        last.assign(item)
    results = [running, *(v for n, v in entry.values.items() if v != running and v.name in _names_used(kinds))]
    first = entry.graph("entry", tuple(results))
    return Program(text.name, first, kinds, sequence, last.graph("exit", (last.values["slots"],))).verify()


def _names_used(kinds: tuple[Graph, ...]) -> set[str]:
    return {p.name for k in kinds for p in k.params if isinstance(p.type, TensorType) and not p.is_weight}


def _layers(
    text: ModelText, layers: Layers, hyper: Hyper, entry: _Builder, resolve: Resolve
) -> tuple[tuple[Graph, ...], tuple[str, ...]]:
    pattern, calls = hyper[layers.pattern], dict(layers.kinds)
    blocks = {b.name: b for b in text.blocks}
    kinds: dict[tuple[Any, ...], Graph] = {}
    sequence: list[str] = []
    for i, role in enumerate(pattern):
        expect(role in calls, f"layer {i}: expected one of {', '.join(calls)}, got `{role}`")
        call = calls[role]
        expect(call.name in blocks, f"unknown block `{call.name}`", nearest(call.name, blocks))
        block = blocks[call.name]
        formats = tuple(resolve(w.name, i)[1] for w in text.weights_of(block.name))
        key = (role, formats)
        if key not in kinds:
            same = sum(1 for r, _ in kinds if r == role)
            name = role + (f"_{same + 1}" if same else "")
            kinds[key] = _block(block, call, name, hyper, entry, lambda n, i=i: resolve(n, i))  # type: ignore[misc]
        sequence.append(kinds[key].name)
    return tuple(kinds.values()), tuple(sequence)


def _block(
    block: BlockText,
    call: Call,
    name: str,
    hyper: Hyper,
    entry: _Builder,
    weight: Callable[[str], tuple[str, TensorType]],
) -> Graph:
    numbers = dict(hyper)
    build = _Builder(numbers, weight)
    expect(len(call.arguments) == len(block.params), f"block `{block.name}`: expected {len(block.params)} arguments")
    for param, argument in zip(block.params, call.arguments, strict=True):
        if isinstance(argument, Name) and argument.text in entry.values:
            build.param(param, entry.values[argument.text])
        else:
            numbers[param] = evaluate_number(argument, hyper)
    for assign in block.body:
        build.assign(assign)
    return build.graph(name, (build.values[block.params[0]],))
