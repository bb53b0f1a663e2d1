"""Reference body of `commit`: record what was chosen, check drafts, write the next step's rows."""

from __future__ import annotations

import numpy as np

from ..drafting import adapted, look_up
from ..limits import Limits
from ..reference import INVALID, LENGTH, RUNNING, STOPPED
from .guess import End, begin_guessing, drafts_for
from .memory import State


def run_commit(state: State, limits: Limits) -> None:
    known: dict[int, int] = {}  # tokens of each slot of the step, as far as they are said
    for i in range(int(state.n_rows[0])):
        if not is_draft(state, limits, i):
            mark_seen(state, int(state.row_slot[i]), int(state.row_token[i]))
            known[int(state.row_slot[i])] = int(state.row_position[i]) + 1
    found = [commit_slot(state, limits, run, known) for run in runs(state, limits)]
    ends = [end for end in found if end is not None]
    if limits.has_draft_model:
        begin_guessing(state, limits, known, ends)
    else:
        write_rows(state, limits, ends)


def is_draft(state: State, limits: Limits, row: int) -> bool:
    return bool(limits.drafts and state.row_draft[row])


def runs(state: State, limits: Limits) -> list[list[int]]:
    """The outputs of the step, those of drafts behind what they follow."""
    found: list[list[int]] = []
    for j in range(int(state.n_outputs[0])):
        if is_draft(state, limits, int(state.output_row[j])):
            found[-1].append(j)
        else:
            found.append([j])
    return found


def commit_slot(state: State, limits: Limits, run: list[int], known: dict[int, int]) -> End | None:
    """Commit what was chosen after the slot's last token and after each draft that holds; None: the slot has ended."""
    rows, chosen = [int(state.output_row[j]) for j in run], [int(state.output_token[j]) for j in run]
    slot, held = int(state.row_slot[rows[0]]), 0
    while True:
        token, position = chosen[held], int(state.row_position[rows[held]])
        finished = commit_token(state, limits, slot, position, token)
        if finished or held + 1 == len(run) or int(state.row_token[rows[held + 1]]) != token:
            break
        held += 1
    if min(chosen[held + 1 :], default=0) < 0:
        finished = INVALID
    known[slot] = position + (1 if finished else 2)
    if limits.drafts:
        count_drafts(state, slot, len(run) - 1, held)
    if limits.has_draft_model and len(run) > 1:  # what held it has followed while it guessed, but for the last guess
        state.slot_followed[slot] += min(held, len(run) - 2)
    if finished:
        state.slot_finished[slot] = finished
    return None if finished else End(token, slot, position + 1)


def commit_token(state: State, limits: Limits, slot: int, position: int, token: int) -> int:
    """Record the token that the row at `position` chose; how the slot has ended, 0 if it goes on."""
    if token < 0:
        return INVALID
    state.slot_tokens[slot, state.slot_count[slot] % limits.context] = token
    state.slot_count[slot] += 1
    if limits.drafts and position + 1 < limits.context:
        state.slot_history[slot, position + 1] = token
    mark_seen(state, slot, token)
    if token in state.slot_stop[slot]:
        return STOPPED
    return LENGTH if position + 2 > state.slot_limit[slot] else RUNNING


def count_drafts(state: State, slot: int, guessed: int, held: int) -> None:
    state.slot_steps[slot] += 1
    state.slot_drafted[slot, :guessed] += 1
    state.slot_accepted[slot, :held] += 1
    most = int(state.slot_drafts_most[slot])
    state.slot_drafts[slot] = adapted(int(state.slot_drafts[slot]), guessed, held, most)


def write_rows(state: State, limits: Limits, ends: list[End]) -> None:
    """The next step's rows: each slot's last token, and guesses of what follows."""
    n = 0
    for end in ends:
        tokens = [end.token, *guess(state, limits, end, len(ends))]
        for i, token in enumerate(tokens):
            state.row_token[n], state.row_slot[n], state.row_position[n] = token, end.slot, end.position + i
            state.row_output[n] = state.output_row[n] = n
            if limits.drafts:
                state.row_draft[n] = i
            n += 1
    state.n_rows[0] = state.n_outputs[0] = n


def guess(state: State, limits: Limits, end: End, running: int) -> list[int]:
    """Drafts to follow a slot's last token, none past its limit."""
    if not limits.drafts:
        return []
    return look_up(state.slot_history[end.slot, : end.position + 1], drafts_for(state, limits, end, running))


def mark_seen(state: State, slot: int, token: int) -> None:
    state.slot_seen[slot, token // 32] |= np.uint32(1 << token % 32)
