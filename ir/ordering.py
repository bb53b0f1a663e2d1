"""Who happens before whom: vector clocks over a window of two sections, and the accesses they must order.

Part of `ir/validate.py`. A task's clock says, for each worker, how many of its tasks are surely done when the
task starts. Accesses are grouped in classes (a section's phase, the value, read or write); two classes that share
bytes are compared through the last task of the one and the earliest clock of the other, task by task only if
that does not settle it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .access import Access
from .placement import Memory, Place, Touches
from .schedule import PREVIOUS, Schedule, Section, Task
from .schedule_text import show_task

Event = tuple[int, str]  # section of the window (-1: before it), name
REGIONS = {"all": 0, "columns": 1, "rows": 2, "tiles": 3}


@dataclass(frozen=True)
class Window:
    """Two sections that follow one another, and what running their waits gives.

    `clocks[w][i]`: how many tasks of each worker are done when worker w's i-th task starts (both sections in
    one queue). `closed[k]`: what is done when section k's end event is.
    """

    sections: tuple[Section, Section]
    queues: tuple[tuple[tuple[int, Task], ...], ...]  # per worker: (0 or 1, task)
    clocks: list[list[np.ndarray]]
    closed: list[np.ndarray]

    def describe(self, worker: int, index: int) -> str:
        k, task = self.queues[worker][index]
        place = index - (len(self.sections[0].queues[worker]) if k else 0)
        return f"worker {worker} task {place} of `{self.sections[k].name}` (`{show_task(task)}`)"


def run_window(first: Section, second: Section) -> tuple[Window, list[str]]:
    """Run two sections as far as their waits allow; reasons name every worker that is stuck.

    Events only count up, so if one order of running gets stuck, every order does.
    """
    queues = tuple(
        tuple((k, t) for k, s in enumerate((first, second)) for t in s.queues[w]) for w in range(len(first.queues))
    )
    window = Window((first, second), queues, [[] for _ in queues], [])
    workers = len(queues)
    counts = {(k, e): 0 for k, s in enumerate((first, second)) for e, _ in s.events}
    counts[-1, PREVIOUS] = 0
    known = {key: np.zeros(workers, np.int32) for key in counts}
    targets = {(k, e): t for k, s in enumerate((first, second)) for e, t in s.events} | {(-1, PREVIOUS): 0}
    now = [np.zeros(workers, np.int32) for _ in queues]
    moved = True
    while moved:
        moved = False
        for w, queue in enumerate(queues):
            while len(window.clocks[w]) < len(queue):
                k, task = queue[len(window.clocks[w])]
                keys = [_event(window, k, e) for e in task.waits]
                if any(counts[key] < targets[key] for key in keys):
                    break
                start = np.maximum.reduce([now[w], *(known[key] for key in keys)])
                window.clocks[w].append(start)
                now[w] = start.copy()
                now[w][w] = len(window.clocks[w])
                moved = True
                if task.signal:
                    counts[k, task.signal] += 1
                    np.maximum(known[k, task.signal], now[w], out=known[k, task.signal])
    nothing = np.zeros(workers, np.int32)
    window.closed.extend(known.get((k, s.end), nothing) for k, s in enumerate((first, second)))
    return window, _stuck(window, counts, targets)


def _stuck(window: Window, counts: dict[Event, int], targets: dict[Event, int]) -> list[str]:
    """Each worker that could not finish its queue, and what it waits for."""
    reasons = []
    for w, queue in enumerate(window.queues):
        at = len(window.clocks[w])
        if at < len(queue):
            k, task = queue[at]
            keys = [_event(window, k, e) for e in task.waits]
            lacking = [f"`{e}` ({counts[k, e]} of {targets[k, e]})" for k, e in keys if counts[k, e] < targets[k, e]]
            reasons.append(f"deadlock: {window.describe(w, at)} waits forever for {', '.join(lacking)}")
    return reasons


def _event(window: Window, k: int, name: str) -> Event:
    if name != PREVIOUS:
        return k, name
    return (0, window.sections[0].end) if k else (-1, PREVIOUS)


@dataclass(frozen=True)
class Class:
    """The accesses of one phase of one section to one value, all reads or all writes. Arrays: one per task."""

    value: str
    write: bool
    moment: tuple[int, int, int]  # section, phase, 0 for packs: the program's own order
    place: Place
    worker: np.ndarray
    index: np.ndarray
    bounds: np.ndarray  # [n, 2] bytes
    region: np.ndarray  # [n, 3] kind, first, last
    earliest: np.ndarray  # [workers] done before the first of these starts
    last: np.ndarray  # [workers] index of each worker's last task here, -1: none


def classes(schedule: Schedule, window: Window, touched: tuple[Touches, Touches]) -> list[Class]:
    """Every access of a window, grouped; `touched` is what the tasks of its two sections access."""
    found: dict[tuple[str, bool, tuple[int, int, int]], list[tuple[int, int, Access]]] = {}
    graphs = [schedule.graph(s.name) for s in window.sections]
    order = [{p.name: i for i, p in enumerate(g.phases)} for g in graphs]
    for w, queue in enumerate(window.queues):
        both = touched[0][w] + touched[1][w]
        for i, ((k, task), accessed) in enumerate(zip(queue, both, strict=True)):
            moment = (k, order[k][task.phase], int(not task.body.startswith("pack.")))
            for access in accessed:
                found.setdefault((access.value, access.write, moment), []).append((w, i, access))
    memories = [Memory(schedule, g, k) for k, g in enumerate(graphs)]
    return [_class(window, memories, key, members) for key, members in found.items()]


def _class(
    window: Window,
    memories: list[Memory],
    key: tuple[str, bool, tuple[int, int, int]],
    members: list[tuple[int, int, Access]],
) -> Class:
    value, write, moment = key
    place = memories[moment[0]].place(value)
    worker, index = (np.array([m[j] for m in members], np.int32) for j in (0, 1))
    regions = [m[2].region for m in members]
    last = np.full(len(window.queues), -1, np.int32)
    np.maximum.at(last, worker, index)
    return Class(
        value,
        write,
        moment,
        place,
        worker,
        index,
        np.array([place.of_worker(w) for w, _, _ in members], np.int64),
        np.array([(REGIONS[r.kind], r.first, r.last) for r in regions], np.int64),
        np.minimum.reduce([window.clocks[w][i] for w, i, _ in members]),
        last,
    )


def check_order(window: Window, found: list[Class]) -> tuple[list[str], int]:
    """Reasons for every pair of classes left unordered, and how many pairs of tasks were settled.

    Conflicting accesses must happen in the program's own order; within one moment of it they must not meet.
    """
    reasons, pairs = [], 0
    for i, a in enumerate(found):
        for b in found[i:]:
            if not (a.write or b.write) or a.place.lo >= b.place.hi or b.place.lo >= a.place.hi:
                continue
            first, second = (a, b) if a.moment <= b.moment else (b, a)
            pairs += len(a.worker) * len(b.worker)
            if first.moment < second.moment and (first.last < second.earliest).all():
                continue
            hit = _unordered(window, first, second)
            if hit is not None:
                reasons.append(_reason(window, first, second, *hit))
    return reasons, pairs


def _unordered(window: Window, a: Class, b: Class) -> tuple[int, int] | None:
    """The first pair of tasks (of a, of b) that may touch the same bytes in the wrong order."""
    bad = meet(a, b)
    if a.moment < b.moment:
        clocks = np.stack([window.clocks[w][i] for w, i in zip(b.worker, b.index, strict=True)])
        bad &= a.index[:, None] >= clocks[:, a.worker].T
    else:
        bad &= (a.worker[:, None] != b.worker) | (a.index[:, None] != b.index)
    hits = np.argwhere(bad)
    return (int(hits[0][0]), int(hits[0][1])) if len(hits) else None


def meet(a: Class, b: Class) -> np.ndarray:
    """[a, b]: whether two tasks' parts may share a byte."""
    near = (a.bounds[:, None, 0] < b.bounds[:, 1]) & (b.bounds[:, 0] < a.bounds[:, None, 1])
    alike = a.place.lo == b.place.lo and a.place.stride == b.place.stride
    if not (a.value == b.value or alike):
        return near
    kind, first, last = (a.region[:, None, j] for j in range(3))
    other_kind, other_first, other_last = (b.region[:, j] for j in range(3))
    columns = (first < other_last) & (other_first < last)
    step = np.maximum(last, 1)  # of rows and tiles
    shared = (last != other_last) | (first % step == other_first % step)
    apart = (kind == other_kind) & (((kind == 1) & ~columns) | ((kind >= 2) & ~shared))
    return near & ~apart


def _reason(window: Window, a: Class, b: Class, i: int, j: int) -> str:
    one, two = (window.describe(int(c.worker[n]), int(c.index[n])) for c, n in ((a, i), (b, j)))
    verbs = ["writes" if c.write else "reads" for c in (a, b)]
    what = f"`{b.value}`" if a.value == b.value else f"`{b.value}` in the bytes of `{a.value}`"
    if a.moment == b.moment:
        return f"{one} {verbs[0]} `{a.value}` and {two} {verbs[1]} {what} in the same phase"
    return f"{two} {verbs[1]} {what} without waiting for {one}, which {verbs[0]} it"


def check_boundary(window: Window) -> list[str]:
    """What lets a window stand for the whole program: its second section starts after the first one's end
    event, and ends after all of the first one's tasks."""
    first, second = window.sections
    reasons = []
    for w, queue in enumerate(second.queues):
        at = len(first.queues[w])
        if queue and (window.clocks[w][at] < window.closed[0]).any():
            reasons.append(f"{window.describe(w, at)} starts before section `{first.name}` has ended")
        if window.closed[1][w] < at:
            reasons.append(f"{window.describe(w, at - 1)} may still run when section `{second.name}` has ended")
    return reasons
