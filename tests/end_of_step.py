"""The end of a compiled step alone: sample and commit over logits of the test's own, as native code runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.ir.limits import ALIGN, Limits
from onelaunch.ir.sampling import Sampling
from onelaunch.ir.table import ARGS, END, FIELDS
from onelaunch.runtime import load
from onelaunch.runtime.state import State

WORD = {name: i for i, name in enumerate(FIELDS)}
Rows = Sequence[tuple[int, int, int, int]]  # token, slot, position, draft


class EndOfStep:
    """A loaded artifact of one worker, its task tables cut to sample, commit and, of a draft model, its guesses."""

    def __init__(self, artifact: Path) -> None:
        self.model = load(artifact, threads=1)
        self.state: State = self.model._backend.state
        self.limits: Limits = self.model.limits
        self.vocab, self._stride = self.model.vocab, self.model.manifest.logits_stride
        memory = self.model._backend._memory
        guesses = self.limits.drafts if self.limits.has_draft_model else 0
        for table in memory.tables[:, 0]:
            live = int(np.flatnonzero(table[:, WORD["body"]] == END)[0])
            ends = np.flatnonzero(table[:live, WORD["body"]] == table[live - 1, WORD["body"]])  # of passes, if any
            commit = live - 1 - guesses * (ends[-1] - ends[-2] if guesses else 0)
            kept = table[[commit - 1, commit, *[live - 1] * guesses]]
            for word in ("wait0", "wait1", "signal", "prefetch"):
                kept[:, WORD[word]] = -1
            table[: len(kept)], table[len(kept), WORD["body"]] = kept, END
        self._own, self._drafts = (self._places(memory.workspace, kept[i]) for i in (0, -1))

    def _places(self, workspace: np.ndarray, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The logits that a record chooses from, [outputs, vocab], and their maxima."""
        n, tiles, floats = self.limits.outputs, -(-self._stride // 32), workspace.view(np.float32)
        logits, maxima = (int(word) * ALIGN // 4 for word in record[ARGS : ARGS + 2])
        found = floats[logits : logits + n * self._stride].reshape(n, -1)[:, : self.vocab]
        return found, floats[maxima : maxima + n * tiles].reshape(n, tiles)

    def start(self, slot: int, sampling: Sampling, limit: int, stop: Sequence[int], drafts: int) -> None:
        s = self.state
        s.slot_finished[slot] = s.slot_count[slot] = 0
        s.slot_limit[slot] = limit
        s.slot_stop[slot] = -1
        s.slot_stop[slot, : len(stop)] = stop
        s.slot_temperature[slot], s.slot_top_k[slot] = sampling.temperature, sampling.top_k
        s.slot_top_p[slot], s.slot_min_p[slot] = sampling.top_p, sampling.min_p
        s.slot_penalty[slot], s.slot_seed[slot] = sampling.repetition_penalty, sampling.seed
        s.slot_stream[slot] = sampling.stream
        s.slot_drafts_most[slot] = s.slot_drafts[slot] = drafts

    def put(self, rows: Rows, outputs: Sequence[int]) -> None:
        """The rows of the step, and which want a token."""
        s, n, m = self.state, len(rows), len(outputs)
        s.row_token[:n], s.row_slot[:n], s.row_position[:n], s.row_draft[:n] = np.array(rows, np.int32).T
        s.row_output[:n] = -1
        s.row_output[list(outputs)] = np.arange(m)
        s.output_row[:m] = outputs
        s.n_rows[0], s.n_outputs[0] = n, m

    def run(self, logits: np.ndarray, of_drafts: np.ndarray | None = None) -> list[int]:
        """Sample from logits [outputs, vocab] and commit; what was chosen at each. A draft model has others."""
        self._put(self._own, logits)
        if of_drafts is not None:
            self._put(self._drafts, of_drafts)
        self.model._backend.step()
        return self.state.output_token[: len(logits)].tolist()

    def _put(self, places: tuple[np.ndarray, np.ndarray], logits: np.ndarray) -> None:
        n, tiles = len(logits), places[1].shape[1]
        padded = np.full((n, tiles * 32), -np.inf, np.float32)
        padded[:, : self.vocab] = logits
        places[0][:n] = logits
        places[1][:n] = padded.reshape(n, -1, 32).max(-1)  # not-a-number stays one

    def fields(self) -> dict[str, Any]:
        return {name: value.copy() for name, value in vars(self.state).items() if isinstance(value, np.ndarray)}
