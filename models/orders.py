"""Matrices whose columns are stored group by group: a checkpoint quantised with `desc_act` (act-order).

The order is given to the activation, once for all matrices that read it alike, so that kernels see plain groups.
Keys and values are appended to the cache by one phase: their matrices must have one order, as they have where it
comes from what both read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ..ir.errors import LoadError
from ..ir.graph import Graph, Program
from ..ir.op import Op
from ..ir.ops import Append, Linear, Reorder
from ..ir.types import TensorType, Value

Orders = dict[str, list[np.ndarray]]  # by weight name, one per layer


def reorder(program: Program, orders: Mapping[str, np.ndarray]) -> tuple[Program, dict[str, np.ndarray]]:
    """Put a `reorder` in front of every matrix with an order (keys `LAYER.NAME`), and give the vectors it reads."""
    vectors: dict[str, np.ndarray] = {}
    graphs: dict[str, Graph] = {}
    for graph in program.kinds:
        layers = program.kind_layers(graph.name)
        found = _of_graph(graph, layers, orders)
        shared = _shared(graph, found)
        _expect_one_order(graph, shared)
        graphs[graph.name] = _rewritten(graph, shared)
        for name in set(shared.values()):
            vectors |= {f"{i}.{name}_order": x for i, x in zip(layers, found[name], strict=True)}
    return program.map(lambda g: graphs.get(g.name, g)), vectors


def _of_graph(graph: Graph, layers: tuple[int, ...], orders: Mapping[str, np.ndarray]) -> Orders:
    """Of a kind of layer: a matrix without an order in some of its layers has them as they are there."""
    found: Orders = {}
    for op in graph.ops:
        if isinstance(op, Linear):
            name = op.weight.name[2:]
            if any(f"{i}.{name}" in orders for i in layers):
                plain = np.arange(op.weight.tensor.width)
                found[name] = [orders.get(f"{i}.{name}", plain) for i in layers]
    return found


def _shared(graph: Graph, found: Orders) -> dict[str, str]:
    """For each matrix the first one of its graph with equal orders, which reads the same activation."""
    reads = {op.weight.name[2:]: op.x.name for op in graph.ops if isinstance(op, Linear)}
    return {
        name: next(
            other
            for other in found
            if reads[other] == reads[name] and all(map(np.array_equal, found[other], found[name]))
        )
        for name in found
    }


def _expect_one_order(graph: Graph, shared: Mapping[str, str]) -> None:
    """LoadError unless the keys and values of every layer are made from one reordered activation."""
    for op in graph.ops:
        if isinstance(op, Append):
            keys, values = (_matrix(graph, value) for value in (op.k, op.v))
            if shared.get(keys) != shared.get(values):
                reason = f"weights `{keys}` and `{values}`: expected columns in one order (act-order), got two"
                raise LoadError(reason, hint="quantise both from the same calibration data")


def _matrix(graph: Graph, value: Value) -> str:
    """The name of the matrix whose product a value is made of."""
    op = graph.producer(value)
    while op is not None and not isinstance(op, Linear):
        op = graph.producer(op.operands[0])
    return op.weight.name[2:] if isinstance(op, Linear) else ""


def _rewritten(graph: Graph, shared: Mapping[str, str]) -> Graph:
    made: dict[str, Value] = {}
    ops: list[Op] = []
    params = list(graph.params)
    for op in graph.ops:
        name = shared.get(op.weight.name[2:]) if isinstance(op, Linear) else None
        if name is None or not isinstance(op, Linear):
            ops.append(op)
            continue
        if name not in made:
            vector = Value(f"w.{name}_order", TensorType("f32", (op.x.tensor.width,)))
            made[name] = Value(f"{op.x.name}_{name}_order", op.x.type)
            params.append(vector)
            ops.append(Reorder(made[name], op.x, vector, at=op.at))
        ops.append(dataclasses.replace(op, x=made[name]))
    return dataclasses.replace(graph, params=tuple(params), ops=tuple(ops))
