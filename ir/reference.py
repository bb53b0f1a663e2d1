"""The oracle: evaluate graphs and whole programs op by op in torch float32, as each op's `reference` says.

`evaluate` runs one Graph on given inputs. `ReferenceModel` runs a Program step by step over rows, with the
caches and slots as plain values, and is what every compiled step is compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CompileError, nearest
from .graph import Graph, Program
from .sampling import Sampling, sample
from .types import CacheType, TensorType

RUNNING, STOPPED, LENGTH, INVALID = range(4)  # `slot_finished` of the step state


@dataclass(frozen=True)
class RowBatch:
    """The rows of a step: token, slot and position [R], and which rows want logits [L]; all int64."""

    token: Tensor
    slot: Tensor
    position: Tensor
    outputs: Tensor

    @staticmethod
    def of(rows: Sequence[tuple[int, int, int]], outputs: Sequence[int]) -> RowBatch:
        """From (token, slot, position) triples and row indices."""
        token, slot, position = torch.tensor(list(rows), dtype=torch.int64).reshape(-1, 3).T
        return RowBatch(token, slot, position, torch.tensor(list(outputs), dtype=torch.int64))


@dataclass(frozen=True)
class KvCache:
    """Keys and values of one layer, [slots, positions, kv_heads, head_dim]; `bf16` rounds what is stored."""

    keys: Tensor
    values: Tensor
    bf16: bool = False

    @staticmethod
    def empty(kind: CacheType, slots: int, positions: int, bf16: bool = False) -> KvCache:
        shape = (slots, positions, kind.kv_heads, kind.head_dim)
        return KvCache(torch.zeros(shape), torch.zeros(shape), bf16)

    def append(self, k: Tensor, v: Tensor, rows: RowBatch) -> KvCache:
        """A new cache with each row's key and value [R, kv_heads * head_dim] at its slot and position."""
        return KvCache(self._put(self.keys, k, rows), self._put(self.values, v, rows), self.bf16)

    def _put(self, cache: Tensor, new: Tensor, rows: RowBatch) -> Tensor:
        cache = cache.clone()
        new = new.bfloat16().float() if self.bf16 else new
        cache[rows.slot, rows.position] = new.view(-1, *cache.shape[2:])
        return cache


@dataclass(frozen=True)
class Slot:
    """One live sequence: how it samples, where it ends, what it has produced."""

    sampling: Sampling = field(default_factory=Sampling)
    limit: int = 1 << 30  # positions it may fill
    stop: frozenset[int] = frozenset()
    seen: frozenset[int] = frozenset()
    tokens: tuple[int, ...] = ()
    finished: int = RUNNING


@dataclass(frozen=True)
class Slots:
    """All slots, and the rows the last commit wrote for the next step: (token, slot, position)."""

    states: tuple[Slot, ...]
    rows: tuple[tuple[int, int, int], ...] = ()

    def sample(self, logits: Tensor, rows: RowBatch) -> Tensor:
        """One token per output, -1 where the logits are not finite."""
        chosen = []
        for j, row in enumerate(rows.outputs.tolist()):
            slot = self.states[int(rows.slot[row])]
            seen = np.zeros(logits.shape[1], bool)
            seen[list(slot.seen)] = True
            chosen.append(sample(logits[j].numpy(), slot.sampling, seen, int(rows.position[row])))
        return torch.tensor(chosen, dtype=torch.int32)

    def commit(self, token: Tensor, rows: RowBatch) -> Slots:
        """The slots after the step, with the decode rows of the next one."""
        states, following = list(self.states), []
        for slot, seen in zip(rows.slot.tolist(), rows.token.tolist(), strict=True):
            states[slot] = dataclasses.replace(states[slot], seen=states[slot].seen | {seen})
        for j, row in enumerate(rows.outputs.tolist()):
            slot, position, new = int(rows.slot[row]), int(rows.position[row]), int(token[j])
            states[slot] = _committed(states[slot], new, position)
            if states[slot].finished == RUNNING:
                following.append((new, slot, position + 1))
        return Slots(tuple(states), tuple(following))


def _committed(slot: Slot, token: int, position: int) -> Slot:
    if token < 0:
        return dataclasses.replace(slot, finished=INVALID)
    end = STOPPED if token in slot.stop else LENGTH if position + 2 > slot.limit else RUNNING
    return dataclasses.replace(slot, tokens=(*slot.tokens, token), seen=slot.seen | {token}, finished=end)


def evaluate(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a graph by name; `inputs` holds every parameter by name (weights as `w.NAME`)."""
    values = evaluate_all(graph, inputs)
    return {r.name: values[r.name] for r in graph.results}


def evaluate_all(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a graph by name."""
    for p in graph.params:
        if p.name not in inputs:
            raise CompileError(f"graph `{graph.name}`: expected an input `{p.name}`", hint=nearest(p.name, inputs))
    values = {p.name: inputs[p.name] for p in graph.params}
    for op in graph.ops:
        values[op.out.name] = op.reference(*(values[v.name] for v in op.operands))
    return values


@dataclass(frozen=True)
class StepResult:
    """What a step gave: logits [L, vocab], the token chosen for each output [L]."""

    logits: Tensor
    tokens: Tensor


@dataclass
class ReferenceModel:
    """A program run in float32, step by step.

    `weights` maps `name` (the model's own) and `LAYER.name` to dequantised arrays, as `models/importer` keys
    them; it may compute them on demand. `bf16_cache` rounds the cache as a compiled step does.
    """

    program: Program
    weights: Mapping[str, Any]
    slots: int = 1
    positions: int = 4096
    bf16_cache: bool = False
    state: Slots = field(init=False)
    caches: list[KvCache] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every sequence."""
        self.state = Slots((Slot(),) * self.slots)
        self.caches = []
        for name in self.program.layers:
            cache = self.program.kind(name).cache
            kind = cache.cache if cache else CacheType(0, 0, 0)
            self.caches.append(KvCache.empty(kind, self.slots, self.positions, self.bf16_cache))

    def start(self, slot: int, state: Slot) -> None:
        """Begin a sequence in a slot (its old cache is overwritten as positions fill)."""
        states = (*self.state.states[:slot], state, *self.state.states[slot + 1 :])
        rows = tuple(r for r in self.state.rows if r[1] != slot)
        self.state = Slots(states, rows)

    @torch.no_grad()
    def step(self, rows: RowBatch) -> StepResult:
        """Compute one step; `self.state.rows` then holds the decode rows of the next."""
        fixed = {"rows": rows, "slots": self.state}
        entry = evaluate(self.program.entry, fixed | weights_of(self.program.entry, -1, self.weights))
        running = next(iter(entry.values()))
        for layer, name in enumerate(self.program.layers):
            running = self._layer(self.program.kind(name), layer, fixed | entry, running)
        last = self.program.exit
        own = weights_of(last, -1, self.weights)
        values = evaluate_all(last, {**fixed, **entry, running_name(last): running, **own})
        self.state = values[last.results[0].name]
        chosen = next(op for op in last.ops if op.name == "sample")
        return StepResult(values[chosen.operands[0].name], values[chosen.out.name])

    def _layer(self, graph: Graph, layer: int, given: Mapping[str, Any], running: Tensor) -> Tensor:
        values = {**given, running_name(graph): running, **weights_of(graph, layer, self.weights)}
        cache = graph.cache
        if cache is not None:
            values[cache.name] = self.caches[layer]
        values = evaluate_all(graph, values)
        if cache is not None:
            self.caches[layer] = next(
                values[op.out.name] for op in reversed(graph.ops) if isinstance(op.out.type, CacheType)
            )
        result: Tensor = values[graph.results[0].name]
        return result

    def generate(
        self, prompt: Sequence[int], tokens: int, sampling: Sampling | None = None, stop: Sequence[int] = ()
    ) -> list[int]:
        """Up to `tokens` new tokens after `prompt`, alone in slot 0."""
        limit = len(prompt) + tokens - 1  # the last token needs no row
        self.start(0, Slot(sampling or Sampling(), limit, frozenset(stop), frozenset(prompt)))
        self.step(RowBatch.of([(t, 0, i) for i, t in enumerate(prompt)], [len(prompt) - 1]))
        while self.state.rows:
            self.step(RowBatch.of(self.state.rows, range(len(self.state.rows))))
        return list(self.state.states[0].tokens)


def weights_of(graph: Graph, layer: int, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights a graph of layer `layer` takes (-1: it is of no layer), float32, by parameter."""
    prefix = "" if layer < 0 else f"{layer}."
    found = {}
    for p in graph.weights:
        key = prefix + p.name.removeprefix("w.")
        if key not in weights:
            raise CompileError(f"expected a weight `{key}`", hint=nearest(key, weights))
        found[p.name] = torch.as_tensor(weights[key], dtype=torch.float32)
    return found


def running_name(graph: Graph) -> str:
    """The parameter that takes the running activation."""
    return next(p.name for p in graph.params if isinstance(p.type, TensorType) and not p.is_weight)
