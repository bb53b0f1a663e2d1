"""The toy model with drafts: guesses are what it will say, but for some that are made wrong."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np

from onelaunch.ir.limits import Limits
from onelaunch.ir.vm import commit
from onelaunch.ir.vm.commit import End, guess
from onelaunch.runtime.state import State
from onelaunch.tests.prefixes import Watched
from onelaunch.tests.toy import VOCAB, answer


class DraftingToy(Watched):
    """`right`: how likely a guess is to be right. Commit is the reference body; the page checks are Watched's."""

    right = 0.7
    longest = 0  # rows of one slot that a step had

    def step(self) -> None:
        n, s = int(self.state.n_rows[0]), self.state
        assert (s.row_position[:n] < s.slot_limit[s.row_slot[:n]]).all()  # beyond it a slot has no pages
        super().step()

    def _choose(self, r: int) -> int:
        """With the drafts up to this row seen, as if they had been said."""
        s, slot = self.state, int(self.state.row_slot[r])
        said = s.slot_seen[slot].copy()
        for token in s.row_token[r - int(s.row_draft[r]) + 1 : r + 1]:
            s.slot_seen[slot, token // 32] |= np.uint32(1 << token % 32)
        try:
            return super()._choose(r)
        finally:
            s.slot_seen[slot] = said

    def _commit(self, n: int, outputs: int) -> None:
        self.longest = max(self.longest, 1 + int(self.state.row_draft[:n].max()))
        with mock.patch.object(commit, "guess", self._guess):
            commit.run_commit(self.state, self._limits)

    def _guess(self, s: State, limits: Limits, end: End, running: int) -> list[int]:
        with mock.patch.object(commit, "look_up", lambda history, count: self._say(end.slot, history.tolist(), count)):
            return guess(s, limits, end, running)

    def _say(self, slot: int, history: list[int], count: int) -> list[int]:
        s, rng = self.state, random.Random(f"{history[-8:]}{slot}")
        if count < 1 or rng.random() < 0.1:
            return []
        drawn = s.slot_temperature[slot] > 0
        said = answer(
            history, count, seed=int(s.slot_seed[slot]) if drawn else None, stream=int(s.slot_stream[slot]),
            penalty=float(s.slot_penalty[slot]),
        )  # fmt: skip
        return [token if rng.random() < self.right else rng.randrange(VOCAB - 2) for token in said]
