"""Print and parse the Graph IR and the Phase IR: `parse(show(x)) == x`.

`parse` gives a Program or a single Graph, whichever the text holds, verified; errors point at the text.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedEOF, UnexpectedInput

from .errors import CompileError, Span, expect, nearest
from .graph import Graph, Program
from .op import Op
from .ops import OPS
from .phases import Phase
from .types import STATES, CacheType, StateType, TensorType, Type, Value

TILED = ("unit", "fetch")  # what the tile pass sets
GROUPS = ("prologue", "anchor", "epilogue")


def show(x: Program | Graph) -> str:
    """The text of a program or of one graph."""
    if isinstance(x, Graph):
        return _show_graph(x, "")
    runs = [f"{name}*{len(list(group))}" for name, group in groupby(x.layers)]
    parts = [_show_graph(g, "  ") for g in (x.entry, *x.kinds)]
    parts += [f"  layers {' '.join(runs)}\n", _show_graph(x.exit, "  ")]
    text = f"program {x.name} {{\n" + "\n".join(parts) + "}\n"
    return text + (f"\ndrafter passes {x.passes}\n{show(x.drafter)}" if x.drafter else "")


def _show_graph(graph: Graph, pad: str) -> str:
    params = f",\n{pad}    ".join(map(str, graph.params))
    if sum(len(str(p)) for p in graph.params) > 90:
        params = f"\n{pad}    {params}"
    else:
        params = ", ".join(map(str, graph.params))
    lines = [f"{pad}graph {graph.name}({params}) -> ({', '.join(v.name for v in graph.results)}) {{"]
    if graph.phases:
        for phase in graph.phases:
            lines += _show_phase(phase, pad + "  ")
    else:
        lines += [f"{pad}  {op}" for op in graph.ops]
    return "\n".join(lines) + f"\n{pad}}}\n"


def _show_phase(phase: Phase, pad: str) -> list[str]:
    settings = f"layout={phase.layout}" + "".join(f", {n}={getattr(phase, n)}" for n in TILED if getattr(phase, n))
    lines = [f"{pad}phase {phase.name} {phase.anchor_kind}({settings}) {{"]
    for name in GROUPS:
        ops = getattr(phase, name)
        if ops:
            lines += [f"{pad}  {name} {{", *(f"{pad}    {op}" for op in ops), f"{pad}  }}"]
    return [*lines, f"{pad}}}"]


def parse(text: str, file: str = "<text>") -> Program | Graph:
    """Read back what `show` printed (or a person wrote). Raises CompileError with the place."""
    tree = parse_tree(_parser(), text, file)
    reader = _Reader(text, file)
    if tree.data == "program":
        return reader.program(tree).verify()
    return reader.graph(tree).verify()


def parse_program(text: str, file: str = "<text>") -> Program:
    """`parse`, refusing a single graph."""
    found = parse(text, file)
    expect(isinstance(found, Program), f"{file}: expected a program, got a single graph")
    assert isinstance(found, Program)
    return found


def parse_tree(parser: Lark, text: str, file: str) -> Tree[Token]:
    """Run a lark parser; a syntax error becomes a CompileError with a caret."""
    try:
        return parser.parse(text)
    except UnexpectedInput as error:
        at_end = isinstance(error, UnexpectedEOF) or error.line < 1
        line = text.count("\n") + 1 if at_end else error.line
        found = "end of text" if at_end else _found(text, error)
        wanted = ", ".join(sorted(_token_names(error)))
        raise CompileError(
            f"expected {wanted or 'something else'}, got {found}",
            span=_span(text, file, line, 1 if at_end else error.column, 1),
        ) from None


def _found(text: str, error: UnexpectedInput) -> str:
    token = getattr(error, "token", None)
    return f"`{token}`" if token else f"`{text[error.pos_in_stream or 0]}`"


def _token_names(error: UnexpectedInput) -> set[str]:
    names = getattr(error, "accepts", None) or getattr(error, "expected", None) or getattr(error, "allowed", None)
    words = {"LBRACE": "`{`", "RBRACE": "`}`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`",
             "COLON": "`:`", "EQUAL": "`=`", "COMMA": "`,`", "STAR": "`*`", "NAME": "a name"}  # fmt: skip
    return {words.get(n, n.lower()) for n in names or () if not n.startswith("__")}


def _span(text: str, file: str, line: int, column: int, length: int) -> Span:
    lines = text.splitlines() or [""]
    return Span(file, line, column, length, lines[min(line, len(lines)) - 1])


def span_of(text: str, file: str, token: Token) -> Span:
    """The place of one token in `text`."""
    return _span(text, file, token.line or 1, token.column or 1, len(token))


@cache
def _parser() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text()
    return Lark(grammar, parser="lalr", propagate_positions=True)


class _Reader:
    """Turns a parse tree into IR; keeps the text for error places."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file

    def span(self, token: Token) -> Span:
        return span_of(self.text, self.file, token)

    def located(self, token: Token, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except CompileError as error:
            raise error.at(self.span(token)) from None

    def program(self, tree: Any) -> Program:
        name, *items = (child for child in tree.children if child is not None)
        graphs = [self.graph(t) for t in items if t.data == "graph"]
        layers = next(t for t in items if t.data == "layers")
        sequence: list[str] = []
        for run in layers.children:
            kind, count = run.children
            sequence += [str(kind)] * int(count or 1)
        entry, *kinds, last = graphs
        made = Program(str(name), entry, tuple(kinds), tuple(sequence), last)
        drafter = next((t for t in items if t.data == "drafter"), None)
        if drafter is None:
            return made
        return replace(made, drafter=self.program(drafter.children[1]), passes=int(drafter.children[0]))

    def graph(self, tree: Any) -> Graph:
        name = tree.children[0]
        params = [self.param(t) for t in tree.children if isinstance(t, Tree) and t.data == "param"]
        known = {p.name: p for p in params}
        ops: list[Op] = []
        phases: list[Phase] = []
        for item in tree.children[1:]:
            if isinstance(item, Tree) and item.data == "statement":
                ops.append(self.statement(item, known))
            elif isinstance(item, Tree) and item.data == "phase":
                phases.append(self.phase(item, known))
                ops += phases[-1].ops
        results = [t for t in tree.children[1:] if isinstance(t, Token)]
        values = tuple(self.lookup(t, known) for t in results)
        return Graph(str(name), tuple(params), tuple(ops), values, tuple(phases), self.span(name))

    def phase(self, tree: Any, known: dict[str, Value]) -> Phase:
        name, anchor, *rest = tree.children
        settings: dict[str, Any] = {"layout": "plain"}
        groups: dict[str, tuple[Op, ...]] = dict.fromkeys(GROUPS, ())
        for item in rest:
            if item is None:
                continue
            key, *values = item.children
            if item.data == "setting":
                self.known_word(key, ("layout", *TILED))
                settings[str(key)] = int(values[0]) if key in TILED else str(values[0])
            else:
                self.known_word(key, GROUPS)
                groups[str(key)] = tuple(self.statement(t, known) for t in values)
        return Phase(str(name), str(anchor), groups["prologue"], groups["anchor"], groups["epilogue"], **settings)

    def known_word(self, token: Token, words: tuple[str, ...]) -> None:
        if token not in words:
            raise CompileError(
                f"expected one of {', '.join(words)}, got `{token}`", span=self.span(token), hint=nearest(token, words)
            )

    def param(self, tree: Any) -> Value:
        name, kind = tree.children
        return Value(str(name), self.type(kind))

    def type(self, tree: Any) -> Type:
        head, *dims = tree.children
        if tree.data == "state":
            self.known_word(head, STATES)
            return StateType(str(head))
        sizes = tuple(int(d.children[0]) if d.data == "fixed" else str(d.children[0]) for d in dims if d)
        if head == "kv":
            if len(sizes) not in (3, 4) or any(isinstance(s, str) for s in sizes):
                raise CompileError("expected kv[kv_heads, head_dim, window, sinks]", span=self.span(head))
            return self.located(head, lambda: CacheType(*map(int, sizes)))
        return TensorType(str(head), sizes)

    def lookup(self, token: Token, known: dict[str, Value]) -> Value:
        if token not in known:
            raise CompileError(
                f"unknown value `{token}`", span=self.span(token), hint=nearest(str(token), known)
            )
        return known[str(token)]

    def statement(self, tree: Any, known: dict[str, Value]) -> Op:
        name, kind, op_name, *arguments = tree.children
        if op_name not in OPS:
            raise CompileError(
                f"unknown op `{op_name}`", span=self.span(op_name), hint=nearest(str(op_name), OPS)
            )
        cls = OPS[str(op_name)]
        out = Value(str(name), self.type(kind))
        operands = [self.lookup(t.children[0], known) for t in arguments if t and t.data == "operand"]
        pairs = [t.children for t in arguments if t and t.data == "attribute"]
        attributes = {str(key): _literal(value) for key, value in pairs}
        made = self.located(op_name, lambda: _make(cls, out, operands, attributes, self.span(op_name)))
        known[out.name] = out
        return made


def _make(cls: type[Op], out: Value, operands: list[Value], attributes: dict[str, Any], at: Span) -> Op:
    named = cls.named(operands)
    for key in attributes:
        known = cls.attribute_names()
        expect(key in known, f"{cls.name}: unknown attribute `{key}`", nearest(key, known))
    try:
        made = cls(out, **named, **attributes, at=at)
    except TypeError as error:
        raise CompileError(f"{cls.name}: {error}") from None
    inferred = made.infer()
    expect(inferred == out.type, f"`{out.name}` is declared {out.type}, but `{cls.name}` gives {inferred}")
    return made


def _literal(tree: Any) -> Any:
    return ast.literal_eval(str(tree.children[0]))
