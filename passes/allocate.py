"""Decide where every value lives in the workspace, in place and reused where the order of phases allows it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..ir.access import panel_value, stored
from ..ir.bodies import attend_splits, body_names, worker_memory
from ..ir.graph import Graph
from ..ir.limits import ALIGN, partial_floats
from ..ir.ops import Attend, ElementwiseOp
from ..ir.phases import Phase
from ..ir.schedule import Buffer, Schedule, Section, padded, panel_kinds, panel_row_bytes, panel_rows, value_floats
from ..ir.types import OUTPUTS, TensorType, Value


def allocate(schedule: Schedule) -> Schedule:
    """Place logits first (alike in every bucket), carried values next, then each section's own over one another.

    A pointwise result takes its operand's place when nothing reads the operand later. Two values may share bytes when
    every phase that touches the one is known to have ended, by the waits there are, before any that touches the
    other starts. What phases that every worker repeats read or write shares with none: nobody waits for them.
    """
    plan = _Plan(schedule)
    for graph in schedule.program.graphs:
        plan.section(graph)
    return dataclasses.replace(schedule, buffers=tuple(plan.buffers))


@dataclass
class _Life:
    """A place and the numbers of the phases that touch it."""

    root: str
    phases: set[int]
    row_bytes: int
    rows: int
    private: bool
    names: list[str]


class _Plan:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.limits = schedule, schedule.limits
        self.buffers: list[Buffer] = []
        self.top = 0
        self.kept, self.copied = self._repeated()
        for model in schedule.program.models:
            name, logits = f"{model.exit.name}/{model.logits.name}", model.logits
            self._carry(name, logits)
            self._fixed(f"{name}.max", padded(logits.tensor.width) // 32 * 4, self.limits.outputs)
        for value in (value for model in schedule.program.models for value in model.entry.results):
            self._carry(f"/{value.name}", value)
        for graph in schedule.program.graphs:
            for life in self._lives(graph):
                if f"{graph.name}/{life.root}" in self.kept:
                    self._fixed(f"{graph.name}/{life.root}", life.row_bytes, life.rows)
        self.base = self.top

    def _repeated(self) -> tuple[set[str], set[str]]:
        """Places that repeated phases read or write, and those they write: of these every worker has a copy."""
        found: tuple[set[str], set[str]] = (set(), set())
        for graph in self.schedule.program.graphs:
            section = self.schedule.section(graph.name)
            for phase in graph.phases:
                if section.repeats(phase):
                    reads, writes = places(graph, phase, self._running(graph))
                    found[0].update(reads | writes)
                    found[1].update(writes)
        return found

    def _running(self, graph: Graph) -> str:
        return self.schedule.program.model_of(graph).running

    def _carry(self, name: str, value: Value) -> None:
        rows = self.limits.outputs if value.tensor.shape[0] == OUTPUTS else self.schedule.rows
        self._fixed(name, row_bytes(value), rows)

    def _fixed(self, name: str, per_row: int, rows: int) -> None:
        size, private = padded(per_row * rows, ALIGN), name in self.copied
        self.buffers.append(Buffer(name, (name,), per_row, size, self.top, private))
        self.top += size * (self.schedule.workers if private else 1)

    def section(self, graph: Graph) -> None:
        lives = self._lives(graph)
        ended = _ended(graph, self.schedule.section(graph.name))
        placed: list[tuple[_Life, int, int]] = []
        for life in sorted(lives, key=lambda x: -x.row_bytes * x.rows):
            fixed = life.root if life.root.startswith("/") else f"{graph.name}/{life.root}"
            if fixed.startswith("/") or fixed in self.kept:  # carried or kept: placed already
                self._extend(fixed, graph, life)
                continue
            size = padded(life.row_bytes * life.rows, ALIGN)
            span = size * (self.schedule.workers if life.private else 1)
            offset = _lowest(self.base, span, [(o, o + s) for x, o, s in placed if _together(x, life, ended)])
            placed.append((life, offset, span))
            name = f"{graph.name}/{life.root}"
            values = tuple(f"{graph.name}/{n}" for n in life.names)
            self.buffers.append(Buffer(name, values, life.row_bytes, size, offset, life.private))

    def _extend(self, name: str, graph: Graph, life: _Life) -> None:
        """More values for a buffer that is placed already."""
        for i, buffer in enumerate(self.buffers):
            if buffer.name == name:
                names = dict.fromkeys((*buffer.values, *(f"{graph.name}/{n}" for n in life.names)))
                self.buffers[i] = dataclasses.replace(buffer, values=tuple(names))

    def _lives(self, graph: Graph) -> list[_Life]:
        index = {op.out.name: i for i, p in enumerate(graph.phases) for op in p.ops}
        roots = storage(graph, self._running(graph))
        lives: dict[str, _Life] = {}
        for i, phase in enumerate(graph.phases):
            for value in memory_values(graph, phase):
                root = roots.get(value.name, value.name)
                if root.startswith("/"):
                    life = lives.setdefault(root, _Life(root, set(), 0, 0, False, []))
                    life.names.append(value.name)
                    continue
                if graph.is_logits(value):
                    continue
                life = lives.setdefault(root, _Life(root, set(), *self._size(graph, value), False, []))
                life.phases |= {i, *(index[o.out.name] for o in graph.users(value))}
                life.names.append(value.name)
            for body in body_names(phase):
                for name, size in worker_memory(phase, body, self.schedule.rows).items():
                    lives[name] = _Life(name, {i}, size, 1, True, [name])
            if phase.reads_matrix:
                for kind in panel_kinds(phase):
                    lives[panel_value(phase.name, kind)] = self._panel(phase, kind, i)
        return list(lives.values())

    def _panel(self, phase: Phase, kind: str, i: int) -> _Life:
        x = phase.anchor[0].operands[0].tensor
        rows = self.limits.outputs if x.shape[0] == OUTPUTS else self.schedule.rows
        rows *= panel_rows(phase.anchor[0].operands[0])
        name = panel_value(phase.name, kind)
        private = self.schedule.bucket == "few"
        return _Life(name, {i}, panel_row_bytes(kind, x.width), rows, private, [name])

    def _size(self, graph: Graph, value: Value) -> tuple[int, int]:
        """Bytes per row and rows of one value."""
        op = graph.producer(value)
        if isinstance(op, Attend):
            cache = op.kv.cache
            splits = attend_splits(self.limits, cache.window, self.schedule.bucket)
            heads = value.tensor.width // cache.head_dim
            return heads * splits * partial_floats(cache.head_dim) * 4, self.schedule.rows
        rows = self.limits.outputs if value.tensor.shape[0] == OUTPUTS else self.schedule.rows
        return row_bytes(value), rows


def row_bytes(value: Value) -> int:
    """Bytes of one row of a float32 activation, padded to whole tiles of 32."""
    return value_floats(value) * 4


def memory_values(graph: Graph, phase: Phase) -> list[Value]:
    """What a phase leaves in the workspace; tokens go to the step state."""
    kept = stored(graph, phase)
    found = [op.out for op in phase.ops if op.out.name in kept]
    return [v for v in found if isinstance(v.type, TensorType) and v.type.dtype == "f32"]


def places(graph: Graph, phase: Phase, running: str) -> tuple[set[str], set[str]]:
    """Where a phase reads and writes activations: `/x` of carried ones, `GRAPH/x` of a graph's own.

    running: the name of the first value that is carried between sections.
    """
    roots = storage(graph, running)

    def place(value: Value) -> str:
        root = roots.get(value.name, value.name)
        return root if root.startswith("/") else f"{graph.name}/{root}"

    reads = {place(v) for v in phase.reads if isinstance(v.type, TensorType) and not v.is_weight}
    return reads, {place(v) for v in memory_values(graph, phase)}


def storage(graph: Graph, running: str) -> dict[str, str]:
    """Whose place each value takes: `/x` for the running activation, an operand's for a pointwise result."""
    carried = [p for p in graph.params if isinstance(p.type, TensorType) and not p.is_weight]
    roots = {p.name: f"/{p.name}" for p in carried}
    if carried:
        roots[carried[0].name] = f"/{running}"
    kept = {p.name for p in carried[1:]} | {r.name for r in graph.results}
    order = {op.out.name: i for i, p in enumerate(graph.phases) for op in p.ops}
    for i, phase in enumerate(graph.phases):
        for op in phase.ops if phase.anchor_kind == "rows" else phase.epilogue:
            if not isinstance(op, ElementwiseOp):
                continue
            for operand in op.operands:
                read_later = any(order[u.out.name] >= i for u in graph.users(operand) if u is not op)
                mine = operand.type == op.out.type and operand.name not in kept and not operand.is_weight
                if mine and order.get(operand.name, -1) < i and not read_later:
                    roots[op.out.name] = roots.get(operand.name, operand.name)
                    break
    names = [p.name for p in graph.results if isinstance(p.type, TensorType)]
    if names:
        roots[names[0]] = f"/{running}"
    for name in names[1:]:
        roots[name] = f"/{name}"
    return roots


def _together(a: _Life, b: _Life, ended: list[set[int]]) -> bool:
    """Whether a phase of one may still run, or run already, when a phase of the other does."""
    a_first = all(i in ended[j] for i in a.phases for j in b.phases)
    b_first = all(j in ended[i] for i in a.phases for j in b.phases)
    return not (a_first or b_first)


def _ended(graph: Graph, section: Section) -> list[set[int]]:
    """For each phase, those whose tasks have all ended, on every worker, before any task of it starts.

    A worker knows the events it waited for, and what their signallers knew. Packs in front of a join of their own
    are the start of their phase.
    """
    number = {p.name: i for i, p in enumerate(graph.phases)}
    known: list[set[int]] = [set() for _ in section.queues]
    at_event: dict[str, set[int]] = {}
    ended: list[set[int]] = []
    for phase in graph.phases:
        starts = []
        for packing in (True, False):
            for w, queue in enumerate(section.queues):
                for task in (t for t in queue if t.phase == phase.name and t.body.startswith("pack.") == packing):
                    known[w] = known[w].union(*(at_event[e] for e in task.waits if e in at_event))
                    starts.append(set(known[w]))
                    if task.signal:
                        done = {number[phase.name]} if task.signal == phase.name else set()
                        at_event.setdefault(task.signal, set()).update(known[w], done)
        ended.append(set.intersection(*starts) if starts else set())
    return ended


def _lowest(base: int, size: int, taken: list[tuple[int, int]]) -> int:
    """The lowest offset from `base` where `size` bytes fit beside the `taken` ranges."""
    offset = base
    for start, end in sorted(taken):
        if offset + size <= start:
            break
        offset = max(offset, end)
    return offset
