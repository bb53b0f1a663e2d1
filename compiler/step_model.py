"""A step of the GPU kernel in microseconds, from the task table's schedule and the machine's data.

The step is a chain of phases with a join before each: all workers wait for the slowest of the phase before. What a
worker does in a phase takes

    start    dependent round trips to L2 before weights flow, and activations it reads there
    stream   max(bytes / its share of the bandwidth, bytes / what its loads in flight allow, instructions / issue)

The bandwidth is shared as a network is: what one worker cannot draw, the others may. While workers are held at a
join and start, memory answers what the records before have asked to be prefetched. Nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..ir.formats import FORMATS
from ..ir.graph import Graph
from ..ir.limits import SPLIT_TOKENS, partial_floats
from ..ir.ops import Attend, Embed
from ..ir.phases import Phase
from ..ir.schedule import Schedule, Section, Task, padded, part_name, parts, phase_of, unit_bytes
from .kernel_report import KernelReport
from .machines import ISSUE_LANES, Machine

INSTRUCTIONS_PER_WEIGHT = {4: 3.2, 8: 2.5}  # where no kernel was measured: what ours must not exceed, by bits
INSTRUCTIONS_PER_VALUE = 12  # of an activation or a cached key or value, all kinds of bodies
PIPELINE_STAGES = 2  # iterations ahead that asynchronous copies are issued
ROUND_TRIPS = {"pack": 2, "linear": 2, "attend": 4, "rows": 3, "sample": 6, "commit": 3}  # record, operands, store


@dataclass(frozen=True)
class Cost:
    """Of a body that reads a matrix: thread-instructions per weight, bytes a worker has in flight (None: enough)."""

    per_weight: float
    in_flight: float | None = None
    measured: bool = False


@dataclass(frozen=True)
class Work:
    """What one record asks of a worker. `memory`: bytes of weights and cache; `near`: bytes read from L2.

    trips: round trips to L2 that wait for each other; prefetched: bytes of later weights it asks for at its end.
    """

    body: str = ""
    memory: float = 0
    near: float = 0
    instructions: float = 0
    trips: int = 0
    in_flight: float | None = None
    prefetched: float = 0


def total(records: tuple[Work, ...]) -> Work:
    """All of a worker's records of one phase."""
    flights = [r.in_flight for r in records if r.in_flight is not None]
    return Work(
        "", sum(r.memory for r in records), sum(r.near for r in records), sum(r.instructions for r in records),
        sum(r.trips for r in records), min(flights, default=None), max((r.prefetched for r in records), default=0),
    )  # fmt: skip


@dataclass(frozen=True)
class PhaseTime:
    """One phase of one section: per worker, microseconds of start and stream (both 0: it has no part in it)."""

    section: str
    phase: str
    kind: str
    layers: int
    join_us: float
    bound: str  # bytes | latency | issue | join
    records: tuple[tuple[Work, ...], ...] = field(repr=False)
    start_us: tuple[float, ...] = field(repr=False)
    stream_us: tuple[float, ...] = field(repr=False)

    @cached_property
    def us(self) -> float:
        """Once, join included: until the last worker is done."""
        return self.join_us + max(a + b for a, b in zip(self.start_us, self.stream_us, strict=True))

    @property
    def memory(self) -> float:
        return sum(r.memory for records in self.records for r in records)


@dataclass(frozen=True)
class StepModel:
    """A modelled step of one row."""

    machine: Machine
    workers: int
    depth: int
    phases: tuple[PhaseTime, ...]
    assumptions: tuple[str, ...]

    @cached_property
    def us(self) -> float:
        return self.machine.launch_us + sum(p.layers * p.us for p in self.phases)

    @property
    def memory(self) -> float:
        return sum(p.layers * p.memory for p in self.phases)

    @property
    def floor_us(self) -> float:
        """Reading the same bytes at the printed bandwidth."""
        return self.machine.floor_us(self.memory)

    @property
    def of_floor(self) -> float:
        return self.floor_us / self.us


def measured_costs(found: KernelReport) -> dict[str, Cost]:
    """Costs of the bodies of a compiled kernel, by title: of the loop that serves one row."""
    costs = {}
    for body in found.bodies:
        loops = [loop for loop in body.loops if loop.kind == "vector"] or list(body.loops)
        if loops:
            worst = max(loops, key=lambda loop: loop.per_weight)
            costs[body.title] = Cost(worst.per_weight, _in_flight(worst.mix, worst.bytes), measured=True)
    return costs


def _in_flight(mix: Mapping[str, int], size: int) -> float:
    return size * (PIPELINE_STAGES if mix.get("LDGSTS") else 1)


def model(schedule: Schedule, machine: Machine, costs: Mapping[str, Cost] | None = None, depth: int = 0) -> StepModel:
    """Model one row after `depth` cached tokens, with the schedule of the `few` bucket.

    `costs` by body title, as measured in a compiled kernel; the others are taken from INSTRUCTIONS_PER_WEIGHT.
    """
    costs = costs or {}
    layers = {s.name: len(schedule.program.kind_layers(s.name)) or 1 for s in schedule.sections}
    phases: list[PhaseTime] = []
    ahead = Ahead((0.0,) * schedule.workers, 0.0)
    for section in schedule.sections:
        graph = schedule.graph(section.name)
        if section.heads:  # the section before prefetches these at its end
            ahead = Ahead(tuple(float(h.size) if h else 0.0 for h in section.heads), 0.0)
        for event, _ in section.events:
            phase = phase_of(graph, event)
            records = tuple(_records(graph, phase, section, w, costs, depth) for w in range(schedule.workers))
            timed = _time(phase, section.name, layers[section.name], records, ahead, machine, not phases)
            phases.append(timed)
            ahead = ahead.after(timed)
    return StepModel(machine, schedule.workers, depth, tuple(phases), tuple(_assumptions(machine, costs)))


@dataclass(frozen=True)
class Ahead:
    """Bytes of the next matrices that each worker has asked for, and for how long already, microseconds."""

    sizes: tuple[float, ...]
    since: float

    def after(self, phase: PhaseTime) -> Ahead:
        asked = tuple(total(records).prefetched for records in phase.records)
        if phase.kind == "linear":
            return Ahead(asked, 0.0)
        return Ahead(tuple(map(max, self.sizes, asked)), self.since + phase.us * any(self.sizes))


# ---- what a worker does -----------------------------------------------------------------------------------


def _records(
    graph: Graph, phase: Phase, section: Section, worker: int, costs: Mapping[str, Cost], depth: int
) -> tuple[Work, ...]:
    tasks = [t for t in section.queues[worker] if t.phase == phase.name]
    return tuple(_record(graph, phase, task, worker, costs, depth) for task in tasks)


def _record(graph: Graph, phase: Phase, task: Task, worker: int, costs: Mapping[str, Cost], depth: int) -> Work:
    """One record of a step of one row."""
    kind = "pack" if task.body.startswith("pack.") else phase.anchor_kind
    if kind == "linear":
        found = _matrix(graph, phase, task, costs)
    elif kind == "attend":
        found = _attend(phase, task, worker, depth)
    elif kind == "pack" or worker == 0:  # drains of one row are worker 0's
        found = _rows(graph, phase, kind, depth)
    else:
        found = Work()
    idle = not (found.memory or found.near or kind == "commit")  # the record is read, and nothing is to do
    prefetched = task.prefetch.size if task.prefetch else 0
    return replace(found, body=task.body, trips=1 if idle else ROUND_TRIPS[kind], prefetched=prefetched)


def _matrix(graph: Graph, phase: Phase, task: Task, costs: Mapping[str, Cost]) -> Work:
    part = next(p for p in parts(phase) if part_name(p) == task.body)
    weight = part[0].operands[1].tensor
    fmt, units = FORMATS[weight.dtype], task.last - task.first
    size = units * unit_bytes(phase, part)
    default = Cost(INSTRUCTIONS_PER_WEIGHT.get(4 if fmt.bits < 8 else 8, 2.0))
    cost = costs.get(f"{graph.name}.{phase.name}.{task.body}", default)
    weights = size * 8 / fmt.packed_bits
    return Work(memory=size, instructions=weights * cost.per_weight, in_flight=cost.in_flight)


def _attend(phase: Phase, task: Task, worker: int, depth: int) -> Work:
    """Tiles of (kv head, split) dealt out in turn."""
    op = phase.anchor[0]
    assert isinstance(op, Attend)
    cache = op.kv.cache
    seen = min(depth + 1, cache.window or depth + 1)
    splits = -(-seen // SPLIT_TOKENS)
    tiles = len(range(worker, splits * cache.kv_heads, task.step))
    values = tiles * 2 * cache.head_dim * min(seen, SPLIT_TOKENS)
    return Work(memory=2 * values, instructions=values * op.group * INSTRUCTIONS_PER_VALUE)


def _rows(graph: Graph, phase: Phase, kind: str, depth: int) -> Work:
    """Bodies that work on one whole row of activations."""
    values, memory = 0.0, 0.0
    for op in phase.prologue if kind == "pack" else phase.anchor:
        if isinstance(op, Embed):
            memory += FORMATS[op.table.tensor.dtype].packed_bits / 8 * op.table.tensor.width
        values += max((padded(v.tensor.width) for v in op.operands if _is_row(v)), default=0)
    if kind == "pack" and not phase.prologue:
        source = phase.anchor[0].operands[0]
        values += source.tensor.width * _partials(graph, source.name, depth)
    if kind == "sample":
        values /= 32  # greedy: maxima of tiles, not logits
    return Work(memory=memory, near=4 * values, instructions=values * INSTRUCTIONS_PER_VALUE)


def _is_row(value: object) -> bool:
    kind = getattr(value, "type", None)
    return getattr(kind, "dtype", "") == "f32" and len(getattr(kind, "shape", ())) == 2


def _partials(graph: Graph, name: str, depth: int) -> float:
    """Floats per value that a pack of attention's output reads: one partial per split."""
    producer = next((op for op in graph.ops if op.out.name == name), None)
    if not isinstance(producer, Attend):
        return 1.0
    cache = producer.kv.cache
    seen = min(depth + 1, cache.window or depth + 1)
    return -(-seen // SPLIT_TOKENS) * partial_floats(cache.head_dim) / cache.head_dim


# ---- how long it takes ------------------------------------------------------------------------------------


def _time(
    phase: Phase,
    section: str,
    layers: int,
    records: tuple[tuple[Work, ...], ...],
    ahead: Ahead,
    machine: Machine,
    first: bool,
) -> PhaseTime:
    work = [total(r) for r in records]
    join = 0.0 if first else machine.join_us
    clock = machine.boost_mhz  # per microsecond
    start = [w.trips * machine.l2_latency_us + w.near / (machine.l2_bytes_per_clock * clock) for w in work]
    issue = [w.instructions / (ISSUE_LANES * clock) for w in work]
    rate = machine.bandwidth_gb_s * 1e3 * machine.read_fraction  # bytes per microsecond, all workers
    held = ahead.since + join + min((s for s, w in zip(start, work, strict=True) if w.memory), default=0.0)
    asked = [min(a, w.memory) if phase.anchor_kind == "linear" else 0.0 for a, w in zip(ahead.sizes, work, strict=True)]
    arrived = min(1.0, held * rate / sum(asked)) if any(asked) else 0.0
    left = [w.memory - arrived * a for a, w in zip(asked, work, strict=True)]
    caps = [_cap(w, machine, rate) for w in work]
    flows = share(left, caps, rate)
    stream = [max(f, i) for f, i in zip(flows, issue, strict=True)]
    slowest = max(range(len(work)), key=lambda w: start[w] + stream[w])
    bound = _bound(work[slowest], machine, stream[slowest], issue[slowest], join + start[slowest])
    return PhaseTime(section, phase.name, phase.anchor_kind, layers, join, bound, records, tuple(start), tuple(stream))


def _cap(work: Work, machine: Machine, rate: float) -> float:
    """Bytes per microsecond that one worker can draw at most."""
    cap = machine.sm_share * rate / machine.sms
    return cap if work.in_flight is None else min(cap, work.in_flight / machine.memory_latency_us)


def _bound(work: Work, machine: Machine, stream: float, issue: float, held: float) -> str:
    if held >= stream:
        return "join"
    if issue >= 0.999 * stream:
        return "issue"
    even = machine.bandwidth_gb_s * 1e3 * machine.read_fraction / machine.sms
    slow = work.in_flight is not None and work.in_flight / machine.memory_latency_us < even
    return "latency" if slow else "bytes"


def share(sizes: list[float], caps: list[float], total: float) -> list[float]:
    """When each of several flows through one link ends: rates are as even as the flows' own limits allow.

    sizes: bytes; caps: bytes per microsecond of each; total: of the link.
    """
    left, ends, now = {i: s for i, s in enumerate(sizes) if s > 0}, [0.0] * len(sizes), 0.0
    while left:
        rates, free = {}, total
        for rank, i in enumerate(sorted(left, key=lambda i: caps[i])):
            rates[i] = min(caps[i], free / (len(left) - rank))
            free -= rates[i]
        passed = min(left[i] / rates[i] for i in left)
        now += passed
        for i in list(left):
            left[i] -= passed * rates[i]
            if left[i] <= 1e-6 * sizes[i]:
                ends[i] = now
                del left[i]
    return ends


def _assumptions(machine: Machine, costs: Mapping[str, Cost]) -> Iterator[str]:
    evidence = machine.evidence
    for key in ("bandwidth_gb_s", "read_fraction", "sm_share", "boost_mhz", "l2_bytes_per_clock", "l2_latency_us",
                "memory_latency_us", "join_us", "launch_us"):  # fmt: skip
        yield f"{key} {getattr(machine, key):g} ({evidence[key].confidence})"
    source = "of the compiled code" if costs else f"{INSTRUCTIONS_PER_WEIGHT} by bits, no kernel measured"
    yield f"thread-instructions per weight: {source}; {INSTRUCTIONS_PER_VALUE} per activation"
    yield "weights come from memory in every step, whatever fits L2; prefetched bytes come while workers are held"
