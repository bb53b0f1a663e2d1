"""Constant scales fold, equal ops merge, ops that do nothing or are unused go."""

from __future__ import annotations

import dataclasses

from ..ir.graph import Graph
from ..ir.op import Op
from ..ir.ops import Add, Normalize, Scale
from ..ir.types import Value


def canonicalize(graph: Graph) -> Graph:
    """Fold scales by constants, merge equal ops, drop unused ones: nothing is computed twice or for nothing.

    before:
        graph f(x: f32[2, 8], w.n: f32[8]) -> (z) {
          a: f32[2, 8] = scale(x, by=1.0)
          b: f32[2, 8] = rms_norm(a, w.n, eps=1e-05)
          c: f32[2, 8] = rms_norm(x, w.n, eps=1e-05)
          d: f32[2, 8] = silu(x)
          z: f32[2, 8] = mul(b, c)
        }
    after:
        graph f(x: f32[2, 8], w.n: f32[8]) -> (z) {
          b: f32[2, 8] = rms_norm(x, w.n, eps=1e-05)
          z: f32[2, 8] = mul(b, b)
        }
    """
    return _drop_unused(_merge_equal(graph.rewrite(fold_scales)))


def fold_scales(op: Op, graph: Graph) -> Op | None:
    """`scale(scale(x, a), b)` is `scale(x, a b)`."""
    match op:
        case Scale(x=x, by=by) if isinstance(inner := graph.producer(x), Scale):
            return Scale(op.out, inner.x, inner.by * by)
    return None


def _merge_equal(graph: Graph) -> Graph:
    """One value per distinct computation; the key of an op is itself with a neutral result name."""
    replace: dict[str, Value] = {}
    seen: dict[Op, Value] = {}
    kept: list[Op] = []
    for original in graph.ops:
        op = original.with_operands(replace)
        if (isinstance(op, Scale) and op.by == 1.0) or (isinstance(op, Normalize) and not op.on):
            replace[op.out.name] = op.x
            continue
        key = dataclasses.replace(_ordered(op), out=Value("", op.out.type))
        if key in seen:
            replace[op.out.name] = seen[key]
        else:
            seen[key] = op.out
            kept.append(op)
    results = tuple(replace.get(r.name, r) for r in graph.results)
    return dataclasses.replace(graph, ops=tuple(kept), results=results)


def _ordered(op: Op) -> Op:
    """Operands of a commutative op in name order, so that `a + b` meets `b + a`."""
    if isinstance(op, Add) and op.a.type == op.b.type and op.b.name < op.a.name:
        return dataclasses.replace(op, a=op.b, b=op.a)
    return op


def _drop_unused(graph: Graph) -> Graph:
    needed = {r.name for r in graph.results}
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if op.out.name in needed:
            kept.append(op)
            needed |= {v.name for v in op.operands}
    params = tuple(p for p in graph.params if p.name in needed or not p.is_weight)
    return dataclasses.replace(graph, ops=tuple(reversed(kept)), params=params)
