"""A modelled step as a trace that Perfetto and chrome://tracing open: one track per worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...ir.schedule import Schedule
from .step_model import PhaseTime, StepModel
from .step_work import Work

Event = dict[str, Any]


def trace(step: StepModel, schedule: Schedule) -> dict[str, Any]:
    """Chrome's trace format: complete events, microseconds.

    A record is named by its phase and layer, its arguments say the body and bytes; what is left of a phase until the
    slowest worker is done and the join is over is an event `wait`. Every track adds up to the step.
    """
    events: list[Event] = [
        {"ph": "M", "pid": 0, "tid": w, "name": "thread_name", "args": {"name": f"worker {w}"}}
        for w in range(step.workers)
    ]
    phases: dict[str, list[PhaseTime]] = {}
    for phase in step.phases:
        phases.setdefault(phase.section, []).append(phase)
    now = step.machine.launch_us
    events += [_event(w, "launch", "wait", 0.0, now) for w in range(step.workers)]
    for graph, layer in schedule.program.sections():
        for phase in phases[graph.name]:
            name = phase.phase if layer < 0 else f"{phase.phase} {layer}"
            for worker in range(step.workers):
                events += _worker(phase, name, worker, now)
            now += phase.us
    about = {"machine": step.machine.title, "us": step.us, "floor_us": step.floor_us, "depth": step.depth}
    return {
        "displayTimeUnit": "ns",
        "otherData": about | {"assumptions": list(step.assumptions)},
        "traceEvents": events,
    }


def _worker(phase: PhaseTime, name: str, worker: int, now: float) -> Iterator[Event]:
    """A worker's part of a phase: the join, its records one after the other, then waiting."""
    end, at = now + phase.us, now + phase.join_us
    if phase.join_us:
        yield _event(worker, "wait", "wait", now, phase.join_us)
    records = phase.records[worker]
    for record, us in zip(records, _shared_out(phase, worker, records), strict=True):
        about = {"body": record.body, "bytes": record.memory, "bound": phase.bound}
        yield _event(worker, name, phase.section, at, us) | {"args": about}
        at += us
    if end - at > 1e-9:
        yield _event(worker, "wait", "wait", at, end - at)


def _shared_out(phase: PhaseTime, worker: int, records: tuple[Work, ...]) -> list[float]:
    """A worker's start by the round trips of its records, its stream by their bytes (or instructions)."""
    trips = sum(r.trips for r in records)
    asked = [r.memory or r.instructions * 1e-9 for r in records]
    return [
        phase.start_us[worker] * r.trips / trips + phase.stream_us[worker] * a / (sum(asked) or 1.0)
        for r, a in zip(records, asked, strict=True)
    ]


def _event(worker: int, name: str, category: str, start: float, us: float) -> Event:
    return {"ph": "X", "pid": 0, "tid": worker, "name": name, "cat": category, "ts": start, "dur": us}
