"""One sequence through the reference executor, layer by layer, so that a layer can be run again with other weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.graph import Graph, Program
from ...ir.reference import KvCache, RowBatch, evaluate, evaluate_all, running_name, weights_of

Weights = Mapping[str, Any]


class LayerRun:
    """Tokens from position 0 on, in float32 with a float32 cache; `outputs`: positions whose logits are wanted."""

    def __init__(self, program: Program, tokens: Sequence[int], outputs: Sequence[int]) -> None:
        self.program = program
        self.rows = RowBatch.of([(token, 0, i) for i, token in enumerate(tokens)], outputs)
        self._given: dict[str, Any] = {}

    @torch.no_grad()
    def enter(self, weights: Weights) -> Tensor:
        """What the first layer reads, [tokens, hidden]."""
        graph = self.program.entry
        self._given = {"rows": self.rows, **evaluate(graph, {"rows": self.rows, **weights_of(graph, -1, weights)})}
        x: Tensor = self._given[self.program.running]
        return x

    @torch.no_grad()
    def values(self, layer: int, x: Tensor, weights: Weights) -> dict[str, Any]:
        """Every value of a layer that reads x, by name; -1: of the exit, up to the logits."""
        if layer < 0:
            return self._ending(x, weights)
        graph = self._kind(layer)
        given: dict[str, Any] = {**self._given, running_name(graph): x, **weights_of(graph, layer, weights)}
        if graph.cache is not None:
            given[graph.cache.name] = KvCache.empty(graph.cache.cache, 1, len(self.rows.token))
        return evaluate_all(graph, given)

    def layer(self, layer: int, x: Tensor, weights: Weights) -> Tensor:
        """What the layer gives, [tokens, hidden]."""
        result: Tensor = self.values(layer, x, weights)[self._kind(layer).results[0].name]
        return result

    def _ending(self, x: Tensor, weights: Weights) -> dict[str, Any]:
        graph, wanted = self.program.exit, self.program.logits.name
        ends = next(i for i, op in enumerate(graph.ops) if op.out.name == wanted) + 1
        needed = [p for p in graph.params if str(p.type) != "slots"]
        graph = dataclasses.replace(graph, params=tuple(needed), ops=graph.ops[:ends])
        return evaluate_all(graph, {**self._given, running_name(graph): x, **weights_of(graph, -1, weights)})

    def logits(self, x: Tensor, weights: Weights) -> Tensor:
        """Of the outputs, [outputs, vocab]."""
        result: Tensor = self.values(-1, x, weights)[self.program.logits.name]
        return result

    def _kind(self, layer: int) -> Graph:
        return self.program.kind(self.program.layers[layer])
