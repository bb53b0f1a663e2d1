"""A step of the GPU kernel in microseconds, from the task table's schedule and the machine's data.

The step is a chain of phases with a join before each, unless every worker repeats the phase before for itself: all
workers wait for the slowest of the phase before. What a worker does in a phase takes

    start    dependent round trips to L2 before weights flow, and activations it reads there
    stream   max(bytes / its share of the bandwidth, bytes / what its loads in flight allow, instructions / issue)

The bandwidth is shared as a network is: what one worker cannot draw, the others may. While workers are held at a
join, start, or draw less than memory could send, it sends what was asked for ahead (step_ahead.py). Nothing here
was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ...ir.phases import Phase
from ...ir.schedule import Schedule
from ...ir.table import Asked
from .machines import ISSUE_LANES, Machine
from .step_ahead import Ahead, Ask
from .step_work import INSTRUCTIONS_PER_VALUE, INSTRUCTIONS_PER_WEIGHT, Cost, Share, Work, phase_records


@dataclass(frozen=True)
class PhaseTime:
    """One phase of one section: per worker, microseconds of start and stream (both 0: it has no part in it)."""

    section: str
    phase: str
    kind: str
    layers: int
    join_us: float
    bound: str  # bytes, issue, join, or worker: what one worker draws alone, while memory could give more
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


def model(schedule: Schedule, machine: Machine, costs: Mapping[str, Cost] | None = None, depth: int = 0) -> StepModel:
    """Model one row after `depth` cached tokens, with the schedule of the `few` bucket.

    `costs` by body title, as measured in a compiled kernel; the others are taken from INSTRUCTIONS_PER_WEIGHT.
    """
    costs = costs or {}
    layers = {s.name: schedule.program.runs(schedule.graph(s.name)) for s in schedule.sections}
    phases: list[PhaseTime] = []
    asked = Asked(schedule, machine.ahead_bytes(schedule.tuning["ahead_part"]))
    ahead, joined = Ahead(schedule.workers), False
    for section in schedule.sections:
        graph = schedule.graph(section.name)
        if section.heads:  # the section before asks for these at its end
            sizes = [float(asked.head(section, w)) for w in range(schedule.workers)]
            ahead.ask((h.weight if h else "", size) for h, size in zip(section.heads, sizes, strict=True))
        for phase in graph.phases:
            records = tuple(
                phase_records(graph, phase, section, w, costs, asked, depth, schedule.limits.split_tokens)
                for w in range(schedule.workers)
            )
            phases.append(_time(phase, section.name, layers[section.name], records, ahead, machine, joined))
            ahead.ask(Share.of(r).asks for r in records)
            joined = not section.repeats(phase)
    return StepModel(machine, schedule.workers, depth, tuple(phases), tuple(_assumptions(machine, costs)))


# ---- how long it takes ------------------------------------------------------------------------------------


def _time(
    phase: Phase,
    section: str,
    layers: int,
    records: tuple[tuple[Work, ...], ...],
    ahead: Ahead,
    machine: Machine,
    joined: bool,
) -> PhaseTime:
    work = [Share.of(r) for r in records]
    join = machine.join_us if joined else 0.0
    clock = machine.boost_mhz  # per microsecond
    port = machine.l2_bytes_per_clock * clock  # of one worker: bytes per microsecond from L2
    rate = machine.bandwidth_gb_s * 1e3 * machine.read_fraction  # of memory, for all workers
    start = [w.trips * machine.l2_latency_us + w.near / port for w in work]
    ahead.serve(rate * (join + min((s for s, w in zip(start, work, strict=True) if w.memory), default=max(start))))
    asks = ahead.use(w.reads for w in work)
    flows = [_flow(w, ask, machine, rate) for w, ask in zip(work, asks, strict=True)]
    ends = share([size for size, _ in flows], [cap for _, cap in flows], rate)
    alone = [_alone(w, ask, machine, rate) for w, ask in zip(work, asks, strict=True)]
    issue = [w.instructions / (ISSUE_LANES * clock) for w in work]
    stream = [max(times) for times in zip(ends, alone, issue, strict=True)]
    ahead.serve(max(0.0, rate * max(stream) - sum(size for size, _ in flows)))
    slowest = max(range(len(work)), key=lambda w: start[w] + stream[w])
    bound = _bound(join + start[slowest], stream[slowest], issue[slowest], alone[slowest])
    return PhaseTime(section, phase.name, phase.anchor_kind, layers, join, bound, records, tuple(start), tuple(stream))


def _flow(work: Share, ask: Ask | None, machine: Machine, rate: float) -> tuple[float, float]:
    """Bytes that memory still has to send for a worker, and how fast it could take them."""
    if ask is None:
        return work.memory, _cap(work, machine, rate)
    own = work.memory - ask.size
    left = own + ask.left
    return left, _cap(work, machine, rate) * left / own if own > 0 else rate


def _alone(work: Share, ask: Ask | None, machine: Machine, rate: float) -> float:
    """Microseconds the worker would take if no other drew anything: first what L2 holds, then the rest."""
    held = ask.size if ask else 0.0
    port = machine.l2_bytes_per_clock * machine.boost_mhz
    near = port if work.in_flight is None else min(port, work.in_flight / machine.l2_latency_us)
    return held / near + (work.memory - held) / _cap(work, machine, rate)


def _cap(work: Share, machine: Machine, rate: float) -> float:
    """Bytes per microsecond that one worker can draw from memory at most."""
    cap = machine.sm_share * rate / machine.sms
    return cap if work.in_flight is None else min(cap, work.in_flight / machine.memory_latency_us)


def _bound(held: float, stream: float, issue: float, alone: float) -> str:
    """What the slowest worker's time is made of; `alone`: its stream if no other worker drew anything."""
    if held >= stream:
        return "join"
    if issue >= 0.999 * stream:
        return "issue"
    return "worker" if alone >= 0.9 * stream else "bytes"


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
    per_weight = sorted({round(cost.per_weight, 2) for cost in costs.values()})
    flights = sorted({round(cost.in_flight / 1024) for cost in costs.values() if cost.in_flight})
    weight = f"{per_weight}, counted in the code" if costs else f"{INSTRUCTIONS_PER_WEIGHT} by bits, no kernel counted"
    yield f"thread-instructions per weight {weight}; {INSTRUCTIONS_PER_VALUE} per activation"
    yield f"KiB in flight per worker {flights}" if costs else "loads in flight: enough for the bandwidth"
    yield "weights come from memory in every step; what L2 is asked for ahead comes at memory's own rate"
