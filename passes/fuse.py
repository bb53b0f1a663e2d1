"""Group ops into phases: prologue + anchor + epilogue between two joins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import networkx

from ..ir.graph import Graph
from ..ir.op import Op
from ..ir.ops import (
    Append,
    Attend,
    Combine,
    Commit,
    ElementwiseOp,
    ExpertLinear,
    Guess,
    HeadNorm,
    Linear,
    MatrixOp,
    Reorder,
    RmsNorm,
    Rope,
    Sample,
    Select,
)
from ..ir.phases import MATRIX, Phase
from ..ir.types import Value

ALONE: dict[type[Op], str] = {Attend: "attend", Sample: "sample", Commit: "commit", Guess: "guess"}


def fuse(graph: Graph) -> Graph:
    """Fold norms into the matrix that reads them and pointwise work into the one that feeds it: fewer joins.

    Matrices that read the same activation share a phase, experts that read it through the same gates another; a norm
    in front of both is in both. What fits neither becomes a `rows` phase.

    before:
        graph f(x: f32[R, 64], w.n: f32[64], w.gate: q4_0[96, 64], w.up: q4_0[96, 64], w.down: q4_0[64, 96]) -> (y) {
          h: f32[R, 64] = rms_norm(x, w.n, eps=1e-05)
          gate: f32[R, 96] = linear(h, w.gate)
          silu: f32[R, 96] = silu(gate)
          up: f32[R, 96] = linear(h, w.up)
          mul: f32[R, 96] = mul(silu, up)
          down: f32[R, 64] = linear(mul, w.down)
          y: f32[R, 64] = add(x, down)
        }
    after:
        graph f(x: f32[R, 64], w.n: f32[64], w.gate: q4_0[96, 64], w.up: q4_0[96, 64], w.down: q4_0[64, 96]) -> (y) {
          phase gate_up linear(layout=pairs) {
            prologue {
              h: f32[R, 64] = rms_norm(x, w.n, eps=1e-05)
            }
            anchor {
              gate: f32[R, 96] = linear(h, w.gate)
              up: f32[R, 96] = linear(h, w.up)
            }
            epilogue {
              silu: f32[R, 96] = silu(gate)
              mul: f32[R, 96] = mul(silu, up)
            }
          }
          phase down linear(layout=plain) {
            anchor {
              down: f32[R, 64] = linear(mul, w.down)
            }
            epilogue {
              y: f32[R, 64] = add(x, down)
            }
          }
        }
    """
    return _Fuser(graph).run()


@dataclass
class _Group:
    """A phase under construction; `order` is the index of its first anchor op."""

    kind: str
    order: int
    prologue: list[Op] = field(default_factory=list)
    anchor: list[Op] = field(default_factory=list)
    epilogue: list[Op] = field(default_factory=list)
    layout: str = "plain"

    @property
    def ops(self) -> list[Op]:
        return self.prologue + self.anchor + self.epilogue

    def made(self) -> set[str]:
        return {op.out.name for op in self.anchor + self.epilogue}


class _Fuser:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.groups: list[_Group] = []
        self.home: dict[str, _Group] = {}  # value -> the group that makes it
        self.pending: list[Op] = []
        self.index = {op.out.name: i for i, op in enumerate(graph.ops)}
        self.moved: set[str] = set()  # anchors that read a norm's copy

    def run(self) -> Graph:
        for i, op in enumerate(self.graph.ops):
            self._place(i, op)
        for group in [g for g in self.groups if g.kind in MATRIX]:
            self._absorb_prologue(group)
        self._row_phases()
        phases = tuple(self._phase(g) for g in self._sorted())
        ops = tuple(op for p in phases for op in p.ops)
        return dataclasses.replace(self.graph, ops=ops, phases=phases)

    def _place(self, order: int, op: Op) -> None:
        if isinstance(op, MatrixOp):
            group = next((g for g in self.groups if g.kind in MATRIX and _reads_alike(g.anchor[0], op)), None)
            if group is None:
                group = self._new("linear" if isinstance(op, Linear) else "experts", order)
            group.anchor.append(op)
            self.home[op.out.name] = group
        elif type(op) in ALONE:
            group = self._new(ALONE[type(op)], order)
            group.anchor.append(op)
            self.home[op.out.name] = group
        elif not self._into_epilogue(op):
            self.pending.append(op)

    def _new(self, kind: str, order: int) -> _Group:
        self.groups.append(_Group(kind, order))
        return self.groups[-1]

    def _into_epilogue(self, op: Op) -> bool:
        """Append `op` to the one linear group that makes its newest operands, if the tile layouts agree."""
        if not isinstance(op, ElementwiseOp | HeadNorm | Rope | Append | Combine):
            return False
        homes = {self.home[v.name].order for v in op.operands if v.name in self.home}
        if not homes:
            return False
        group = next(g for g in self.groups if g.order == max(homes))
        early = {a.gates.name for a in group.anchor if isinstance(a, ExpertLinear)}  # there when the group starts
        if any(v.name in {p.out.name for p in self.pending} - early for v in op.operands):
            return False
        if group.kind not in MATRIX:
            return False
        group = self._twins(group, op)
        layout = self._layout(group, op)
        if layout is None:
            return False
        group.layout = layout
        group.epilogue.append(op)
        self.home[op.out.name] = group
        return True

    def _twins(self, group: _Group, op: Op) -> _Group:
        """The group of `op`; where it joins two matrices alike among others, the two get a group of their own."""
        names = {_part(group, v.name) for v in op.operands if v.name in group.made()}
        pair = [a for a in group.anchor if a.out.name in names]
        if not isinstance(op, ElementwiseOp) or len(pair) != 2 or len(group.anchor) == 2:
            return group
        if _weight_type(pair[0]) != _weight_type(pair[1]):
            return group
        made = self._new(group.kind, self.index[pair[0].out.name])
        made.anchor = pair
        made.epilogue = [e for e in group.epilogue if _part(group, e.out.name) in names]
        group.anchor = [a for a in group.anchor if a not in pair]
        group.epilogue = [e for e in group.epilogue if e not in made.epilogue]
        group.order = self.index[group.anchor[0].out.name]
        self.home |= dict.fromkeys(made.made(), made)
        return made

    def _layout(self, group: _Group, op: Op) -> str | None:
        """The tile layout of `group` once `op` joins it, None where they do not agree."""
        inside = [v for v in op.operands if v.name in group.made()]
        if isinstance(op, HeadNorm | Rope | Append):
            return "heads" if group.layout in ("plain", "heads") else None
        if len({_part(group, v.name) for v in inside}) < 2:
            return group.layout
        weights = [_weight_type(a) for a in group.anchor]
        twins = len(weights) == 2 and weights[0] == weights[1]
        return "pairs" if twins and group.layout in ("plain", "pairs") else None

    def _absorb_prologue(self, group: _Group) -> None:
        """Pull in pending row ops that only this group reads, nearest first."""
        wanted = [_input(group)]
        while wanted:
            value = wanted.pop()
            op = next((p for p in self.pending if p.out == value), None)
            if op is None or not isinstance(op, RmsNorm | ElementwiseOp | Reorder | Select):
                continue
            mine = {o.out.name for o in group.ops}
            users = self.graph.users(value)
            others = {u.out.name for u in users} - mine - self.moved
            if value in self.graph.results:
                continue
            if not others:
                group.prologue.insert(0, op)
                self.pending.remove(op)
                wanted += op.operands
            elif isinstance(op, RmsNorm) and all(isinstance(u, MatrixOp) and u.x == value for u in users):
                self._copy_norm(group, op)

    def _copy_norm(self, group: _Group, op: RmsNorm) -> None:
        """A norm in front of several groups: computing it again is cheaper than a join."""
        copy = Value(f"{op.out.name}_{'_'.join(_names(group))}", op.out.type)
        group.prologue.insert(0, dataclasses.replace(op, out=copy))
        self.moved |= {a.out.name for a in group.anchor}
        group.anchor = [a.with_operands({op.out.name: copy}) for a in group.anchor]

    def _row_phases(self) -> None:
        """What is left works row by row; neighbours between the same groups share a phase."""
        index = {op.out.name: i for i, op in enumerate(self.graph.ops)}
        for op in self.pending:
            group = next((g for g in self.groups if g.kind == "rows" and self._can_join(g, op)), None)
            if group is None:
                group = self._new("rows", index[op.out.name])
            group.anchor.append(op)
            self.home[op.out.name] = group

    def _can_join(self, group: _Group, op: Op) -> bool:
        """A row op joins an earlier rows phase if all it reads exists by then."""
        index = {o.out.name: i for i, o in enumerate(self.graph.ops)}
        mine = {o.out.name for o in group.anchor}
        outside = [v for v in op.operands if v.name in index and v.name not in mine]
        return all(v.name in self.home and self.home[v.name].order < group.order for v in outside)

    def _sorted(self) -> list[_Group]:
        """Groups in an order that respects their reads; of those that are ready, the one that came first."""
        maker = {op.out.name: i for i, g in enumerate(self.groups) for op in g.ops}
        order = networkx.DiGraph()
        order.add_nodes_from(range(len(self.groups)))
        order.add_edges_from((maker[v], i) for i, g in enumerate(self.groups) for v in _external(g) if v in maker)
        ready = networkx.lexicographical_topological_sort(order, key=lambda i: self.groups[i].order)
        return [self.groups[i] for i in ready]

    def _phase(self, g: _Group) -> Phase:
        names = _names(g)
        name = "_".join(names) if g.kind in MATRIX else g.kind if g.kind != "rows" else f"rows_{names[-1]}"
        return Phase(name, g.kind, tuple(g.prologue), tuple(g.anchor), tuple(g.epilogue), g.layout)


def _input(group: _Group) -> Value:
    anchor = group.anchor[0]
    assert isinstance(anchor, MatrixOp)
    return anchor.x


def _weight_type(op: Op) -> object:
    return op.weight.type if isinstance(op, MatrixOp) else None


def _names(group: _Group) -> list[str]:
    return [op.weight.name[2:] if isinstance(op, MatrixOp) else op.out.name for op in group.anchor]


def _reads_alike(a: Op, b: MatrixOp) -> bool:
    """Whether two matrices share a panel, and the experts it goes to."""
    if isinstance(a, ExpertLinear) and isinstance(b, ExpertLinear):
        return (a.x, a.gates, a.k) == (b.x, b.gates, b.k)
    return type(a) is type(b) and isinstance(a, MatrixOp) and a.x == b.x


def _part(group: _Group, name: str) -> str:
    """The anchor value a value of the group comes from."""
    for op in reversed(group.epilogue):
        if op.out.name == name:
            return next(_part(group, v.name) for v in op.operands if v.name in group.made())
    return name


def _external(group: _Group) -> set[str]:
    made = {op.out.name for op in group.ops}
    return {v.name for op in group.ops for v in op.operands} - made
