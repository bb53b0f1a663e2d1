"""The validator: accept a schedule only if every way of running it computes what the program says.

The claim: whatever order the waits leave open, each task reads what it would read if the program ran phase by
phase on one worker. It follows from four checks, each independent of the passes that made the schedule.

1. Structure. Events, targets and signals agree, every task names a body of its phase, and running the queues
   as far as the waits allow finishes them. Events only count up, so one run decides for all.
2. Coverage. Over the workers, the tiles of each part are run exactly once; where each worker has a copy of the
   results for itself, each worker runs all of them, so that a copy is whole whoever reads it.
3. Places and lifetimes (`placement`). Every value has room, and a replay of each section in program order
   finds every value it reads in place, not overwritten, at the start, inside and at the end.
4. Order (`ordering`). Any two accesses that share a byte, one of them a write, happen in program order.

Layers are not unrolled. Order is checked in windows of two adjacent sections, each distinct pair of kinds once;
3 is per section, with carried values in place at both ends. By induction this covers the step: for sections i < j
with j > i + 1, a task of j starts after the end event of j - 1 (checked in the window j-1, j), that event comes
after the end event of i + 1 (the same, section by section), and that one after all tasks of i (checked in the
window i, i+1). So sections further apart are wholly ordered, and neighbours are ordered as the windows show.
Steps are separated by a barrier of all workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from .access import panel_value, stored
from .bodies import body_names, part_of
from .certificate import Certificate, text_hash
from .errors import VerifyError
from .graph import Graph
from .ordering import check_boundary, check_order, classes, run_window
from .phases import STATE_WRITERS, Phase
from .placement import check_buffers, check_lifetimes, touches
from .schedule import (
    BUCKETS,
    LIVE,
    PREVIOUS,
    Schedule,
    Section,
    Task,
    packed_name,
    panel_kind,
    part_bytes,
    part_units,
    part_weight,
    parts,
)
from .schedule_text import show_schedule, show_task
from .table import MAX_WAITS

SHOWN = 12  # reasons given at once


def validate(schedule: Schedule) -> Certificate:
    """The certificate of a right schedule; VerifyError with the reasons otherwise."""
    _refuse(schedule, list(_structure(schedule)))
    reasons = [r for s in schedule.sections for r in _coverage(schedule, s)]
    places = check_buffers(schedule)
    touched = {g.name: touches(schedule, g) for g in schedule.program.graphs}
    if not places:
        places = [r for g in schedule.program.graphs for r in check_lifetimes(schedule, g, touched[g.name])]
    counts = Counter(sections=len(schedule.sections), buffers=len(schedule.buffers))
    for section in schedule.sections:
        counts["tasks"] += sum(map(len, section.queues))
        counts["events"] += len(section.events)
        counts["waits"] += sum(len(t.waits) for q in section.queues for t in q)
    order = [g.name for g, _ in schedule.program.sections()]
    for before, after in dict.fromkeys(pairwise(order)):
        window, stuck = run_window(schedule.section(before), schedule.section(after))
        counts["windows"] += 1
        reasons += stuck or check_boundary(window)
        if not stuck and not places:
            found, pairs = check_order(window, classes(schedule, window, (touched[before], touched[after])))
            reasons += found
            counts["pairs"] += pairs
    _refuse(schedule, reasons + places)
    return Certificate(text_hash(show_schedule(schedule)), schedule.bucket, schedule.workers, dict(counts))


def validate_buckets(schedules: Mapping[str, Schedule]) -> dict[str, Certificate]:
    """Certificates of the buckets of one artifact, which must agree on all that a step leaves for the host."""
    certificates = {bucket: validate(s) for bucket, s in schedules.items()}
    one = next(iter(schedules.values()))
    reasons = []
    for bucket, s in schedules.items():
        if (s.program, s.limits, s.workers) != (one.program, one.limits, one.workers):
            reasons.append(f"bucket `{bucket}`: expected the program, limits and workers of `{one.bucket}`")
        elif _logits(s) != _logits(one):
            reasons.append(f"bucket `{bucket}`: expected logits at {_logits(one)}, got {_logits(s)}")
    _refuse(one, reasons)
    return certificates


def _logits(schedule: Schedule) -> int:
    program = schedule.program
    return schedule.buffer(program.exit.name, program.logits.name).offset


def _refuse(schedule: Schedule, reasons: list[str]) -> None:
    reasons = list(dict.fromkeys(reasons))
    if reasons:
        more = [f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
        place = f"schedule `{schedule.program.name}` {schedule.bucket}, {schedule.workers} workers"
        raise VerifyError(reasons[:SHOWN] + more, place=place)


def _structure(schedule: Schedule) -> Iterator[str]:
    """Reasons that make the schedule meaningless; the other checks rely on there being none."""
    names = [g.name for g in schedule.program.graphs]
    if [s.name for s in schedule.sections] != names:
        yield f"expected sections {', '.join(names)}, got {', '.join(s.name for s in schedule.sections)}"
        return
    if schedule.bucket not in BUCKETS or schedule.workers < 1:
        yield f"expected a bucket of {', '.join(BUCKETS)} and workers, got `{schedule.bucket}`, {schedule.workers}"
    pairs = set(pairwise(g.name for g, _ in schedule.program.sections()))
    for section in schedule.sections:
        if len(section.queues) != schedule.workers or len(section.heads) not in (0, schedule.workers):
            yield f"section `{section.name}`: expected {schedule.workers} workers, got {len(section.queues)}"
        yield from _events(section)
        graph = schedule.graph(section.name)
        sizes = {packed_name(p): part_bytes(f, p) for f in graph.phases if f.reads_matrix for p in parts(f)}
        no_end = section.name == names[0] or any(not schedule.section(b).end for b, a in pairs if a == section.name)
        for w, queue in enumerate(section.queues):
            for i, task in enumerate(queue):
                where = f"worker {w} task {i} of `{section.name}` (`{show_task(task)}`)"
                yield from (f"{where}: {reason}" for reason in _task(graph, section, task, no_end))
        for read in [t.prefetch for q in section.queues for t in q] + list(section.heads):
            if read and not (0 <= read.offset < read.offset + read.size <= sizes.get(read.weight, 0)):
                yield f"section `{section.name}`: prefetch of {read} is outside the section's weights"


def _events(section: Section) -> Iterator[str]:
    targets = dict(section.events)
    if len(targets) != len(section.events):
        yield f"section `{section.name}`: expected distinct events"
    if section.end not in targets and (section.end or targets):
        yield f"section `{section.name}`: end event `{section.end}` does not exist"
    signals = Counter(t.signal for q in section.queues for t in q)
    for event, target in section.events:
        if target < 1 or signals[event] != target:
            yield f"section `{section.name}`: event `{event}` expects {target} signals, got {signals[event]}"


def _task(graph: Graph, section: Section, task: Task, no_end: bool) -> Iterator[str]:
    phase = next((p for p in graph.phases if p.name == task.phase), None)
    if phase is None or task.body not in body_names(phase):
        yield f"`{task.phase}` {task.body} is no body of the program"
        return
    targets = dict(section.events)
    if task.signal and task.signal not in targets:
        yield f"signals `{task.signal}`, which does not exist"
    for event in task.waits:
        if event != PREVIOUS and event not in targets:
            yield f"waits for `{event}`, which does not exist"
        if event == PREVIOUS and no_end:
            yield "waits for the section before, which has no end event"
    if len(task.waits) > MAX_WAITS:
        yield f"expected at most {MAX_WAITS} waits, got {len(task.waits)}"
    if task.first < 0 or task.step < 1 or not (task.is_drain or task.first < task.last):
        yield "expected tiles in rising order"


def _coverage(schedule: Schedule, section: Section) -> Iterator[str]:
    """Each part's tiles over all workers: exactly once."""
    graph = schedule.graph(section.name)
    for phase in graph.phases:
        for body in body_names(phase):
            where = f"section `{section.name}`: `{phase.name}` {body}"
            tasks = [[t for t in q if t.phase == phase.name and t.body == body] for q in section.queues]
            if body.startswith("pack."):
                copies = _copied(schedule, graph, [panel_value(phase.name, body.removeprefix("pack."))])
                wrong = _private_packs(section, phase, body, tasks) if any(copies) else _drains(tasks)
            elif phase.anchor_kind == "rows":
                wrong = _rows(_copied(schedule, graph, stored(graph, phase)), tasks)
            elif phase.reads_matrix and not phase.is_drain:
                wrong = _ranges([t for q in tasks for t in q], part_units(phase, part_of(phase, body)))
            elif phase.anchor_kind in STATE_WRITERS:
                wrong = _ranges([t for q in tasks for t in q], 1)
            else:
                wrong = _drains(tasks)
            if wrong:
                yield f"{where}: {wrong}"


def _copied(schedule: Schedule, graph: Graph, values: Iterable[str]) -> set[bool]:
    """Whether values are in private buffers; both answers where some are."""
    keys = {f"{graph.name}/{value}" for value in values}
    return {b.private for b in schedule.buffers if not keys.isdisjoint(b.values)}


def _rows(copied: set[bool], tasks: list[list[Task]]) -> str:
    """Workers share the rows of results that they share, and each runs all rows of those it has copies of."""
    if len(copied) > 1:
        return "expected all results in private buffers or none"
    return _repeats(tasks) if True in copied else _drains(tasks)


def _repeats(tasks: list[list[Task]]) -> str:
    for w, mine in enumerate(tasks):
        if [(t.first, t.last, t.step) for t in mine] != [(0, LIVE, 1)]:
            shown = ", ".join(show_task(t).split()[3] for t in mine)
            return f"expected worker {w} to run every row once for its own copy, got {shown or 'none'}"
    return ""


def _ranges(tasks: list[Task], units: int) -> str:
    if any(t.is_drain or t.step != 1 for t in tasks):
        return "expected ranges of tiles, got a drain"
    at = 0
    for first, last in sorted((t.first, t.last) for t in tasks):
        if first != at:
            times = "twice" if first < at else "never"
            return f"expected each of {units} tiles once, got tile {min(first, at)} {times}"
        at = last
    return "" if at == units else f"expected {units} tiles, got {at}"


def _drains(queues: list[list[Task]]) -> str:
    """Live tiles: task i of n takes every n-th from i on."""
    tasks = [t for q in queues for t in q]
    n = len(tasks)
    got = sorted((t.first, t.last, t.step) for t in tasks)
    if got == [(i, LIVE, n) for i in range(n)] and n:
        return ""
    shown = ", ".join(show_task(t).split()[3] for t in tasks[:8])
    return f"expected drains that take every live tile once, got {shown or 'none'}"


def _private_packs(section: Section, phase: Phase, body: str, tasks: list[list[Task]]) -> str:
    """A worker that runs a matrix of this kind packs all rows for itself."""
    kind = body.removeprefix("pack.")
    for w, queue in enumerate(section.queues):
        mine = {t.body for t in queue if t.phase == phase.name and not t.body.startswith("pack.")}
        needs = any(panel_kind(part_weight(part_of(phase, name))) == kind for name in mine)
        if (needs and len(tasks[w]) != 1) or len(tasks[w]) > 1:
            return f"expected worker {w} to pack {'once' if needs else 'at most once'}, got {len(tasks[w])} times"
        if any((t.first, t.last, t.step) != (0, LIVE, 1) for t in tasks[w]):
            return f"expected worker {w} to pack every row"
    return ""
