"""Where values live: what each needs, derived from the program alone, and whether it is still there when read.

Part of `ir/validate.py`. Nothing here trusts the buffer plan: sizes come from the program and the limits, and
lifetimes from replaying a section phase by phase over the bytes each write covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from .access import ALL, Access, accesses, panel_value, stored
from .bodies import attend_splits, body_names, worker_memory
from .graph import Graph
from .limits import ALIGN, partial_floats
from .ops import Attend
from .phases import Phase
from .schedule import (
    Buffer,
    Schedule,
    Task,
    padded,
    panel_kinds,
    panel_row_bytes,
    panel_rows,
    phase_of,
    value_floats,
)
from .types import OUTPUTS, TensorType, Value

OUTSIDE = 1 << 40  # addresses from here on are caches and step state, which no buffer holds


@dataclass(frozen=True)
class Need:
    """What a value takes: bytes of one row, rows at most, and whether every worker needs its own.

    None: copies will do where each worker runs all that makes one, which is for the schedule to choose.
    """

    row_bytes: int
    rows: int
    private: bool | None = False


@dataclass(frozen=True)
class Place:
    """Bytes lo..hi of a value; `stride` tells whether two values lay out rows alike. Private: per worker."""

    lo: int
    hi: int
    stride: int
    copy_bytes: int = 0  # of a private value: one worker's share

    def of_worker(self, worker: int) -> tuple[int, int]:
        if not self.copy_bytes:
            return self.lo, self.hi
        return self.lo + worker * self.copy_bytes, self.lo + (worker + 1) * self.copy_bytes


def needs(schedule: Schedule, graph: Graph) -> dict[str, Need]:
    """Every value a section keeps in the workspace, parameters included."""
    found: dict[str, Need] = {}
    for p in graph.params:
        if isinstance(p.type, TensorType) and not p.is_weight:
            found[p.name] = _activation(schedule, p, None)
    for phase in graph.phases:
        kept = stored(graph, phase)
        for op in phase.ops:
            if op.out.name in kept and isinstance(op.out.type, TensorType) and op.out.tensor.dtype == "f32":
                found[op.out.name] = _result(schedule, graph, op.out, None if phase.anchor_kind == "rows" else False)
        found |= _extra(schedule, phase)
    return found


def _rows(schedule: Schedule, value: Value) -> int:
    return schedule.limits.outputs if value.tensor.shape[0] == OUTPUTS else schedule.rows


def _activation(schedule: Schedule, value: Value, private: bool | None) -> Need:
    return Need(4 * value_floats(value), _rows(schedule, value), private)


def _result(schedule: Schedule, graph: Graph, value: Value, private: bool | None) -> Need:
    op = graph.producer(value)
    if not isinstance(op, Attend):
        return _activation(schedule, value, private)
    cache = op.kv.cache
    partials = value.tensor.width // cache.head_dim * attend_splits(schedule.limits, cache.window, schedule.bucket)
    return Need(4 * partials * partial_floats(cache.head_dim), _rows(schedule, value))


def _extra(schedule: Schedule, phase: Phase) -> dict[str, Need]:
    """Values no op names: panels, maxima of logits, each worker's own memory."""
    own = [worker_memory(phase, body, schedule.rows) for body in body_names(phase)]
    found = {name: Need(size, 1, True) for memory in own for name, size in memory.items()}
    if phase.reads_matrix:
        x = phase.anchor[0].operands[0]
        rows = _rows(schedule, x) * panel_rows(x)
        kinds = panel_kinds(phase)
        found |= {panel_value(phase.name, k): Need(panel_row_bytes(k, x.tensor.width), rows, None) for k in kinds}
    if phase.anchor_kind in ("sample", "guess"):
        logits = phase.anchor[0].operands[0]
        found[f"{logits.name}.max"] = Need(padded(logits.tensor.width) // 32 * 4, schedule.limits.outputs)
    return found


def check_buffers(schedule: Schedule) -> list[str]:
    """Why the buffer plan cannot hold the program's values; empty when it can."""
    reasons, home = [], _homes(schedule)
    names = {g.name for g in schedule.program.graphs}
    wanted = {g.name: needs(schedule, g) for g in schedule.program.graphs}
    carried = {v.name for m in schedule.program.models for v in m.entry.results}
    for key, buffers in home.items():
        section, _, value = key.partition("/")
        known = value in carried if not section else section in names and value in wanted[section]
        if not known:
            reasons.append(f"buffer `{buffers[0].name}` holds `{key}`, which the program does not have")
        if len(buffers) > 1:
            reasons.append(f"value `{key}` is in two buffers: `{buffers[0].name}` and `{buffers[1].name}`")
    for b in schedule.buffers:
        if b.offset < 0 or b.offset % ALIGN or b.size % ALIGN:
            reasons.append(f"buffer `{b.name}`: expected whole units of {ALIGN} bytes, got {b.size} at {b.offset}")
    for section, values in wanted.items():
        for value, need in values.items():
            reasons += _fits(home, section, value, need, schedule.workers)
    return reasons + (_carried(schedule, home) if not reasons else [])


def _homes(schedule: Schedule) -> dict[str, list[Buffer]]:
    home: dict[str, list[Buffer]] = {}
    for b in schedule.buffers:
        for key in b.values:
            home.setdefault(key, []).append(b)
    return home


def _fits(home: Mapping[str, list[Buffer]], section: str, value: str, need: Need, workers: int) -> list[str]:
    buffers = home.get(f"{section}/{value}") or home.get(f"/{value}")
    if not buffers:
        return [f"section `{section}`: value `{value}` has no buffer"]
    b, what = buffers[0], f"section `{section}`: value `{value}` in buffer `{buffers[0].name}`"
    found = []
    if b.row_bytes != need.row_bytes:
        found.append(f"{what}: expected rows of {need.row_bytes} bytes, got {b.row_bytes}")
    if b.size < need.row_bytes * need.rows:
        found.append(f"{what}: expected {need.row_bytes * need.rows} bytes for {need.rows} rows, got {b.size}")
    if need.private and workers > 1 and not b.private:
        found.append(f"{what}: expected a private buffer, got one that all workers share")
    if b.private and need.private is False:
        found.append(f"{what}: expected a buffer that all workers share, got a private one")
    return found


def _carried(schedule: Schedule, home: Mapping[str, list[Buffer]]) -> list[str]:
    """A section's parameters must be where the section before left them."""
    program, reasons = schedule.program, []
    graphs = {g.name: g for g in program.graphs}
    order = [g.name for g, _ in program.sections()]
    for before, after in dict.fromkeys(pairwise(order)):
        params = [p for p in graphs[after].params if isinstance(p.type, TensorType) and not p.is_weight]
        entry = program.model_of(graphs[after]).entry.name
        for i, p in enumerate(params):
            source = (before, graphs[before].results[0].name) if i == 0 else (entry, p.name)
            here, there = schedule.buffer(after, p.name), schedule.buffer(*source)
            if _home(here) != _home(there):
                where = f"at {_home(here)}, but `{source[0]}` leaves it at {_home(there)}"
                reasons.append(f"section `{after}` reads `{p.name}` {where}")
    return reasons


def _home(b: Buffer) -> str:
    return f"{b.offset} of each worker's {b.size} bytes" if b.private else str(b.offset)


@dataclass
class Memory:
    """Addresses of one section's values. `layer` tells caches of different layers apart."""

    schedule: Schedule
    graph: Graph
    layer: int
    _known: dict[str, Place] = field(default_factory=dict)

    def place(self, value: str) -> Place:
        if value not in self._known:
            self._known[value] = self._find(value)
        return self._known[value]

    def shares_buffer(self, a: str, b: str) -> bool:
        """Whether two values live in one buffer, so that one may replace the other element by element."""
        if max(self.place(a).lo, self.place(b).lo) >= OUTSIDE:
            return self.place(a) == self.place(b)  # a cache or the step state, which are updated in place
        return self.schedule.buffer(self.graph.name, a) == self.schedule.buffer(self.graph.name, b)

    def _find(self, value: str) -> Place:
        if value == "state":
            return Place(OUTSIDE, OUTSIDE + 1, 0)
        if value in ("kv.k", "kv.v"):
            at = OUTSIDE + 2 + 2 * self.layer + (value == "kv.v")
            return Place(at, at + 1, 0)
        if any(op.out.name == value and _is_token(op.out) for op in self.graph.ops):
            return Place(OUTSIDE + 1, OUTSIDE + 2, 0)
        b = self.schedule.buffer(self.graph.name, value)
        total = b.total(self.schedule.workers)
        return Place(b.offset, b.offset + total, b.row_bytes, b.size if b.private else 0)


def _is_token(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.tensor.dtype == "i32"


Touches = tuple[tuple[tuple[Access, ...], ...], ...]  # per worker, per task


def touches(schedule: Schedule, graph: Graph) -> Touches:
    """What each task of a section reads and writes in memory; what stays inside a phase is left out."""
    inner = {p.name: {op.out.name for op in p.ops} - stored(graph, p) for p in graph.phases}
    made: dict[tuple[str, str, int, int, int], tuple[Access, ...]] = {}

    def of(task: Task) -> tuple[Access, ...]:
        key = (task.phase, task.body, task.first, task.last, task.step)
        if key not in made:
            own = worker_memory(phase_of(graph, task.phase), task.body, schedule.rows)
            found = tuple(a for a in accesses(graph, task) if a.value not in inner[task.phase])
            made[key] = found + tuple(Access(name, ALL, True) for name in own)
        return made[key]

    return tuple(tuple(of(t) for t in queue) for queue in schedule.section(graph.name).queues)


def check_lifetimes(schedule: Schedule, graph: Graph, touched: Touches) -> list[str]:
    """Run a section in program order: every read must find the value it names, not what overwrote it."""
    memory, where = Memory(schedule, graph, 0), f"section `{graph.name}`"
    reasons: list[str] = []
    tensors = [v.name for v in graph.params if isinstance(v.type, TensorType) and not v.is_weight]
    alive = {name: memory.place(name) for name in (*tensors, "kv.k", "kv.v", "state")}
    alive |= {name: Memory(schedule, owner, 0).place(name[1:]) for name, owner in _lasting(schedule, graph)}
    gone: dict[str, str] = {}
    for phase in graph.phases:
        for pack in (True, False):
            reads, writes = _at(schedule, graph, touched, phase, pack)
            for value in sorted(reads - alive.keys()):
                why = f"`{gone[value]}` overwrote it" if value in gone else "nothing wrote it before"
                reasons.append(f"{where}: phase `{phase.name}` reads `{value}`, but {why}")
            for value in sorted(writes):
                place = memory.place(value)
                for other in [o for o, p in alive.items() if o != value and p.lo < place.hi and place.lo < p.hi]:
                    if other in writes:
                        reasons.append(f"{where}: phase `{phase.name}` writes `{value}` over its `{other}`")
                    elif other in reads and not memory.shares_buffer(value, other):
                        reasons.append(f"{where}: phase `{phase.name}` writes `{value}` over `{other}` as it reads it")
                    del alive[other]
                    gone[other] = value
                alive[value] = place
    return reasons + [
        f"{where}: `{value}` is needed after it, but {_why(gone, value)}"
        for value in _left(schedule, graph)
        if value not in alive
    ]


def _why(gone: Mapping[str, str], value: str) -> str:
    return f"`{gone[value]}` overwrote it" if value in gone else "nothing wrote it"


def _left(schedule: Schedule, graph: Graph) -> list[str]:
    """What must be in place when a section ends: its results, what later sections read, the host's logits."""
    left = [r.name for r in graph.results if isinstance(r.type, TensorType)]
    program = schedule.program
    if graph.name == program.exit.name:
        return [*left, program.logits.name]
    last = program.model_of(graph).exit.name
    return left + [name for name, owner in _lasting(schedule, graph) if graph.name != last or owner == program.exit]


def _lasting(schedule: Schedule, graph: Graph) -> list[tuple[str, Graph]]:
    """What is no value of a section but must outlast it, and whose it is: what only other sections of its model
    read, and, where a model drafts, the logits that the host reads."""
    program, model = schedule.program, schedule.program.model_of(graph)
    found = [] if graph == model.entry else [(f"/{v.name}", model.entry) for v in model.entry.results[1:]]
    return found if model is program else [*found, (f"/{program.logits.name}", program.exit)]


def _at(schedule: Schedule, graph: Graph, touched: Touches, phase: Phase, pack: bool) -> tuple[set[str], set[str]]:
    """Values read and written at one moment of a section: the packs of a phase, or the rest of it."""
    found: tuple[set[str], set[str]] = (set(), set())
    for queue, accessed in zip(schedule.section(graph.name).queues, touched, strict=True):
        for task, of_task in zip(queue, accessed, strict=True):
            if task.phase == phase.name and task.body.startswith("pack.") == pack:
                for access in of_task:
                    found[access.write].add(access.value)
    return found
