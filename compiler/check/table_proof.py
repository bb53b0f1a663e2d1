"""What a task table proves about a step: how often workers meet, and that every weight is read exactly once.

Both are read from the integers the kernel reads, not from the passes that made them. Padding of a unit to whole
tiles is read with it; of experts, all count as active. Vectors and looked-up tables are left out: every worker may
read those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ...ir.bodies import all_bodies, part_of
from ...ir.limits import ALIGN
from ...ir.schedule import Schedule, packed_name, part_experts, part_units, parts, unit_bytes
from ...ir.table import ARGS, END, FIELDS, Body, WeightPlan

Bodies = Mapping[tuple[str, str, str], Body]
AT = {name: i for i, name in enumerate(FIELDS)}


@dataclass(frozen=True)
class Joins:
    """Events of one section of the step that some worker waits for; `layer` is -1 for the model's own sections."""

    section: str
    layer: int
    count: int


def joins(schedule: Schedule, table: np.ndarray) -> list[Joins]:
    """Joins of every section of a step, in order. An event nobody waits for joins nothing."""
    live = table[table[:, :, AT["body"]] != END]
    waited = set(live[:, [AT["wait0"], AT["wait1"]]].flatten().tolist())
    found, base = [], 0
    for graph, layer in schedule.program.sections():
        count = len(schedule.section(graph.name).events)
        found.append(Joins(graph.name, layer, len(waited & set(range(base, base + count)))))
        base += count
    return found


def reading_faults(schedule: Schedule, table: np.ndarray, bodies: Bodies, plan: WeightPlan) -> list[str]:
    """Which weight bytes a step does not read exactly once; empty: all are."""
    reads = sorted(_reads(schedule, table, bodies, plan))
    found = [
        f"bytes {b[0]}..{min(a[1], b[1])} of the weights are read twice" for a, b in pairwise(reads) if b[0] < a[1]
    ]
    merged: list[list[int]] = []
    for start, end in reads:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    starts = [start for start, _ in merged]
    for key, start, end, _ in _matrices(schedule, plan):
        i = int(np.searchsorted(starts, start, "right")) - 1
        if i < 0 or merged[i][1] < end:
            found.append(f"weight `{key}`: bytes {start}..{end} are not all read")
    size = sum(end - start for _, start, end, _ in _matrices(schedule, plan))
    total = sum(end - start for start, end in reads)
    if not found and total != size:
        found.append(f"expected {size} bytes of matrices to be read, got {total}")
    return found


def _matrices(schedule: Schedule, plan: WeightPlan) -> Iterator[tuple[str, int, int, int]]:
    """(key, first byte, end, bytes of a unit) of every matrix of the step; of each expert."""
    for graph, layer in schedule.program.sections():
        for phase in graph.phases:
            for part in parts(phase) if phase.reads_matrix else ():
                start, size = plan.offset(packed_name(part), layer), unit_bytes(phase, part)
                whole = part_units(phase, part) * size
                for expert in range(part_experts(part)):
                    at = start + expert * whole
                    yield packed_name(part), at, at + whole, size


def _reads(schedule: Schedule, table: np.ndarray, bodies: Bodies, plan: WeightPlan) -> Iterator[tuple[int, int]]:
    """Byte ranges of weights that the records of a table read."""
    words = _weight_words(schedule, bodies)
    sizes = {start: size for _, start, _, size in _matrices(schedule, plan)}
    for record in table[table[:, :, AT["body"]] != END].tolist():
        if record[0] in words:
            word, units, experts = words[record[0]]
            start = record[ARGS + word] * ALIGN
            size = sizes.get(start, 0)  # of a matrix that is none nothing is read, so bytes are missed elsewhere
            for first, last in _tiles(record, units, experts):
                yield start + first * size, start + last * size


def _tiles(record: list[int], units: int, experts: int) -> Iterator[tuple[int, int]]:
    """Ranges of units that a record reads, counted through all experts."""
    first, last, step = (record[AT[name]] for name in ("first", "last", "step"))
    if last < 0:  # a drain over (expert, unit)
        yield from ((tile, tile + 1) for tile in range(first, experts * units, step))
    else:
        yield from ((expert * units + first, expert * units + last) for expert in range(experts))


def _weight_words(schedule: Schedule, bodies: Bodies) -> dict[int, tuple[int, int, int]]:
    """Code of a body that reads a matrix -> which argument is the matrix's offset, its units, its experts."""
    found: dict[int, tuple[int, int, int]] = {}
    for graph, phase, name in all_bodies(schedule.program):
        if phase.reads_matrix and not name.startswith("pack."):
            part, body = part_of(phase, name), bodies[graph.name, phase.name, name]
            word = next(i for i, a in enumerate(body.args) if (a.kind, a.name) == ("weight", packed_name(part)))
            found[body.code] = word, part_units(phase, part), part_experts(part)
    return found
