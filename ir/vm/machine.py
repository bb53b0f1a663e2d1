"""Runs a task table: workers as coroutines, interleaved task by task by a seeded scheduler.

Only waits and signals order anything. `poison` fills the workspace with not-a-number before every step and the
cache at the start, so that what was not written in time shows in the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..bodies import BodyArgs, all_bodies
from ..errors import VerifyError
from ..graph import Graph, Program
from ..limits import ALIGN, state_fields
from ..phases import Phase
from ..reference import Slot
from ..schedule import Schedule
from ..table import ARGS, END, FIELDS, Arg, Body, WeightPlan, cache_groups, event_count, lower
from .bodies import Call
from .memory import Cache, State, Workspace

ORDERS = ("random", "lowest", "highest", "burst")
WORD = {name: i for i, name in enumerate(FIELDS)}

Waits = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Outcome:
    """What a step left: the chosen tokens [outputs] and the logits [outputs, vocab]."""

    tokens: tuple[int, ...]
    logits: torch.Tensor


class _Table:
    """One bucket's records and how to read their arguments."""

    def __init__(self, schedule: Schedule, plan: WeightPlan) -> None:
        program = schedule.program
        groups = cache_groups(program)
        args = BodyArgs(program, schedule.limits, schedule.bucket, groups)
        self.schedule = schedule
        self.bodies: list[tuple[Graph, Phase, str, dict[str, Arg]]] = []
        codes: dict[tuple[str, str, str], Body] = {}
        for graph, phase, name in all_bodies(program):
            named = args.of(graph, phase, name)
            codes[graph.name, phase.name, name] = Body(len(self.bodies), tuple(named.values()))
            self.bodies.append((graph, phase, name, named))
        self.records = lower(schedule, codes, plan)
        self.events = event_count(schedule)


class VirtualMachine:
    """The step of one program. `schedules` holds one schedule, or one for each bucket; `weights` are dequantised
    arrays by `name` or `LAYER.name`."""

    def __init__(self, schedules: Mapping[str, Schedule], weights: Mapping[str, Any], poison: bool = True) -> None:
        one = next(iter(schedules.values()))
        self.program, self.limits, self.poison = one.program, one.limits, poison
        groups = cache_groups(self.program)
        plan, self._prefixes = _plan(self.program, BodyArgs(self.program, self.limits, one.bucket, groups))
        self.tables = {bucket: _Table(s, plan) for bucket, s in schedules.items()}
        self.weights = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in weights.items()}
        self.vocab = self.program.logits.tensor.width
        self.state = State(state_fields(self.limits, self.vocab, len(groups), self.program.routing))
        self.caches = [Cache(g, self.limits, torch.nan if poison else 0.0) for g in groups]
        for i, cache in enumerate(self.caches):
            self.state.pages[i] = cache.page_table(self.limits.slots, self.limits.pages)
        self.space = Workspace(max(s.workspace_bytes for s in schedules.values()))

    def start(self, slot: int, how: Slot, prompt: Sequence[int] = (), drafts: int = 0) -> None:
        """Begin a sequence in a slot; to have drafts, up to `drafts` a step, it needs its prompt."""
        s, sampling = self.state, how.sampling
        s.slot_finished[slot] = s.slot_count[slot] = 0
        s.slot_limit[slot] = min(how.limit, self.limits.context)
        s.slot_stop[slot] = -1
        s.slot_stop[slot, : len(how.stop)] = sorted(how.stop)
        s.slot_temperature[slot], s.slot_top_k[slot] = sampling.temperature, sampling.top_k
        s.slot_top_p[slot], s.slot_min_p[slot] = sampling.top_p, sampling.min_p
        s.slot_penalty[slot], s.slot_seed[slot] = sampling.repetition_penalty, sampling.seed
        s.slot_stream[slot] = sampling.stream
        if self.limits.drafts:
            s.slot_drafts_most[slot] = s.slot_drafts[slot] = drafts
            s.slot_steps[slot] = s.slot_drafted[slot] = s.slot_accepted[slot] = 0
            s.slot_history[slot, : len(prompt)] = prompt
        if self.limits.has_draft_model:
            s.slot_followed[slot] = 0
        s.slot_seen[slot] = 0
        for token in how.seen:
            s.slot_seen[slot, token // 32] |= np.uint32(1 << token % 32)

    def set_rows(self, rows: list[tuple[int, int, int]], outputs: list[int]) -> None:
        """The rows of the next step, (token, slot, position) each, and which of them want logits."""
        s, n, m = self.state, len(rows), len(outputs)
        s.n_rows[0], s.n_outputs[0] = n, m
        s.row_token[:n], s.row_slot[:n], s.row_position[:n] = np.array(rows, np.int32).T
        s.row_output[:n] = -1
        if self.limits.drafts:
            s.row_draft[:n] = 0
        s.output_row[:m] = outputs
        s.row_output[outputs] = np.arange(m)

    def rows(self) -> list[tuple[int, int, int]]:
        """The rows the next step has, as the last commit left them."""
        s, n = self.state, int(self.state.n_rows[0])
        return list(zip(s.row_token[:n].tolist(), s.row_slot[:n].tolist(), s.row_position[:n].tolist(), strict=True))

    @torch.no_grad()
    def step(self, order: str = "random", seed: int = 0) -> Outcome:
        """Run one step on the rows in the state; VerifyError if the workers wait for one another forever."""
        few = int(self.state.n_rows[0]) <= min(self.limits.few_rows, self.limits.rows)
        table = self.tables.get("few" if few else "many") or next(iter(self.tables.values()))
        outputs = int(self.state.n_outputs[0])
        if self.poison:
            self.space.poison()
        counts = [0] * table.events
        workers = [self._worker(table, queue, counts) for queue in table.records]
        pending = {w: waits for w, worker in enumerate(workers) if (waits := next(worker, None)) is not None}
        choose = _Chooser(order, seed)
        while pending:
            ready = [w for w, waits in pending.items() if all(counts[e] >= target for e, target in waits)]
            if not ready:
                raise _deadlock(pending, counts)
            w = choose(ready)
            following = next(workers[w], None)
            if following is None:
                del pending[w]
            else:
                pending[w] = following
        return self._outcome(table, outputs)

    def _outcome(self, table: _Table, outputs: int) -> Outcome:
        last = self.program.exit
        at = table.schedule.buffer(last.name, self.program.logits.name).offset
        logits = self.space.rows(at, outputs, self.vocab)
        return Outcome(tuple(self.state.output_token[:outputs].tolist()), logits.clone())

    def _worker(self, table: _Table, queue: np.ndarray, counts: list[int]) -> Iterator[Waits]:
        """Yields what the next task waits for; runs that task when resumed."""
        for record in queue.tolist():
            if record[WORD["body"]] == END:
                return
            pairs = [(record[WORD[f"wait{i}"]], record[WORD[f"target{i}"]]) for i in (0, 1)]
            yield tuple((e, t) for e, t in pairs if e >= 0)
            self._run(table, record)
            if record[WORD["signal"]] >= 0:
                counts[record[WORD["signal"]]] += 1

    def _run(self, table: _Table, record: list[int]) -> None:
        graph, phase, body, named = table.bodies[record[WORD["body"]]]
        args: dict[str, Any] = {}
        for i, (name, arg) in enumerate(named.items()):
            word = record[ARGS + i]
            args[name] = word if arg.kind in ("number", "layer") else word * ALIGN
            if arg.kind == "weight":
                args[name] = self._prefixes[word]
        first, last, step, layer = (record[WORD[f]] for f in ("first", "last", "step", "layer"))
        Call(
            graph, phase, body, first, last, step, layer, args,
            self.space, self.state, self.caches, self.weights, self.limits,
        ).run()  # fmt: skip


class _Chooser:
    """Which of the workers that may go on does. `random` favours some workers for a while, so that others lag."""

    def __init__(self, order: str, seed: int) -> None:
        assert order in ORDERS, order
        self.order, self.random = order, np.random.default_rng(seed)
        self.favour: dict[int, float] = {}
        self.current = -1

    def __call__(self, ready: list[int]) -> int:
        if self.order == "lowest":
            return min(ready)
        if self.order == "highest":
            return max(ready)
        if self.order == "burst" and self.current in ready:
            return self.current
        if self.random.random() < 0.05:
            self.favour.clear()
        weights = np.array([self.favour.setdefault(w, float(np.exp(3 * self.random.normal()))) for w in ready])
        self.current = int(self.random.choice(ready, p=weights / weights.sum()))
        return self.current


def _deadlock(pending: Mapping[int, Waits], counts: list[int]) -> VerifyError:
    return VerifyError(
        [
            f"deadlock: worker {w} waits for event {e}: expected {target} signals, got {counts[e]}"
            for w, waits in pending.items()
            for e, target in waits
            if counts[e] < target
        ]
    )


def _plan(program: Program, args: BodyArgs) -> tuple[WeightPlan, dict[int, str]]:
    """An offset for every weight a record may name, and the key prefix (layer) that each offset stands for."""
    offsets: dict[str, int] = {}
    prefixes: dict[int, str] = {}
    for graph, phase, body in all_bodies(program):
        layers = program.kind_layers(graph.name) or (-1,)
        for arg in args.of(graph, phase, body).values():
            for layer in layers if arg.kind == "weight" else ():
                prefix = "" if layer < 0 else f"{layer}."
                word = offsets.setdefault(prefix + arg.name, len(offsets) * ALIGN) // ALIGN
                prefixes[word] = prefix
    return WeightPlan(offsets, dict.fromkeys(offsets, ALIGN)), prefixes
