"""Faults planted into a compiled step, for every rung that should notice them.

A fault changes one of four things: a schedule (before it is lowered), the task tables of all buckets, the text of the
generated kernel, or its PTX. `seen_by` names the rungs that must notice it:

    grid       the whole kernel, interpreted, all programs live, with a race detector (test_triton_concurrent.py)
    emulator   the compiled PTX, thread by thread (test_triton_faults.py)
    lint       the synchronisation lint of compiled code (test_sync_lint.py)

Barriers between the threads of a program are invisible to the first: there a program is sequential. The barrier
before a signal can only be taken from the PTX: without the one in the source Triton puts one there itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from onelaunch.ir.access import accesses
from onelaunch.ir.schedule import LIVE, Buffer, Schedule, phase_of
from onelaunch.ir.table import END, FIELDS

Tables = dict[str, np.ndarray]  # per bucket, int32 [workers, records, RECORD_WORDS]
WORD = {name: i for i, name in enumerate(FIELDS)}
GRID, EMULATOR, LINT = "grid", "emulator", "lint"


@dataclass(frozen=True)
class Fault:
    """`apply(schedule, random)`, `apply(tables, random)` or `apply(text)`; gives a changed copy."""

    name: str
    kind: str  # schedule | table | source | ptx
    seen_by: frozenset[str]
    apply: Callable[..., Any]
    experts: bool  # of a mixture of experts alone


FAULTS: dict[str, Fault] = {}


def _fault(kind: str, *seen_by: str, experts: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS[function.__name__] = Fault(function.__name__, kind, frozenset(seen_by), function, experts)
        return function

    return register


def faults(kind: str, rung: str, experts: bool = False) -> list[Fault]:
    """The faults of one kind that a rung must notice, those of any model or those of `experts` alone."""
    return [f for f in FAULTS.values() if f.kind == kind and rung in f.seen_by and f.experts == experts]


# ---- task tables --------------------------------------------------------------------------------


def _edit(tables: Tables, random: Random, event: str, change: dict[str, int | None]) -> Tables:
    """Change one record of the decode bucket that has an event in the word `event`: add to words, or make them -1.

    A worker whose drain has no tile in the step that is run (fewer rows or outputs than workers) does not need what
    it waits for: nobody can notice then. Nor does anybody wait for the commit's signal.
    """
    table = tables["few"].copy()
    awaited = table[:, :, [WORD["wait0"], WORD["wait1"]]]
    events = table[:, :, WORD[event]]
    found = np.argwhere((table[:, :, WORD["body"]] != END) & (events >= 0) & np.isin(events, awaited))
    worker, number = random.choice(found.tolist())
    for word, by in change.items():
        record = table[worker, number]
        record[WORD[word]] = -1 if by is None else record[WORD[word]] + by
    return {**tables, "few": table}


@_fault("table", GRID, EMULATOR)
def dropped_wait(tables: Tables, random: Random) -> Tables:
    return _edit(tables, random, "wait0", {"wait0": None})


@_fault("table", GRID, EMULATOR)
def target_too_low(tables: Tables, random: Random) -> Tables:
    """A wait that lets go one signal early."""
    return _edit(tables, random, "wait0", {"target0": -1})


@_fault("table", GRID, EMULATOR)
def target_too_high(tables: Tables, random: Random) -> Tables:
    """A wait for one signal more than come."""
    return _edit(tables, random, "wait0", {"target0": 1})


@_fault("table", GRID, EMULATOR)
def dropped_signal(tables: Tables, random: Random) -> Tables:
    return _edit(tables, random, "signal", {"signal": None})


@_fault("table", GRID, EMULATOR)
def doubled_share(tables: Tables, random: Random) -> Tables:
    """A worker does the tiles of a drain that are its neighbour's, and nobody its own."""
    table = tables["few"].copy()
    step = table[:, :, WORD["step"]]
    shared = (table[:, :, WORD["body"]] != END) & (table[:, :, WORD["last"]] == LIVE) & (step > 1)
    worker, number = random.choice(np.argwhere(shared).tolist())
    table[worker, number, WORD["first"]] = (table[worker, number, WORD["first"]] + 1) % step[worker, number]
    return {**tables, "few": table}


@_fault("table", GRID, EMULATOR)
def swapped_buckets(tables: Tables, random: Random) -> Tables:
    """The prompt step runs the decode step's table: its buffers hold fewer rows."""
    return {"few": tables["few"], "many": tables["few"]}


# ---- schedules ----------------------------------------------------------------------------------


def _replaced(schedule: Schedule, old: Buffer, **changes: Any) -> Schedule:
    buffers = tuple(dataclasses.replace(b, **changes) if b is old else b for b in schedule.buffers)
    return dataclasses.replace(schedule, buffers=buffers)


@_fault("schedule", GRID, EMULATOR)
def early_reuse(schedule: Schedule, random: Random) -> Schedule:
    """A phase writes its result over what its other tiles still read."""
    pairs = []
    for section in schedule.sections:
        graph = schedule.graph(section.name)
        for task in section.queues[0]:
            if phase_of(graph, task.phase).anchor_kind not in ("linear", "experts", "attend"):
                continue
            found = [a for a in accesses(graph, task) if a.value != "state" and not a.value.startswith("kv")]
            kept = [a for a in found if a.value not in ("token",) and not a.value.endswith(".max")]
            read = {schedule.buffer(section.name, a.value) for a in kept if not a.write}
            written = {schedule.buffer(section.name, a.value) for a in kept if a.write}
            pairs += [(r, w) for r in read for w in written if w is not r and r.offset != w.offset]
    read, written = random.choice(sorted(pairs, key=lambda p: (p[0].name, p[1].name)))
    return _replaced(schedule, written, offset=read.offset)


@_fault("schedule", GRID, EMULATOR)
def shared_panel(schedule: Schedule, random: Random) -> Schedule:
    """A panel that every worker fills for itself lies at one place for all."""
    private = sorted((b for b in schedule.buffers if b.private and ".panel." in b.name), key=lambda b: b.name)
    return _replaced(schedule, random.choice(private), private=False)


@_fault("schedule", GRID, EMULATOR, experts=True)
def shared_routes(schedule: Schedule, random: Random) -> Schedule:
    """The rows of each expert, which every worker lists for itself, lie at one place for all."""
    own = sorted((b for b in schedule.buffers if b.private and ".gather" in b.name), key=lambda b: b.name)
    return _replaced(schedule, random.choice(own), private=False)


# ---- text of the kernel -------------------------------------------------------------------------


def _without(text: str, old: str, new: str = "") -> str:
    assert old in text, f"the generated kernel has no `{old}` any more"
    return text.replace(old, new)


def _function(text: str, name: str, old: str, new: str = "") -> str:
    """Replace inside one function of the module."""
    start = text.index(f"def {name}(")
    end = text.find("\n@triton.jit", start)
    return text[:start] + _without(text[start:end], old, new) + text[end:]


@_fault("source", GRID, EMULATOR)
def relaxed_signal(text: str) -> str:
    """A task's results may become visible after its signal."""
    return _function(text, "signal", 'sem="release"', 'sem="relaxed"')


@_fault("source", GRID, EMULATOR)
def relaxed_wait(text: str) -> str:
    """What follows a wait may read what was there before."""
    text = _function(text, "wait", 'sem="acquire"', 'sem="relaxed"')
    return _function(text, "wait", "ld.acquire.gpu", "ld.relaxed.gpu")


@_fault("source", EMULATOR, LINT)
def no_barrier_after_wait(text: str) -> str:
    """One thread has waited; the others go on at once."""
    return _function(text, "wait", "            tl.debug_barrier()\n")


@_fault("source", EMULATOR)
def no_barrier_before_heads(text: str) -> str:
    """The epilogue of whole heads reads a unit's memory that other threads are still writing."""
    return _without(text, "[:, None], y)\n            tl.debug_barrier()\n", "[:, None], y)\n")


@_fault("source", EMULATOR, experts=True)
def no_barrier_after_the_last_expert(text: str) -> str:
    """A thread reads a sum to which others are still adding. Between experts the products' own barriers would do."""
    return _without(text, "if i + 1 >= number:\n            tl.debug_barrier()\n", "if i + 1 >= number:\n")


# ---- PTX ----------------------------------------------------------------------------------------


def _without_barriers(ptx: str, pattern: str, step: int, end: str = r"\bbra\b|^\$L__BB") -> str:
    """Without the barriers next to every line like `pattern`, before it (step -1) or after it (1), up to an `end`."""
    lines = ptx.splitlines()
    found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    assert found, f"the compiled kernel has no `{pattern}` any more"
    for near in found:
        near += step
        while not re.search(rf"\b(ld|st)\.global|cp\.async|{end}", lines[near]):
            if "bar.sync" in lines[near]:
                lines[near] = ""
            near += step
    return "\n".join(lines)


def _edited(ptx: str, pattern: str, replacement: str) -> str:
    changed, count = re.subn(pattern, replacement, ptx)
    assert count, f"the compiled kernel has no `{pattern}` any more"
    return changed


@_fault("ptx", EMULATOR, LINT)
def signal_without_release(ptx: str) -> str:
    return _edited(ptx, r"(red|atom)\.global\.gpu\.release\.add", r"\1.global.gpu.relaxed.add")


@_fault("ptx", EMULATOR, LINT)
def signal_without_barrier(ptx: str) -> str:
    """One thread signals while others still store."""
    return _without_barriers(ptx, r"gpu\.release\.add", -1, r"st\.shared")


@_fault("ptx", EMULATOR, LINT)
def wait_without_acquire(ptx: str) -> str:
    return _edited(ptx, r"ld\.acquire\.gpu", "ld.relaxed.gpu")


@_fault("ptx", EMULATOR, LINT)
def wait_without_barrier(ptx: str) -> str:
    return _without_barriers(ptx, r"ld\.acquire\.gpu", 1)
