"""The task table: a Schedule lowered to fixed-size integer records, one list per worker.

Three executors run the same table: the Python VM (`ir/vm.py`), the CPU step and the GPU kernel. A record is
RECORD_WORDS int32; offsets are in units of ALIGN bytes, so that 32 bits reach every weight and loads stay
provably aligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .errors import expect
from .graph import Graph, Program
from .limits import ALIGN
from .record import ARGS, END, FIELDS, MAX_WAITS, RECORD_WORDS
from .schedule import PREVIOUS, Schedule, Section, Task
from .stream import ChunkBlocks, chunk_count
from .tuning import CHOICES
from .types import CacheType

__all__ = [
    "AHEAD_BYTES", "ARGS", "END", "FIELDS", "MAX_WAITS", "RECORD_WORDS", "Arg", "Asked", "Body", "CacheGroup",
    "WeightPlan", "cache_groups", "event_count", "lower",
]  # fmt: skip

# Per worker; measured on CPUs: enough to bridge a join, small against a core's L2 cache.
AHEAD_BYTES = CHOICES["ahead"].default


@dataclass(frozen=True)
class Arg:
    """One argument of a body: the offset of a packed weight or of a value, a plain number, or the layer's."""

    kind: str  # weight | value | number | layer
    name: str = ""
    number: int = 0


@dataclass(frozen=True)
class Body:
    """Generated code of one (phase, body): its number in the dispatcher and its arguments."""

    code: int
    args: tuple[Arg, ...]


@dataclass(frozen=True)
class WeightPlan:
    """Where packed weights are: bytes from the start of the weight data.

    `offsets[name]` for the model's own (entry, exit), `offsets["LAYER.name"]` for a layer's.
    """

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]

    def offset(self, name: str, layer: int) -> int:
        return self.offsets[name if layer < 0 else f"{layer}.{name}"]


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose caches have the same shape share a pool of pages."""

    type: CacheType
    layers: tuple[int, ...]


def cache_groups(program: Program) -> tuple[CacheGroup, ...]:
    """The distinct cache shapes of a program and the layers of each, in order."""
    kinds = {g.name: g.cache.type for g in program.graphs if g.cache is not None}
    found: dict[CacheType, list[int]] = {}
    for i, name in enumerate(program.all_layers):
        cache = kinds[name]
        assert isinstance(cache, CacheType)
        found.setdefault(cache, []).append(i)
    return tuple(CacheGroup(t, tuple(indices)) for t, indices in found.items())


def lower(
    schedule: Schedule,
    bodies: Mapping[tuple[str, str, str], Body],
    weights: WeightPlan,
    ahead: int | None = None,
    chunk_blocks: ChunkBlocks | None = None,
) -> np.ndarray:
    """int32 [workers, records, RECORD_WORDS]; `bodies` is keyed by (graph, phase, body).

    ahead: bytes of the next weights that all workers together ask for before a join, at most; None: what was chosen
    for each, AHEAD_BYTES where nothing was. chunk_blocks: of an executor that walks the weight stream (stream.py):
    records say where they are in it.
    Every worker's list ends with a record whose body is END.
    """
    asked = Asked(schedule, ahead)
    queues = [list(_records(schedule, bodies, weights, w, asked, chunk_blocks)) for w in range(schedule.workers)]
    longest = max(map(len, queues))
    table = np.zeros((schedule.workers, longest, RECORD_WORDS), np.int32)
    table[:, :, 0] = END
    for w, queue in enumerate(queues):
        for i, words in enumerate(queue[:-1]):
            expect(len(words) <= RECORD_WORDS, f"a record takes {len(words)} words of {RECORD_WORDS}")
            table[w, i, : len(words)] = words
        table[w, len(queue) - 1 :] = queue[-1]
    return table


def event_count(schedule: Schedule) -> int:
    """Event counters one step uses."""
    return sum(len(schedule.section(g.name).events) for g, _ in schedule.program.sections())


class Asked:
    """How many bytes of its next weights each worker asks for: those who ask before one join share `ahead`."""

    def __init__(self, schedule: Schedule, ahead: int | None = None) -> None:
        self._ahead = schedule.tuning["ahead"] // ALIGN * ALIGN * schedule.workers if ahead is None else ahead
        self._most: dict[tuple[str, str], int] = {}  # by section and event, '': what is first in the section
        for s in schedule.sections:
            sizes = {"": [head.size for head in s.heads if head]}
            for task in (task for queue in s.queues for task in queue):
                if task.prefetch:
                    sizes.setdefault(task.signal, []).append(task.prefetch.size)
            self._most |= {(s.name, event): self._share(found) for event, found in sizes.items()}

    def _share(self, sizes: list[int]) -> int:
        return sum(sizes) if sum(sizes) <= self._ahead else self._ahead // len(sizes) // ALIGN * ALIGN

    def size(self, section: Section, task: Task) -> int:
        """Of a task's own prefetch, 0 without one."""
        return min(task.prefetch.size, self._most[section.name, task.signal]) if task.prefetch else 0

    def head(self, section: Section, worker: int) -> int:
        """Of what a worker reads first in a section."""
        head = section.heads[worker]
        return min(head.size, self._most[section.name, ""]) if head else 0


def _records(
    schedule: Schedule,
    bodies: Mapping[tuple[str, str, str], Body],
    weights: WeightPlan,
    worker: int,
    asked: Asked,
    chunk_blocks: ChunkBlocks | None,
) -> Iterator[list[int]]:
    groups = cache_groups(schedule.program)
    place = {layer: i for g in groups for i, layer in enumerate(g.layers)}
    steps = [(schedule.section(g.name), g, layer) for g, layer in schedule.program.sections()]
    base, before, taken = 0, -1, 0
    for n, (section, graph, layer) in enumerate(steps):
        number = {name: base + i for i, (name, _) in enumerate(section.events)}
        number[PREVIOUS] = before
        following = steps[n + 1] if n + 1 < len(steps) else None
        for i, task in enumerate(section.queues[worker]):
            body = bodies[graph.name, task.phase, task.body]
            words = [body.code, task.first, task.last, task.step, place.get(layer, 0)]
            words += _waits(task, section, number, steps[n - 1][0] if n else None)
            words.append(number[task.signal] if task.signal else -1)
            last = i + 1 == len(section.queues[worker])
            words += _prefetch(section, task, layer, following if last else None, weights, worker, asked)
            words.append(taken)
            taken += chunk_count(graph, task, chunk_blocks) if chunk_blocks else 0
            yield words + [_argument(schedule, graph.name, layer, a, weights, worker) for a in body.args]
        base, before = base + len(section.events), number.get(section.end, -1)
    yield [END, *[0] * (len(FIELDS) - 2), taken, *[0] * (RECORD_WORDS - len(FIELDS))]


def _waits(task: Task, section: Section, number: Mapping[str, int], previous: Section | None) -> list[int]:
    expect(len(task.waits) <= MAX_WAITS, f"task of `{task.phase}` waits for {len(task.waits)} events")
    words: list[int] = []
    for name in task.waits:
        at_start = name == PREVIOUS
        expect(not at_start or (previous and previous.end), "the section before has no event to wait for")
        target = previous.target(previous.end) if at_start and previous else section.target(name)
        words += [number[name], target]
    return words + [-1, 0] * (MAX_WAITS - len(task.waits))


def _prefetch(
    section: Section,
    task: Task,
    layer: int,
    following: tuple[Section, Graph, int] | None,
    weights: WeightPlan,
    worker: int,
    asked: Asked,
) -> list[int]:
    wanted, size = task.prefetch, asked.size(section, task)
    if wanted is None and following is not None and following[0].heads:
        wanted, layer = following[0].heads[worker], following[2]
        size = asked.head(following[0], worker)
    if wanted is None:
        return [-1, 0]
    return [(weights.offset(wanted.weight, layer) + wanted.offset) // ALIGN, size // ALIGN]


def _argument(schedule: Schedule, graph: str, layer: int, arg: Arg, weights: WeightPlan, worker: int) -> int:
    if arg.kind == "number":
        return arg.number
    if arg.kind == "layer":
        return layer
    if arg.kind == "weight":
        return weights.offset(arg.name, layer) // ALIGN
    buffer = schedule.buffer(graph, arg.name)
    return (buffer.offset + (worker * buffer.size if buffer.private else 0)) // ALIGN
