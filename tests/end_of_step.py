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
    """A loaded artifact of one worker whose task tables are cut to their last two records."""

    def __init__(self, artifact: Path) -> None:
        self.model = load(artifact, threads=1)
        self.state: State = self.model._backend.state
        self.limits: Limits = self.model.limits
        self.vocab, self._stride = self.model.vocab, self.model.manifest.logits_stride
        memory = self.model._backend._memory
        for table in memory.tables[:, 0]:
            live = int(np.flatnonzero(table[:, WORD["body"]] == END)[0])
            kept = table[live - 2 : live].copy()
            for word in ("wait0", "wait1", "signal", "prefetch"):
                kept[:, WORD[word]] = -1
            table[:2], table[2, WORD["body"]] = kept, END
            maxima = int(kept[0, ARGS + 1]) * ALIGN
        n, floats = self.limits.outputs, memory.workspace.view(np.float32)
        start = self.model.manifest.logits_offset // 4
        self._logits = floats[start : start + n * self._stride].reshape(n, -1)[:, : self.vocab]
        tiles = -(-self._stride // 32)
        self._maxima = floats[maxima // 4 : maxima // 4 + n * tiles].reshape(n, tiles)

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

    def run(self, logits: np.ndarray) -> list[int]:
        """Sample from logits [outputs, vocab] and commit; what was chosen at each."""
        n = len(logits)
        self._logits[:n] = logits
        padded = np.full((n, self._maxima.shape[1] * 32), -np.inf, np.float32)
        padded[:, : self.vocab] = logits
        self._maxima[:n] = padded.reshape(n, -1, 32).max(-1)  # not-a-number stays one
        self.model._backend.step()
        return self.state.output_token[:n].tolist()

    def fields(self) -> dict[str, Any]:
        return {name: value.copy() for name, value in vars(self.state).items() if isinstance(value, np.ndarray)}
