"""Weights never depend on activations: name what each worker reads next, so that a wait pulls it in."""

from __future__ import annotations

import dataclasses

from ..ir.schedule import Prefetch, Schedule, Section, Task, packed_name, part_name, parts, phase_of, unit_bytes


def prefetch(schedule: Schedule) -> Schedule:
    """Give the last task before each wait this worker's next weight range; a target pulls in as much as suits it."""
    return schedule.map_sections(lambda s: _section(schedule, s))


def _section(schedule: Schedule, section: Section) -> Section:
    queues = tuple(_queue(schedule, section, queue) for queue in section.queues)
    heads = tuple(_range(schedule, section, queue, 0)[1] for queue in section.queues)
    return dataclasses.replace(section, queues=queues, heads=heads)


def _queue(schedule: Schedule, section: Section, queue: tuple[Task, ...]) -> tuple[Task, ...]:
    """What attention reads is not known: the task before it asks for the weights behind it, and it for the next."""
    tasks, asked = list(queue), -1
    for i, task in enumerate(tasks):
        if not task.signal:
            continue
        at, wanted = _range(schedule, section, queue, i + 1)
        if at <= asked and phase_of(schedule.graph(section.name), task.phase).anchor_kind == "attend":
            at, wanted = _range(schedule, section, queue, asked + 1)
        if wanted is not None and at > asked:
            tasks[i], asked = dataclasses.replace(task, prefetch=wanted), at
    return tuple(tasks)


def _range(
    schedule: Schedule, section: Section, queue: tuple[Task, ...], start: int
) -> tuple[int, Prefetch | None]:
    """The first task from `start` on that reads a matrix, and its range of it."""
    graph = schedule.graph(section.name)
    for i, task in enumerate(queue[start:], start):
        phase = phase_of(graph, task.phase)
        if phase.anchor_kind == "linear" and not task.body.startswith("pack."):
            part = next(p for p in parts(phase) if part_name(p) == task.body)
            size = unit_bytes(phase, part)
            return i, Prefetch(packed_name(part), task.first * size, (task.last - task.first) * size)
    return -1, None
