"""A task table cut into launches: the same tiles as a graph of kernels, to compare with the one launch.

    table = lower(schedule, bodies, weights)
    for launch in per_phase(table):
        ...  # int32 [workers of this launch, records, RECORD_WORDS]
    for launch, part in streamed(table, stream):
        ...  # the same, beside the part of the weight stream that it takes: int64 [workers, chunks]

The depth of a record is the larger of the depth of the record before it in its worker's queue and one more than
that of the records which signal the events it waits for. Records of one depth are one launch; what ordered two
launches' records before is now the boundary between two kernels. So nothing in a launch waits or signals, and
nothing is prefetched: there is no wait to hide it behind. A launch has no more workers than it needs: worker w of
it is worker w of the table, and those after the last that has a record are left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import VerifyError
from .record import END, FIELDS, STREAM_PADDING

SEGMENTS = ("mega", "per-phase")
BODY, SIGNAL, STREAM = (FIELDS.index(name) for name in ("body", "signal", "stream"))
WAITS, TARGETS = ([FIELDS.index(f"{name}{i}") for i in (0, 1)] for name in ("wait", "target"))
CLEARED = [*WAITS, SIGNAL, FIELDS.index("prefetch")]

Table = NDArray[np.int32]
Stream = NDArray[np.int64]


def per_phase(table: Table) -> list[Table]:
    """One table per launch, in order, each with an END record after every worker's last; VerifyError on a deadlock."""
    return [_cut(table, first, end) for first, end in cuts(table)]


def streamed(table: Table, stream: Stream) -> list[tuple[Table, Stream]]:
    """The launches of `per_phase`, each with its own part of the weight stream, from chunk 0 on."""
    found = []
    for first, end in cuts(table):
        launch, worker = _cut(table, first, end), np.arange(len(table))
        starts, stops = table[worker, first, STREAM], table[worker, end, STREAM]
        chunks = int((stops - starts).max()) + STREAM_PADDING
        part = np.zeros((len(launch), chunks), np.int64)
        for w in range(len(launch)):
            part[w, : stops[w] - starts[w]] = stream[w, starts[w] : stops[w]]
        launch[:, :, STREAM] -= starts[: len(launch), None]
        found.append((launch, part))
    return found


def cuts(table: Table) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Each launch as the first record and the one past the last of every worker, [workers] both."""
    waits, targets = table[:, :, WAITS], table[:, :, TARGETS]
    number = np.arange(table.shape[1])
    ended = np.cumsum(table[:, :, BODY] == END, axis=1) > 0
    lengths = np.where(ended[:, -1], ended.argmax(1), table.shape[1])
    counts = np.zeros(max(int(waits.max()), int(table[:, :, SIGNAL].max()), 0) + 1, np.int64)
    at, found = np.zeros_like(lengths), []
    while (at < lengths).any():
        held = np.logical_or.reduce((waits >= 0) & (counts[waits] < targets), axis=2)
        stop = np.minimum(np.where(held.any(1), held.argmax(1), lengths), lengths)
        if not (stop > at).any():
            raise _deadlock(table, at, lengths, held)
        signals = table[:, :, SIGNAL][(number >= at[:, None]) & (number < stop[:, None])]
        counts += np.bincount(signals[signals >= 0], minlength=len(counts))
        found.append((at, stop))
        at = stop
    return found


def _cut(table: Table, first: NDArray[np.intp], end: NDArray[np.intp]) -> Table:
    """The records first..end-1 of every worker, that wait for nobody and tell nobody."""
    # Also for the epoch's sake: every worker reads it first, and in the launch that turns it nothing orders the two.
    workers = int(np.flatnonzero(end > first)[-1]) + 1
    launch = np.zeros((workers, int((end - first).max()) + 1, table.shape[2]), np.int32)
    launch[:, :, BODY] = END
    for w, (a, b) in enumerate(zip(first[:workers], end[:workers], strict=True)):
        launch[w, : b - a] = table[w, a:b]
    launch[:, :, CLEARED] = -1
    return launch


def _deadlock(table: Table, at: NDArray[np.intp], lengths: NDArray[np.intp], held: NDArray[np.bool_]) -> VerifyError:
    return VerifyError(
        [
            f"task table: expected signals for the waits of worker {w}, record {at[w]}, got too few: "
            f"events {[int(e) for e in table[w, at[w], WAITS] if e >= 0]}"
            for w in np.flatnonzero((at < lengths) & held.any(1))
        ],
        hint="the schedule is broken: compile the model again",
    )
