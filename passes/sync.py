"""Waits: every task waits for the events whose work it needs and does not know to be done already."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from ..ir.access import Access, accesses
from ..ir.schedule import PREVIOUS, Schedule, Section, Task
from .allocate import storage


def sync(schedule: Schedule) -> Schedule:
    """Add the fewest waits that order every read after its write and every overwrite after its reads.

    Known to be done: what this worker did itself, and what the signallers of an awaited event knew.
    The first task of each worker waits for the section before (`^`), unless whatever section that is leaves every
    worker knowing that it has ended.
    """
    made = {s.name: _section(schedule, s) for s in schedule.sections}
    order = [graph.name for graph, _ in schedule.program.sections()]
    late = {after for before, after in pairwise(order) if not made[before][1]}
    return schedule.map_sections(lambda s: _after_previous(made[s.name][0]) if s.name in late else made[s.name][0])


def _after_previous(section: Section) -> Section:
    queues = tuple(
        tuple(dataclasses.replace(t, waits=(PREVIOUS, *t.waits)) if i == 0 else t for i, t in enumerate(queue))
        for queue in section.queues
    )
    return dataclasses.replace(section, queues=queues)


def _section(schedule: Schedule, section: Section) -> tuple[Section, bool]:
    """A section with the waits for its own events, and whether every worker knows at its end that it has ended."""
    needs = _needs(schedule, section)
    known_at_event: dict[str, set[str]] = {}
    known: list[set[str]] = [set() for _ in section.queues]
    queues: list[list[Task]] = [[] for _ in section.queues]
    for group, needed in needs.items():
        gathered = {group}
        for w, queue in enumerate(section.queues):
            for task in queue[len(queues[w]) :]:
                if _group(task, section) != group:
                    break
                waits = _waits(needed, known[w], known_at_event)
                known[w] = known[w].union(*(known_at_event[wait] for wait in waits))
                queues[w].append(dataclasses.replace(task, waits=waits))
                if task.signal:
                    gathered |= known[w]
        known_at_event[group] = gathered
    settled = not section.end or all(section.end in done for done in known)
    return dataclasses.replace(section, queues=tuple(map(tuple, queues))), settled


def _group(task: Task, section: Section) -> str:
    """What a task's work is part of: its phase, or the packs of its phase where they are joined by themselves."""
    packed = f"{task.phase}.packed"
    return packed if task.body.startswith("pack.") and packed in dict(section.events) else task.phase


def _needs(schedule: Schedule, section: Section) -> dict[str, list[str]]:
    """For each group of tasks in program order, the earlier ones whose tasks conflict with its own, between any two
    workers; latest first. Groups without an event write private copies, which conflict with nobody.

    A value that takes another's place conflicts with who reads that one.
    """
    graph, events = schedule.graph(section.name), dict(section.events)
    roots = storage(graph, schedule.program.model_of(graph).running)
    touched: dict[str, list[Access]] = {g: [] for p in graph.phases for g in (f"{p.name}.packed", p.name)}
    for queue in section.queues:
        for task in dict.fromkeys(queue):
            group = _group(task, section)
            copies = group not in events or (task.body.startswith("pack.") and group == task.phase)
            touched[group] += [
                dataclasses.replace(a, value=roots.get(a.value, a.value))
                for a in accesses(graph, task)
                if not (copies and a.write)
            ]
    earlier: list[str] = []
    needs: dict[str, list[str]] = {}
    for group, found in touched.items():
        needs[group] = [name for name in reversed(earlier) if _conflict(touched[name], found)]
        if group in events:
            earlier.append(group)
    return needs


def _conflict(a: list[Access], b: list[Access]) -> bool:
    written_a, written_b = {x.value for x in a if x.write}, {x.value for x in b if x.write}
    return bool(written_a & {x.value for x in b} or written_b & {x.value for x in a})


def _waits(needed: list[str], known: set[str], known_at_event: dict[str, set[str]]) -> tuple[str, ...]:
    found: list[str] = []
    have = set(known)
    for name in needed:
        if name not in have:
            found.append(name)
            have |= known_at_event[name]
    return tuple(found)
