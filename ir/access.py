"""What a task reads and writes: the facts that synchronisation, allocation and validation share.

An access names a value, the part of it that is touched, and whether it is written. Parts:

    columns lo..hi   these columns of every row (a matrix part's tiles)
    rows first/step  rows first, first + step, ... (a drain; two drains of one step never meet)
    tiles first/step tiles of a drain: (row group, head, split) of attention, (active expert, unit) of experts
    all              everything

Besides a graph's own values there are panels, `VALUE.max` (the largest of each 32 logits), `kv.k` and `kv.v` (the
layer's cache) and `state`: the rows and slots, which every task reads and commit and guess overwrite. Which
experts a layer's rows have is noted in the step state by one task per layer, for the host alone: no access.
"""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Graph
from .op import Op
from .ops import Append, Combine, ExpertLinear, Select
from .phases import STATE_WRITERS, Phase
from .schedule import Task, panel_kind, panel_rows, part_name, part_weight, parts, phase_of
from .types import CacheType, TensorType, Value


@dataclass(frozen=True)
class Region:
    """Part of a value; `kind` is columns, rows, tiles or all."""

    kind: str
    first: int = 0
    last: int = 0  # columns: exclusive end; rows, tiles: the step

    def meets(self, other: Region) -> bool:
        """Whether two parts of the same value may share a byte."""
        if self.kind != other.kind or self.kind == "all":
            return True
        if self.kind == "columns":
            return self.first < other.last and other.first < self.last
        return self.last != other.last or self.first % self.last == other.first % other.last


@dataclass(frozen=True)
class Access:
    value: str
    region: Region
    write: bool


ALL = Region("all")


def panel_value(phase: str, kind: str) -> str:
    """The name under which an activation panel appears among the values of a section."""
    return f"{phase}.panel.{kind}"


def accesses(graph: Graph, task: Task) -> tuple[Access, ...]:
    """Reads and writes of one task; weights are constant and left out."""
    phase = phase_of(graph, task.phase)
    return (*_values(graph, phase, task), Access("state", ALL, phase.anchor_kind in STATE_WRITERS))


def _values(graph: Graph, phase: Phase, task: Task) -> tuple[Access, ...]:
    if task.body.startswith("pack."):
        return _pack(phase, task)
    if phase.reads_matrix:
        part = next(p for p in parts(phase) if part_name(p) == task.body)
        return _matrix(graph, phase, part, task)
    if phase.anchor_kind == "sample":
        return _sample(phase, task)
    if phase.anchor_kind == "guess":
        logits = phase.anchor[0].operands[0].name
        return Access(logits, ALL, False), Access(f"{logits}.max", ALL, False)
    kind = {"attend": "tiles", "commit": "all"}.get(phase.anchor_kind, "rows")
    region = Region(kind, task.first, task.step) if kind != "all" else ALL
    return _whole_rows(phase, region)


def _is_data(value: Value) -> bool:
    return not value.is_weight and isinstance(value.type, TensorType | CacheType)


def _pack(phase: Phase, task: Task) -> tuple[Access, ...]:
    """The prologue reads whole rows and fills a panel; a drained pack (step > 1 or live) shares it by rows."""
    read = {v.name for op in phase.prologue for v in op.operands if _is_data(v)}
    read |= {phase.anchor[0].operands[0].name}
    read -= {op.out.name for op in phase.prologue}
    anchor = phase.anchor[0]
    if isinstance(anchor, ExpertLinear) and panel_rows(anchor.x) > 1:
        read.add(anchor.gates.name)
    panel = panel_value(phase.name, task.body.removeprefix("pack."))
    part = ALL if task.step == 1 and task.first == 0 else Region("rows", task.first, task.step)
    return (*(Access(v, ALL, False) for v in sorted(read)), Access(panel, part, True))


def _matrix(graph: Graph, phase: Phase, part: tuple[Op, ...], task: Task) -> tuple[Access, ...]:
    found = [Access(panel_value(phase.name, panel_kind(part_weight(part))), ALL, False)]
    found += [Access(v.name, ALL, False) for v in dict.fromkeys(part[0].operands[1:]) if _is_data(v)]  # gates
    columns = Region("columns", task.first * phase.unit, task.last * phase.unit)
    if phase.is_drain:
        columns = Region("tiles", task.first, task.step)
    made = {op.out.name for op in (*phase.anchor, *phase.epilogue)}
    chain = [op for anchor in part for op in phase.epilogue_of(anchor)]
    for op in dict.fromkeys(chain):
        for value in op.operands:
            if value.name in made or not _is_data(value):
                continue
            if isinstance(value.type, CacheType):
                continue
            wide = value.tensor.shape == op.out.tensor.shape if not isinstance(op, Append) else False
            found.append(Access(value.name, columns if wide else ALL, False))
    for op in part + tuple(dict.fromkeys(chain)):
        if isinstance(op, Append):
            found.append(Access(f"kv.{_half(phase, part, op)}", columns, True))
        elif op.out.name in stored(graph, phase):
            found.append(Access(op.out.name, columns, True))
            if graph.is_logits(op.out):
                found.append(Access(f"{op.out.name}.max", Region("columns", task.first, task.last), True))
    return tuple(found)


def _sample(phase: Phase, task: Task) -> tuple[Access, ...]:
    """A row of logits and its maxima, which the repetition penalty changes in place, and the token."""
    logits, token = phase.anchor[0].operands[0].name, phase.anchor[0].out.name
    row = Region("rows", task.first, task.step)
    both = [Access(name, row, write) for name in (logits, f"{logits}.max") for write in (False, True)]
    return (*both, Access(token, row, True))


def _half(phase: Phase, part: tuple[Op, ...], append: Append) -> str:
    """Whether a part makes the keys or the values of an append."""
    made = {part[0].out.name} | {op.out.name for op in phase.epilogue_of(part[0])}
    return "k" if append.k.name in made else "v"


def _whole_rows(phase: Phase, region: Region) -> tuple[Access, ...]:
    """Drains over rows (or attention tiles): operands read wherever they are, results written by tile."""
    found: list[Access] = []
    made = {op.out.name for op in phase.ops}
    row_local = phase.anchor_kind == "rows"
    for op in phase.ops:
        for value in op.operands:
            if value.name in made or not _is_data(value):
                continue
            if isinstance(value.type, CacheType):
                found += [Access("kv.k", ALL, False), Access("kv.v", ALL, False)]
            else:
                # Select takes a row by its index among the outputs, which is no row of the task's own.
                own = row_local and not isinstance(op, Select)
                found.append(Access(value.name, region if own else ALL, False))
        if isinstance(op, Append):
            found += [Access("kv.k", region, True), Access("kv.v", region, True)]
        elif isinstance(op.out.type, TensorType):
            found.append(Access(op.out.name, region, True))
    return tuple(found)


def stored(graph: Graph, phase: Phase) -> set[str]:
    """Values of a phase that must be in memory: another phase or section reads them, or they are sums over a row's
    experts, which grow from one expert to the next."""
    made = {op.out.name for op in phase.ops}
    results = {r.name for r in graph.results}

    def needed(op: Op) -> bool:
        name = op.out.name
        return name in results or isinstance(op, Combine) or not graph.readers.get(name, made) <= made

    return {op.out.name for op in phase.ops if isinstance(op.out.type, TensorType) and needed(op)}
