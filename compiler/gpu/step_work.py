"""What each record of a step of one row asks of its worker: bytes, instructions, dependent round trips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter

from ...ir.bodies import part_of
from ...ir.formats import FORMATS
from ...ir.graph import Graph
from ...ir.limits import partial_floats
from ...ir.ops import Attend, Embed, ExpertLinear
from ...ir.phases import STATE_WRITERS, Phase
from ...ir.schedule import (
    Section,
    Task,
    packed_name,
    padded,
    panel_rows,
    part_units,
    part_weight,
    unit_bytes,
)
from ...ir.table import Asked
from ...ir.types import seen_tokens
from .kernel_report import KernelReport

INSTRUCTIONS_PER_WEIGHT = {4: 3.2, 8: 2.5}  # where no kernel was measured: what ours must not exceed, by bits
INSTRUCTIONS_PER_VALUE = 12  # of an activation or a cached key or value, all kinds of bodies
# Record, operands, store; of experts the gates and the routes as well, and of each tile its expert and its rows.
ROUND_TRIPS = {"pack": 2, "linear": 2, "experts": 4, "attend": 4, "rows": 3, "sample": 6, "commit": 3, "guess": 6}


@dataclass(frozen=True)
class Cost:
    """Of a body that reads a matrix: thread-instructions per weight, bytes a worker has in flight (None: enough).

    In flight is what one iteration of the main loop reads: it is asked for while the one before is computed.
    """

    per_weight: float
    in_flight: float | None = None


NOTHING = ("", 0.0)


@dataclass(frozen=True)
class Work:
    """What one record asks of a worker. `memory`: bytes of weights and cache; `near`: bytes read from L2.

    trips: round trips to L2 that wait for each other; reads: the matrix; asks: the later matrix it asks for at its
    end, and how many bytes of it.
    """

    body: str = ""
    memory: float = 0
    near: float = 0
    instructions: float = 0
    trips: int = 0
    in_flight: float | None = None
    reads: str = ""
    asks: tuple[str, float] = NOTHING


@dataclass(frozen=True)
class Share:
    """All of a worker's records of one phase; `reads`: the matrices."""

    memory: float
    near: float
    instructions: float
    trips: int
    in_flight: float | None
    reads: frozenset[str]
    asks: tuple[str, float]

    @classmethod
    def of(cls, records: tuple[Work, ...]) -> Share:
        return cls(
            sum(r.memory for r in records), sum(r.near for r in records), sum(r.instructions for r in records),
            sum(r.trips for r in records), min((r.in_flight for r in records if r.in_flight), default=None),
            frozenset(r.reads for r in records if r.reads),
            max((r.asks for r in records), key=itemgetter(1), default=NOTHING),
        )  # fmt: skip


def measured_costs(found: KernelReport) -> dict[str, Cost]:
    """Costs of the bodies of a compiled kernel for few rows, by title: of the loop that serves one row."""
    costs: dict[str, Cost] = {}
    for branch in found.branches:
        if branch.loops:
            cheapest = min(branch.loops, key=lambda loop: loop.per_weight)
            costs |= dict.fromkeys(branch.titles, Cost(cheapest.per_weight, cheapest.bytes))
    return costs


def phase_records(
    graph: Graph,
    phase: Phase,
    section: Section,
    worker: int,
    costs: Mapping[str, Cost],
    asked: Asked,
    depth: int,
    split: int,
) -> tuple[Work, ...]:
    tasks = [t for t in section.queues[worker] if t.phase == phase.name]
    return tuple(
        replace(
            _record(graph, phase, task, worker, costs, depth, split),
            asks=(task.prefetch.weight, float(asked.size(section, task))) if task.prefetch else NOTHING,
        )
        for task in tasks
    )


def _record(
    graph: Graph, phase: Phase, task: Task, worker: int, costs: Mapping[str, Cost], depth: int, split: int
) -> Work:
    """One record of a step of one row; `split`: tokens of an attention split."""
    kind = "pack" if task.body.startswith("pack.") else phase.anchor_kind
    if kind == "linear":
        found = _matrix(graph, phase, task, costs, task.last - task.first)
    elif kind == "experts":
        tiles = _expert_tiles(phase, task)
        found = replace(_matrix(graph, phase, task, costs, tiles), trips=tiles, reads="")
    elif kind == "attend":
        found = _attend(phase, task, worker, depth, split)
    elif kind == "pack" or task.first == 0:  # drains of one row are worker 0's
        found = _rows(graph, phase, kind, depth, split)
    else:
        found = Work()
    idle = not (found.memory or found.near or kind in STATE_WRITERS)  # the record is read, and nothing is to do
    return replace(found, body=task.body, trips=1 if idle else ROUND_TRIPS[kind] + found.trips)


def _expert_tiles(phase: Phase, task: Task) -> int:
    """Of one row: its share of the tiles of all the row's experts, or so many tiles for each unit of a sum."""
    part = part_of(phase, task.body)
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    if not phase.is_drain:
        return (task.last - task.first) * anchor.k
    tiles = anchor.k * part_units(phase, part)
    return tiles * (task.first + 1) // task.step - tiles * task.first // task.step


def _matrix(graph: Graph, phase: Phase, task: Task, costs: Mapping[str, Cost], units: int) -> Work:
    part = part_of(phase, task.body)
    fmt = FORMATS[part_weight(part).tensor.dtype]
    size = units * unit_bytes(phase, part)
    default = Cost(INSTRUCTIONS_PER_WEIGHT.get(4 if fmt.bits < 8 else 8, 2.0))
    cost = costs.get(f"{graph.name}.{phase.name}.{task.body}", default)
    weights = size * 8 / fmt.packed_bits
    return Work(memory=size, instructions=weights * cost.per_weight, in_flight=cost.in_flight, reads=packed_name(part))


def _attend(phase: Phase, task: Task, worker: int, depth: int, split: int) -> Work:
    """Tiles of (kv head, split) dealt out in turn."""
    op = phase.anchor[0]
    assert isinstance(op, Attend)
    cache = op.kv.cache
    seen = seen_tokens(depth, cache.window, cache.sinks)
    splits = -(-seen // split)
    tiles = len(range(worker, splits * cache.kv_heads, task.step))
    values = tiles * 2 * cache.head_dim * min(seen, split)
    return Work(memory=2 * values, instructions=values * op.group * INSTRUCTIONS_PER_VALUE)


def _rows(graph: Graph, phase: Phase, kind: str, depth: int, split: int) -> Work:
    """Bodies that work on one whole row of activations."""
    values, memory = 0.0, 0.0
    for op in phase.prologue if kind == "pack" else phase.anchor:
        if isinstance(op, Embed):
            memory += FORMATS[op.table.tensor.dtype].packed_bits / 8 * op.table.tensor.width
        values += max((padded(v.tensor.width) for v in op.operands if _is_row(v)), default=0)
    if kind == "pack" and not phase.prologue:
        source = phase.anchor[0].operands[0]
        values += source.tensor.width * panel_rows(source) * _partials(graph, source.name, depth, split)
    if kind in ("sample", "guess"):
        values /= 32  # greedy: maxima of tiles, not logits
    return Work(memory=memory, near=4 * values, instructions=values * INSTRUCTIONS_PER_VALUE)


def _is_row(value: object) -> bool:
    kind = getattr(value, "type", None)
    return getattr(kind, "dtype", "") == "f32" and len(getattr(kind, "shape", ())) == 2


def _partials(graph: Graph, name: str, depth: int, split: int) -> float:
    """Floats per value that a pack of attention's output reads: one partial per split."""
    producer = next((op for op in graph.ops if op.out.name == name), None)
    if not isinstance(producer, Attend):
        return 1.0
    cache = producer.kv.cache
    seen = seen_tokens(depth, cache.window, cache.sinks)
    return -(-seen // split) * partial_floats(cache.head_dim) / cache.head_dim
