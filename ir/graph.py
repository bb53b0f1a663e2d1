"""The Graph IR: straight-line lists of typed ops over named values, and the program made of them.

A Graph is what every pass reads and returns. It is frozen; a pass builds a new one. A value is a name with
a type, and exactly one op defines it. To replace an op, define the same name again: its users need no update.

A Program is an entry graph, one graph per distinct kind of layer, the sequence of layers as data, and an
exit graph. Layers are never unrolled: the cost of every pass is per kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from .errors import CompileError, OnelaunchError, Span, expect
from .op import Op
from .phases import Phase
from .types import CacheType, Value

Rule = Callable[[Op, "Graph"], Op | None]


@dataclass(frozen=True)
class Graph:
    """Parameters, ops in order, results. `phases` is empty until the fuse pass groups the ops."""

    name: str
    params: tuple[Value, ...]
    ops: tuple[Op, ...]
    results: tuple[Value, ...]
    phases: tuple[Phase, ...] = ()
    at: Span | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def weights(self) -> tuple[Value, ...]:
        return tuple(p for p in self.params if p.is_weight)

    @property
    def cache(self) -> Value | None:
        return next((p for p in self.params if isinstance(p.type, CacheType)), None)

    def producer(self, value: Value) -> Op | None:
        return next((op for op in self.ops if op.out.name == value.name), None)

    @cached_property
    def readers(self) -> dict[str, set[str]]:
        """The values made from each value."""
        found: dict[str, set[str]] = {}
        for op in self.ops:
            for value in op.operands:
                found.setdefault(value.name, set()).add(op.out.name)
        return found

    def users(self, value: Value) -> tuple[Op, ...]:
        names = self.readers.get(value.name, ())
        return tuple(op for op in self.ops if op.out.name in names)

    def is_logits(self, value: Value) -> bool:
        """Whether tokens are chosen from a value; `VALUE.max` then holds the largest of each 32 of it."""
        return any(op.name in ("sample", "guess") and op.operands[0] == value for op in self.ops)

    def rewrite(self, rule: Rule) -> Graph:
        """Apply `rule` to every op until nothing changes; the new op keeps the old one's source place."""
        graph = self
        for _ in range(len(self.ops) + 1):
            changed = tuple(_apply(rule, op, graph) for op in graph.ops)
            if changed == graph.ops:
                return graph
            graph = dataclasses.replace(graph, ops=changed)
        raise CompileError(f"rewrite of `{self.name}` does not settle", hint="a rule undoes itself")

    def verify(self) -> Graph:
        """Every value defined once and before use, every type as inferred; raises CompileError at the op."""
        known = {p.name: p for p in self.params}
        expect(len(known) == len(self.params), f"graph `{self.name}`: expected distinct parameter names")
        for op in self.ops:
            try:
                _verify_op(op, known)
            except OnelaunchError as error:
                raise error.at(op.at) from None
            known[op.out.name] = op.out
        for result in self.results:
            expect(known.get(result.name) == result, f"graph `{self.name}`: result `{result.name}` is not defined")
        if self.phases:
            _verify_phases(self)
        return self


def _apply(rule: Rule, op: Op, graph: Graph) -> Op:
    made = rule(op, graph)
    return op if made is None else dataclasses.replace(made, at=op.at)


def _verify_op(op: Op, known: dict[str, Value]) -> None:
    for value in op.operands:
        expect(value.name in known, f"`{op.name}` reads `{value.name}`, which is not defined before it")
        expect(
            known[value.name] == value,
            f"`{value.name}` is {known[value.name].type}, used as {value.type}",
        )
    expect(op.out.name not in known, f"`{op.out.name}` is defined twice")
    inferred = op.infer()
    expect(
        inferred == op.out.type,
        f"`{op.out.name}` is declared {op.out.type}, but `{op.name}` gives {inferred}",
    )


def _verify_phases(graph: Graph) -> None:
    grouped = [op for phase in graph.phases for op in phase.ops]
    expect(
        sorted(op.out.name for op in grouped) == sorted(op.out.name for op in graph.ops),
        f"graph `{graph.name}`: expected every op in exactly one phase",
    )
    known = {p.name for p in graph.params}
    for phase in graph.phases:
        phase.verify(known)
        known |= {op.out.name for op in phase.ops}


@dataclass(frozen=True)
class Program:
    """A whole step: entry, layers, exit.

    A kind's first tensor parameter is the running activation: layer i's first result feeds layer i+1, the
    first result of the entry feeds layer 0. Every other parameter is bound by name to an entry result, to
    `rows`/`slots`, to the layer's own cache, or to a weight (`w.NAME`: the layer's own in a kind, the
    model's in entry and exit, where equal names are the same tensor).

    A `drafter` is a second model, run `passes` times behind the exit: its exit guesses tokens (`ir/drafting.py`). Its
    layers are numbered on from these, and its graphs, carried values and own weights have names of their own.
    """

    name: str
    entry: Graph
    kinds: tuple[Graph, ...]
    layers: tuple[str, ...]
    exit: Graph
    drafter: Program | None = None
    passes: int = 0

    @property
    def models(self) -> tuple[Program, ...]:
        """This one and its drafter."""
        return (self, *self.drafter.models) if self.drafter else (self,)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        return tuple(g for m in self.models for g in (m.entry, *m.kinds, m.exit))

    @property
    def all_layers(self) -> tuple[str, ...]:
        """The kind of every layer by its number, a drafter's included."""
        return tuple(name for m in self.models for name in m.layers)

    def kind(self, name: str) -> Graph:
        return next(k for m in self.models for k in m.kinds if k.name == name)

    def model_of(self, graph: Graph) -> Program:
        """The model a graph is of."""
        return next(m for m in self.models if graph.name in {g.name for g in (m.entry, *m.kinds, m.exit)})

    def runs(self, graph: Graph) -> int:
        """How often a graph runs in a step."""
        times = self.passes if self.model_of(graph) is self.drafter else 1
        return times * (len(self.kind_layers(graph.name)) or 1)

    @property
    def logits(self) -> Value:
        """What the exit chooses tokens from: [L, vocab]."""
        return next(op.operands[0] for op in self.exit.ops if op.name in ("sample", "guess"))

    @property
    def routing(self) -> tuple[int, int]:
        """Layers, and experts of a row in a layer; (0, 0) without experts."""
        found = {op.attributes["k"] for g in self.kinds for op in g.ops if op.name == "expert_linear"}
        expect(len(found) < 2, f"expected one number of experts per row in all layers, got {sorted(found)}")
        return (len(self.layers), found.pop()) if found else (0, 0)

    @property
    def running(self) -> str:
        """The name of the running activation as the entry gives it."""
        return self.entry.results[0].name

    def kind_layers(self, name: str) -> tuple[int, ...]:
        """Indices of the layers of one kind, in order."""
        return tuple(i for i, kind in enumerate(self.all_layers) if kind == name)

    def sections(self) -> Iterator[tuple[Graph, int]]:
        """The step in order: (graph, layer index); entry and exit have layer -1."""
        yield from self._own_sections(0)
        for _ in range(self.passes if self.drafter else 0):
            yield from self.drafter._own_sections(len(self.layers))  # type: ignore[union-attr]

    def _own_sections(self, first: int) -> Iterator[tuple[Graph, int]]:
        yield self.entry, -1
        for i, name in enumerate(self.layers, first):
            yield self.kind(name), i
        yield self.exit, -1

    def map(self, change: Callable[[Graph], Graph]) -> Program:
        """Change every graph. Kinds keep their names, so the layer list stays as it is."""
        return dataclasses.replace(
            self,
            entry=change(self.entry),
            kinds=tuple(change(k) for k in self.kinds),
            exit=change(self.exit),
            drafter=self.drafter.map(change) if self.drafter else None,
        )

    def verify(self) -> Program:
        for graph in self.graphs:
            graph.verify()
        every = [g.name for g in self.graphs]
        expect(len(set(every)) == len(every), f"expected distinct graphs, got {every}")
        expect((self.drafter is None) == (self.passes == 0), "expected passes of a drafter, and of nothing else")
        names = [k.name for k in self.kinds]
        for name in self.layers:
            expect(name in names, f"layer kind `{name}` is not defined")
        for name in names:
            expect(name in self.layers, f"kind `{name}` is used by no layer")
        given = {v.name: v for v in self.entry.results}
        for graph in (*self.kinds, self.exit):
            _verify_binding(graph, given, self.entry.results[0])
        if self.drafter:
            _verify_drafter(self, self.drafter.verify())
        return self


def _verify_drafter(program: Program, drafter: Program) -> None:
    carried = {v.name for v in program.entry.results} & {v.name for v in drafter.entry.results}
    expect(not carried, f"expected other names for what a drafter's entry gives, got {', '.join(sorted(carried))}")
    expect(drafter.drafter is None, "expected a drafter without one of its own")
    sizes = program.logits.tensor.width, drafter.logits.tensor.width
    expect(sizes[0] == sizes[1], f"expected a drafter of {sizes[0]} tokens, got {sizes[1]}")
    ends = [op.name for op in drafter.exit.ops if op.name in ("sample", "commit", "guess")]
    expect(ends == ["guess"], f"expected a drafter whose exit guesses, got {', '.join(ends) or 'none'}")


def _verify_binding(graph: Graph, given: dict[str, Value], first: Value) -> None:
    free = [p for p in graph.params if not p.is_weight and str(p.type) not in ("rows", "slots")]
    free = [p for p in free if not isinstance(p.type, CacheType)]
    expect(free, f"graph `{graph.name}`: expected the running activation as a parameter")
    expect(
        free[0].type == first.type,
        f"graph `{graph.name}`: expected `{free[0].name}` as {first.type}, got {free[0].type}",
    )
    for value in free[1:]:
        expect(
            given.get(value.name) == value,
            f"graph `{graph.name}`: `{value.name}` ({value.type}) is no result of `entry`",
            hint=f"entry gives {', '.join(map(str, given.values()))}",
        )
