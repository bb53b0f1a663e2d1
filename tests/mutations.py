"""Ways to break a schedule, each as a function of a schedule and a source of chance; None: it does not apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random

from onelaunch.ir.schedule import LIVE, PREVIOUS, Buffer, Schedule, Section, Task

Queues = list[list[Task]]
Mutation = Callable[[Schedule, Random], Schedule | None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def _with_queues(schedule: Schedule, section: Section, queues: Queues) -> Schedule:
    changed = dataclasses.replace(section, queues=tuple(map(tuple, queues)))
    return _with_section(schedule, changed)


def _with_section(schedule: Schedule, changed: Section) -> Schedule:
    return schedule.map_sections(lambda s: changed if s.name == changed.name else s)


def _pick(
    schedule: Schedule, random: Random, wanted: Callable[[Task], object]
) -> tuple[Section, Queues, int, int] | None:
    """A random task that fits: its section, a copy of the queues, worker and index."""
    found = [(s, w, i) for s in schedule.sections for w, q in enumerate(s.queues) for i, t in enumerate(q) if wanted(t)]
    if not found:
        return None
    section, w, i = random.choice(found)
    return section, [list(q) for q in section.queues], w, i


def _edit(
    schedule: Schedule, random: Random, wanted: Callable[[Task], object], change: Callable[[Task, Section], Task]
) -> Schedule | None:
    """Replace one random task that fits."""
    picked = _pick(schedule, random, wanted)
    if picked is None:
        return None
    section, queues, w, i = picked
    queues[w][i] = change(queues[w][i], section)
    return _with_queues(schedule, section, queues)


@mutation
def dropped_wait(schedule: Schedule, random: Random) -> Schedule | None:
    def change(task: Task, section: Section) -> Task:
        gone = random.randrange(len(task.waits))
        return dataclasses.replace(task, waits=task.waits[:gone] + task.waits[gone + 1 :])

    return _edit(schedule, random, lambda t: t.waits, change)


@mutation
def wait_on_the_wrong_event(schedule: Schedule, random: Random) -> Schedule | None:
    def change(task: Task, section: Section) -> Task:
        at = random.randrange(len(task.waits))
        wrong = random.choice([PREVIOUS, *(e for e, _ in section.events)])
        return dataclasses.replace(task, waits=(*task.waits[:at], wrong, *task.waits[at + 1 :]))

    return _edit(schedule, random, lambda t: t.waits, change)


@mutation
def cycle(schedule: Schedule, random: Random) -> Schedule | None:
    """One more wait, mostly for something later."""

    def change(task: Task, section: Section) -> Task:
        later = [e for e, _ in section.events] or [PREVIOUS]
        return dataclasses.replace(task, waits=(*task.waits[:1], random.choice(later[len(later) // 2 :])))

    return _edit(schedule, random, lambda t: True, change)


@mutation
def dropped_signal(schedule: Schedule, random: Random) -> Schedule | None:
    return _edit(schedule, random, lambda t: t.signal, lambda t, s: dataclasses.replace(t, signal=""))


@mutation
def dropped_signal_and_target(schedule: Schedule, random: Random) -> Schedule | None:
    """The event still fires, but no longer for one worker's work."""
    picked = _pick(schedule, random, lambda t: t.signal)
    if picked is None:
        return None
    section, queues, w, i = picked
    event = queues[w][i].signal
    queues[w][i] = dataclasses.replace(queues[w][i], signal="")
    events = tuple((e, t - (e == event)) for e, t in section.events)
    return _with_queues(schedule, dataclasses.replace(section, events=events), queues)


@mutation
def wrong_signal(schedule: Schedule, random: Random) -> Schedule | None:
    def change(task: Task, section: Section) -> Task:
        return dataclasses.replace(task, signal=random.choice([e for e, _ in section.events]))

    return _edit(schedule, random, lambda t: t.signal, change)


@mutation
def early_signal(schedule: Schedule, random: Random) -> Schedule | None:
    """An earlier task of the same worker signals instead."""
    picked = _pick(schedule, random, lambda t: t.signal)
    if picked is None or picked[3] == 0:
        return None
    section, queues, w, i = picked
    j = random.randrange(max(0, i - 2), i)
    if queues[w][j].signal:
        return None
    queues[w][j] = dataclasses.replace(queues[w][j], signal=queues[w][i].signal)
    queues[w][i] = dataclasses.replace(queues[w][i], signal="")
    return _with_queues(schedule, section, queues)


@mutation
def wrong_target(schedule: Schedule, random: Random) -> Schedule | None:
    section = random.choice([s for s in schedule.sections if s.events])
    at, by = random.randrange(len(section.events)), random.choice([-1, 1])
    events = tuple((e, t + by * (i == at)) for i, (e, t) in enumerate(section.events))
    return _with_section(schedule, dataclasses.replace(section, events=events))


@mutation
def wrong_end(schedule: Schedule, random: Random) -> Schedule | None:
    section = random.choice(schedule.sections)
    end = random.choice(["", *(e for e, _ in section.events)])
    return _with_section(schedule, dataclasses.replace(section, end=end))


@mutation
def swapped_order(schedule: Schedule, random: Random) -> Schedule | None:
    picked = _pick(schedule, random, lambda t: True)
    if picked is None or len(picked[1][picked[2]]) < 2:
        return None
    section, queues, w, i = picked
    j = random.choice([j for j in range(max(0, i - 2), min(len(queues[w]), i + 3)) if j != i])
    queues[w][i], queues[w][j] = queues[w][j], queues[w][i]
    return _with_queues(schedule, section, queues)


@mutation
def dropped_task(schedule: Schedule, random: Random) -> Schedule | None:
    picked = _pick(schedule, random, lambda t: True)
    if picked is None:
        return None
    section, queues, w, i = picked
    gone = queues[w].pop(i)
    events = tuple((e, t - (e == gone.signal)) for e, t in section.events)
    return _with_queues(schedule, dataclasses.replace(section, events=events), queues)


@mutation
def doubled_task(schedule: Schedule, random: Random) -> Schedule | None:
    picked = _pick(schedule, random, lambda t: True)
    if picked is None:
        return None
    section, queues, w, i = picked
    queues[w].insert(i, dataclasses.replace(queues[w][i], signal=""))
    return _with_queues(schedule, section, queues)


@mutation
def moved_task(schedule: Schedule, random: Random) -> Schedule | None:
    """To another worker (or elsewhere on the only one)."""
    picked = _pick(schedule, random, lambda t: True)
    if picked is None:
        return None
    section, queues, w, i = picked
    task = queues[w].pop(i)
    to = random.choice([x for x in range(len(queues)) if x != w] or [w])
    near = next((j for j, t in enumerate(queues[to]) if t.phase == task.phase), len(queues[to]))
    queues[to].insert(random.choice([near, near, random.randint(0, len(queues[to]))]), task)
    return _with_queues(schedule, section, queues)


@mutation
def wrong_range(schedule: Schedule, random: Random) -> Schedule | None:
    def change(task: Task, section: Section) -> Task:
        by = random.choice([-1, 1])
        if random.random() < 0.5 or task.is_drain:
            return dataclasses.replace(task, first=task.first + by)
        return dataclasses.replace(task, last=task.last + by)

    return _edit(schedule, random, lambda t: True, change)


@mutation
def wrong_drain(schedule: Schedule, random: Random) -> Schedule | None:
    def change(task: Task, section: Section) -> Task:
        if random.random() < 0.3:
            return dataclasses.replace(task, last=random.randint(task.first + 1, 9))
        return dataclasses.replace(task, step=max(1, task.step + random.choice([-1, 1, 1])))

    return _edit(schedule, random, lambda t: t.last == LIVE, change)


@mutation
def other_rows(schedule: Schedule, random: Random) -> Schedule | None:
    """Workers share the rows of a phase that each should run in full, or the other way round."""
    picked = _pick(schedule, random, lambda t: t.body == "rows")
    if picked is None:
        return None
    section, queues, w, i = picked
    phase, repeated, n = queues[w][i].phase, not queues[w][i].signal, len(queues)
    for worker, queue in enumerate(queues):
        place = (worker, n) if repeated else (0, 1)
        queue[:] = [dataclasses.replace(t, first=place[0], step=place[1]) if t.phase == phase else t for t in queue]
    return _with_queues(schedule, section, queues)


def _buffers(schedule: Schedule, random: Random, change: Callable[[Buffer], Buffer]) -> Schedule:
    at = random.randrange(len(schedule.buffers))
    buffers = tuple(change(b) if i == at else b for i, b in enumerate(schedule.buffers))
    return dataclasses.replace(schedule, buffers=buffers)


@mutation
def overlapping_buffers(schedule: Schedule, random: Random) -> Schedule | None:
    """One buffer starts where another does."""
    other = random.choice(schedule.buffers).offset
    return _buffers(schedule, random, lambda b: dataclasses.replace(b, offset=other))


@mutation
def early_reuse(schedule: Schedule, random: Random) -> Schedule | None:
    """One buffer moves a little, into its neighbours."""
    by = 128 * random.choice([-8, -4, -2, -1, 1, 2, 4, 8])
    return _buffers(schedule, random, lambda b: dataclasses.replace(b, offset=b.offset + by))


@mutation
def short_buffer(schedule: Schedule, random: Random) -> Schedule | None:
    return _buffers(schedule, random, lambda b: dataclasses.replace(b, size=b.size - 128 * random.choice([1, 2])))


@mutation
def shared_private_buffer(schedule: Schedule, random: Random) -> Schedule | None:
    return _buffers(schedule, random, lambda b: dataclasses.replace(b, private=not b.private))


@mutation
def alias(schedule: Schedule, random: Random) -> Schedule | None:
    """A value moves into the buffer of another of its section."""
    source, to = random.sample(schedule.buffers, 2)
    value = random.choice(source.values)
    buffers = []
    for b in schedule.buffers:
        if b is source:
            b = dataclasses.replace(b, values=tuple(v for v in b.values if v != value))
        elif b is to:
            b = dataclasses.replace(b, values=(*b.values, value))
        if b.values:
            buffers.append(b)
    return dataclasses.replace(schedule, buffers=tuple(buffers))
