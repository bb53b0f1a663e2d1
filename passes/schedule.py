"""Give every worker its tiles: the first form of the Schedule, without waits or places."""

from __future__ import annotations

import dataclasses

from ..ir.errors import expect
from ..ir.graph import Graph, Program
from ..ir.limits import Limits
from ..ir.phases import STATE_WRITERS, Phase
from ..ir.schedule import (
    LIVE,
    Schedule,
    Section,
    Task,
    panel_kind,
    panel_kinds,
    part_name,
    part_units,
    part_weight,
    parts,
    unit_bytes,
)
from ..ir.tuning import UNTUNED, Tuning
from .repeat import repeated


def schedule(
    program: Program, limits: Limits, bucket: str, workers: int, tuning: Tuning = UNTUNED
) -> Schedule:
    """Cut each phase's weight bytes evenly over the workers; drains take every W-th tile.

    In the `few` bucket each worker that has tiles packs the activations for itself, and every worker does the work
    on rows that `repeat.repeated` names: both cheaper than a join.
    """
    passes = limits.drafts if limits.has_draft_model else 0
    expect(program.passes == passes, f"expected a draft model of {passes} passes, got one of {program.passes}")
    own = repeated(program) if bucket == "few" else set()
    sections = [
        _section(g, bucket, workers, {p for name, p in own if name == g.name}, g is program.entry)
        for g in program.graphs
    ]
    return Schedule(program, limits, bucket, workers, tuple(sections), tuning=tuning)


def _section(graph: Graph, bucket: str, workers: int, own: set[str], first: bool) -> Section:
    queues: list[list[Task]] = [[] for _ in range(workers)]
    events: list[tuple[str, int]] = []
    for phase in graph.phases:
        if phase.reads_matrix:
            events += _matrix(phase, queues, bucket)
        elif phase.anchor_kind in STATE_WRITERS:
            queues[0].append(Task(phase.name, phase.anchor_kind, 0, 1, 1, (), phase.name))
            events.append((phase.name, 1))
        elif phase.name in own:
            for queue in queues:
                queue.append(Task(phase.name, phase.anchor_kind, 0, LIVE))
        else:
            for w, queue in enumerate(queues):
                queue.append(Task(phase.name, phase.anchor_kind, w, LIVE, workers, (), phase.name))
            events.append((phase.name, workers))
    if not events and not first:  # all is done by every worker for itself, but what follows must know that it is
        events.append((f"{graph.name}.end", workers))
        queues = [[*queue[:-1], dataclasses.replace(queue[-1], signal=events[0][0])] for queue in queues]
    end = events[-1][0] if events else ""
    return Section(graph.name, tuple(events), end, tuple(map(tuple, queues)))


def _matrix(phase: Phase, queues: list[list[Task]], bucket: str) -> list[tuple[str, int]]:
    """Packs and matrix tasks of one phase; the last task of each worker signals."""
    shares = _drains(phase, len(queues)) if phase.is_drain else _shares(phase, len(queues))
    events = []
    packed = f"{phase.name}.packed"
    if bucket == "many":
        for w, queue in enumerate(queues):
            kinds = panel_kinds(phase)
            for kind in kinds:
                signal = packed if kind == kinds[-1] else ""
                queue.append(Task(phase.name, f"pack.{kind}", w, LIVE, len(queues), (), signal))
        events.append((packed, len(queues)))
    busy = 0
    for queue, tasks in zip(queues, shares, strict=True):
        if not tasks:
            continue
        busy += 1
        if bucket == "few":
            by_name = {part_name(p): p for p in parts(phase)}
            kinds = tuple(dict.fromkeys(panel_kind(part_weight(by_name[t.body])) for t in tasks))
            queue += [Task(phase.name, f"pack.{kind}", 0, LIVE) for kind in kinds]
        queue += [*tasks[:-1], dataclasses.replace(tasks[-1], signal=phase.name)]
    return [*events, (phase.name, busy)]


def _drains(phase: Phase, workers: int) -> list[list[Task]]:
    """Tiles of the experts that turn out to be active, for every worker."""
    return [[Task(phase.name, part_name(p), w, LIVE, workers) for p in parts(phase)] for w in range(workers)]


def _shares(phase: Phase, workers: int) -> list[list[Task]]:
    """Contiguous ranges of units per worker, equal in bytes as far as whole units allow."""
    cuts: list[list[Task]] = [[] for _ in range(workers)]
    total = sum(part_units(phase, p) * unit_bytes(phase, p) for p in parts(phase))
    done = 0
    for part in parts(phase):
        units, size = part_units(phase, part), unit_bytes(phase, part)
        # A unit belongs to the worker in whose share its middle lies.
        bounds = [_round((total * w / workers - done) / size, units) for w in range(workers + 1)]
        for w in range(workers):
            if bounds[w] < bounds[w + 1]:
                cuts[w].append(Task(phase.name, part_name(part), bounds[w], bounds[w + 1]))
        done += units * size
    return cuts


def _round(units: float, most: int) -> int:
    return min(most, max(0, int(units + 0.5)))
