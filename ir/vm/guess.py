"""Reference of how a model drafts within a step: the rows of its passes, and the guesses that come of them.

Commit writes the rows of the first pass; `guess`, at the end of each, those of the next, and at last the next step's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..limits import Limits
from .memory import State


@dataclass(frozen=True)
class End:
    """Where a slot that goes on has got to: its last token, which is computed next, at `position`."""

    token: int
    slot: int
    position: int


Row = tuple[int, int, int]  # token, slot, position


def put_rows(state: State, rows: Sequence[Row], wanting: Sequence[int]) -> None:
    """The rows to compute next; `wanting`: which of them want logits."""
    for i, (token, slot, position) in enumerate(rows):
        state.row_token[i], state.row_slot[i], state.row_position[i], state.row_output[i] = token, slot, position, -1
    for j, i in enumerate(wanting):
        state.row_output[i], state.output_row[j] = j, i
    state.n_rows[0], state.n_outputs[0] = len(rows), len(wanting)


def drafts_for(state: State, limits: Limits, end: End, running: int) -> int:
    """How many drafts a slot is to have in the next step: none past its limit. Negative: none."""
    room = int(state.slot_limit[end.slot]) - end.position - 1
    return min(int(state.slot_drafts[end.slot]), limits.drafts_beside(running), room)


def begin_guessing(state: State, limits: Limits, known: Mapping[int, int], ends: Sequence[End]) -> None:
    """The draft model's first rows: of each slot of the step, the tokens it has not followed.

    known: the tokens of each slot so far, the last one chosen included. A step has room for as many rows as its
    bucket; a slot that finds too few catches up later and drafts nothing until then.
    """
    room, rows, wanting = limits.rows_beside(int(state.n_rows[0])), list[Row](), list[int]()
    going = {end.slot: (e, end) for e, end in enumerate(ends)}
    for slot, length in known.items():
        if not state.slot_drafts_most[slot]:
            length = 0  # it decodes plainly for as long as it runs
        start = int(state.slot_followed[slot])
        stop = min(length, start + room - len(rows))
        rows += [(int(state.slot_history[slot, p]), slot, p) for p in range(start, stop)]
        state.slot_followed[slot] = max(start, stop)
        if slot not in going:
            continue
        e, end = going[slot]
        count = max(0, drafts_for(state, limits, end, len(ends))) if stop == length else 0
        wanting += [len(rows) - 1] if count else []
        state.end_slot[e], state.end_position[e], state.end_token[e, 0] = slot, end.position, end.token
        state.end_drafts[e] = count
    state.n_ends[0], state.draft_pass[0] = len(ends), 0
    put_rows(state, rows, wanting)


def run_guess(state: State, limits: Limits, likeliest: Sequence[int]) -> None:
    """Note the likeliest token of each output, -1: its logits are not finite, and write the rows of what follows."""
    state.draft_pass[0] += 1
    n, ends = int(state.draft_pass[0]), range(int(state.n_ends[0]))
    for e, token in zip([e for e in ends if state.end_drafts[e] >= n], likeliest, strict=True):
        if token < 0:
            state.end_drafts[e] = n - 1
        else:
            state.end_token[e, n] = token
    rows = [(e, n) for e in ends if state.end_drafts[e] > n]
    if n == limits.drafts:
        rows = [(e, i) for e in ends for i in range(int(state.end_drafts[e]) + 1)]
    put_rows(state, [_row(state, e, i) for e, i in rows], range(len(rows)))
    state.row_draft[: len(rows)] = np.array([i for _, i in rows], np.int32)


def _row(state: State, e: int, i: int) -> Row:
    """The i-th guess of a slot that goes on; its last token is the 0-th."""
    return int(state.end_token[e, i]), int(state.end_slot[e]), int(state.end_position[e]) + i
