"""Rows chosen by the caller instead of the scheduler: for tests, research and benchmarks.

A slot used here keeps its pages and its cached positions until `release`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import UsageError, VerifyError
from ..ir.limits import PAGE_TOKENS, Limits
from .backend import Backend
from .cache import Cache
from .manifest import CacheGroup


class DirectRows:
    """Explicit steps on a backend whose scheduler is idle."""

    def __init__(
        self, backend: Backend, limits: Limits, cache: Cache, groups: Sequence[CacheGroup], vocab: int
    ) -> None:
        self._backend, self._state, self._cache = backend, backend.state, cache
        self._limits, self._groups, self._vocab = limits, groups, vocab
        self._filled: dict[int, int] = {}  # slot: positions in the cache
        self._peak: dict[int, int] = {}  # slot: positions ever written since position 0 was
        self._fixed: dict[int, int] = {}  # slot: positions that hold the benchmark's tokens

    def release(self) -> None:
        """Forget every slot: pages go back, cached positions are gone."""
        for slot in self._filled:
            self._cache.release(slot)
        self._filled, self._peak, self._fixed = {}, {}, {}
        self._state.n_rows[0] = self._state.n_outputs[0] = 0

    def step(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> NDArray[np.float32]:
        """One step over the given rows; logits [n_outputs, vocab] of the rows in `outputs`."""
        self._check(tokens, slots, positions, outputs)
        for slot, first, end in _runs(slots, positions):
            self._open(slot)
            self._reach(slot, first)
            self._fixed[slot] = 0
            self._advance(slot, first, end)
        self._write(tokens, slots, positions, outputs)
        self._backend.step()
        self._state.n_rows[0] = self._state.n_outputs[0] = 0
        return self._backend.logits(len(outputs)).copy()

    def bench_decode(self, steps: int, depth: int, slots: int, rows: int) -> list[float]:
        """Seconds of each of `steps` greedy steps of `rows` neighbouring tokens of each of `slots` slots.

        They are at position `depth` and behind; every step moves them on by one.
        """
        self._check_bench(steps, depth, slots, rows)
        every, limit = list(range(slots)), depth + steps + rows - 1
        for slot in every:
            self._fill(slot, depth)
        for slot in every:
            self._advance(slot, depth, limit)
        self._state.slot_limit[every] = limit
        self._state.slot_finished[every] = self._state.slot_count[every] = 0
        tokens, end = fixed_tokens(depth, depth + rows, self._vocab), depth + rows
        owners = [slot for slot in every for _ in range(rows)]
        self._write(tokens * slots, owners, [*range(depth, end)] * slots, range(slots * rows))
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self._backend.step()
            times.append(time.perf_counter() - start)
        self._state.slot_limit[every] = 0
        if (self._state.slot_count[every] != steps * rows).any() or (self._state.slot_finished[every] != 2).any():
            raise VerifyError(f"bench: expected {steps * rows} tokens in each slot, got not-a-number logits")
        return times

    def _check_bench(self, steps: int, depth: int, slots: int, rows: int) -> None:
        limits, capacity = self._limits, self._cache.capacity
        if min(steps, rows) < 1 or depth < 0 or depth + steps + rows - 1 > capacity:
            raise UsageError(
                f"bench: expected steps and rows from position 0 to {capacity}, got {steps} steps of {rows} rows "
                f"from {depth} on"
            )
        most = min(limits.rows, limits.outputs)
        if not 1 <= slots <= limits.slots or slots * rows > most:
            raise UsageError(
                f"bench: expected 1 to {limits.slots} slots and {most} rows in all, got {slots} slots of {rows} rows"
            )

    def bench_prefill(self, count: int) -> float:
        """Seconds to read a prompt of `count` tokens and choose its first token."""
        if not 1 <= count <= self._cache.capacity:
            raise UsageError(f"bench: expected 1 to {self._cache.capacity} prompt tokens, got {count}")
        self._open(0)
        self._fixed[0] = 0
        start = time.perf_counter()
        self._fill(0, count, output=True)
        return time.perf_counter() - start

    def _fill(self, slot: int, depth: int, output: bool = False) -> None:
        """Make positions 0..depth-1 of a slot hold the benchmark's tokens, computing only what is missing."""
        self._open(slot)
        done = min(self._fixed[slot], depth)
        if done and not self._reachable(slot, depth):
            done = 0
        while done < depth:
            end = min(depth, done + self._limits.rows)
            rows = end - done
            wanted = [rows - 1] if output and end == depth else []
            self._write(fixed_tokens(done, end, self._vocab), [slot] * rows, range(done, end), wanted)
            self._advance(slot, done, end)
            self._backend.step()
            done = end
        self._fixed[slot] = depth
        self._state.n_rows[0] = self._state.n_outputs[0] = 0

    def _open(self, slot: int) -> None:
        if slot in self._filled:
            return
        length = self._cache.capacity
        if not self._cache.has_room(length):
            raise UsageError(
                f"slot {slot}: expected KV pages for {length} tokens, got none left",
                hint="load with more `kv_tokens`, or use fewer slots",
            )
        state = self._state
        self._cache.take(slot, length)
        # Limit 0: the commit writes no rows of its own.
        state.slot_finished[slot] = state.slot_count[slot] = state.slot_limit[slot] = 0
        state.slot_seen[slot] = 0
        state.slot_stop[slot] = -1
        state.slot_temperature[slot] = state.slot_min_p[slot] = 0.0
        state.slot_top_p[slot] = state.slot_penalty[slot] = 1.0
        state.slot_top_k[slot] = state.slot_seed[slot] = state.slot_stream[slot] = 0
        if self._limits.drafts:
            state.start_drafts(slot, (), 0)
        self._filled[slot] = self._peak[slot] = self._fixed[slot] = 0

    def _advance(self, slot: int, first: int, end: int) -> None:
        self._filled[slot] = end
        self._peak[slot] = end if first == 0 else max(self._peak[slot], end)

    def _reachable(self, slot: int, position: int) -> bool:
        """Whether the window before `position` is still cached: a ring forgets what it was written over, but for the
        page of its sinks."""
        newest = (self._peak[slot] - 1) // PAGE_TOKENS
        return position == 0 or all(
            newest - max(group.pinned, max(0, position - group.window + 1) // PAGE_TOKENS)
            < group.ring_pages - group.pinned
            for group in self._groups
            if group.window
        )

    def _reach(self, slot: int, position: int) -> None:
        filled = self._filled[slot]
        if position > filled:
            raise UsageError(f"slot {slot}: expected a position up to {filled}, got {position}")
        if not self._reachable(slot, position):
            raise UsageError(
                f"slot {slot}: expected a position with its window cached, "
                f"got {position} after {self._peak[slot]}",
                hint="start the slot again from position 0",
            )

    def _write(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> None:
        state, n = self._state, len(tokens)
        state.row_token[:n], state.row_slot[:n], state.row_position[:n] = tokens, slots, positions
        state.row_output[:n] = -1
        state.clear_drafts(slice(n))
        state.row_output[list(outputs)] = np.arange(len(outputs))
        state.output_row[: len(outputs)] = outputs
        state.n_rows[0], state.n_outputs[0] = n, len(outputs)

    def _check(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], outputs: Sequence[int]
    ) -> None:
        limits, n = self._limits, len(tokens)
        if not len(slots) == len(positions) == n:
            raise UsageError(
                f"step: expected as many slots and positions as tokens ({n}), "
                f"got {len(slots)} and {len(positions)}"
            )
        if not 1 <= n <= limits.rows:
            raise UsageError(f"step: expected 1 to {limits.rows} rows, got {n}")
        if len(outputs) > limits.outputs:
            raise UsageError(f"step: expected at most {limits.outputs} outputs, got {len(outputs)}")
        for what, values, end in (
            ("token", tokens, self._vocab),
            ("slot", slots, limits.slots),
            ("position", positions, self._cache.capacity),
            ("output row", outputs, n),
        ):
            wrong = [value for value in values if not 0 <= value < end]
            if wrong:
                raise UsageError(f"step: expected every {what} from 0 to {end - 1}, got {wrong[0]}")
        if len(set(outputs)) != len(outputs):
            raise UsageError("step: expected different output rows, got one twice")
        runs = _runs(slots, positions)
        if len({slot for slot, _, _ in runs}) != len(runs):
            raise UsageError("step: expected the rows of a slot side by side, at consecutive positions")


def _runs(slots: Sequence[int], positions: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rows as (slot, first position, end) pieces of adjacent rows at consecutive positions."""
    runs: list[tuple[int, int, int]] = []
    for slot, position in zip(slots, positions, strict=True):
        if runs and runs[-1][0] == slot and runs[-1][2] == position:
            runs[-1] = (slot, runs[-1][1], position + 1)
        else:
            runs.append((slot, position, position + 1))
    return runs


def fixed_tokens(start: int, end: int, vocab: int) -> list[int]:
    """The benchmark's prompt, positions start..end-1, from the lower half of the vocabulary ."""
    return [(position * 31 + 5) % max(1, vocab // 2) for position in range(start, end)]
