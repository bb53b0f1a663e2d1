"""The row scheduler: which rows the next step computes.

Running slots come first: the step's commit already wrote their rows. The rest of the row budget goes to
prompt chunks, shared evenly among the prompts being read (continuous batching, chunked prefill). Requests
that find no slot or no pages wait in order.

A prompt that begins with pages the cache knows is read from behind them. Its last token is always computed: its
logits are what the first token is chosen from. Where a prompt is cut changes no row, so neither does what is reused.

Truth is the requests and the state's token rings. `_rebuild` derives every row from them, so an interrupt
(Ctrl-C) at any point loses nothing: the next step rebuilds and goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from ..ir.errors import UsageError
from ..ir.limits import PAGE_TOKENS, STOP_TOKENS, Limits
from .backend import Backend
from .cache import Cache
from .prefix import Node, common_pages
from .request import FINISH, Request


class RowScheduler:
    """Drives a backend for any number of requests. Not safe to share between threads."""

    def __init__(self, backend: Backend, limits: Limits, cache: Cache, vocab: int) -> None:
        self._backend, self._state, self._cache = backend, backend.state, cache
        self._limits, self._vocab = limits, vocab
        self.slots: list[Request | None] = [None] * limits.slots
        self.queue: deque[Request] = deque()
        self._torn = False  # a step began and did not end

    @property
    def idle(self) -> bool:
        return not self.queue and not any(self.slots)

    @property
    def running(self) -> list[Request]:
        return [request for request in self.slots if request is not None]

    def check(self, request: Request) -> None:
        """UsageError if the request could never run."""
        prompt, context = request.prompt, self._limits.context
        if not len(prompt):
            raise UsageError("prompt: expected at least one token, got none")
        if len(prompt) > context:
            raise UsageError(
                f"prompt: expected at most {context} tokens (the compiled context), got {len(prompt)}",
                hint="shorten the prompt, or compile with a longer context",
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self._vocab:
            wrong = low if low < 0 else high
            raise UsageError(f"prompt: expected token ids 0 to {self._vocab - 1}, got {wrong}")
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
        if request.length > self._cache.capacity:
            room = self._cache.capacity - len(prompt) + 1
            what = "the compiled context" if self._cache.capacity == context else "the KV cache"
            raise UsageError(
                f"max_new_tokens: expected at most {max(room, 0)} after a prompt of {len(prompt)} tokens "
                f"({what} is {self._cache.capacity}), got {request.max_new_tokens}",
                hint="ask for fewer, or compile with a longer context (or load with more `kv_tokens`)",
            )
        if len(request.stop_tokens) > STOP_TOKENS:
            raise UsageError(f"stop tokens: expected at most {STOP_TOKENS}, got {len(request.stop_tokens)}")

    def submit(self, request: Request) -> None:
        """Queue a request; UsageError if it could never run."""
        self.check(request)
        request.submitted = time.perf_counter()
        self.queue.append(request)

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended; their pages and slots are free at once."""
        gone = [request for request in requests if not request.finish]
        if gone:
            self._torn = True
            for request in gone:
                request.finish, request.ended = "cancelled", time.perf_counter()
            self._rebuild()

    def step(self, burst: int = 1) -> None:
        """Compute one step, or up to `burst` steps back to back while there is only decoding to do."""
        if self._torn:
            self._rebuild()
        self._torn = True
        self._admit()
        chunks = self._add_prompt_rows()
        if self._state.n_rows[0] == 0:
            self._torn = False
            return
        # A ring holds the window and a step's rows, so that is how far ahead its pages can be laid out.
        steps = 1 if chunks or self.queue else min(burst, self._limits.rows // (1 + self._limits.drafts))
        self._move_rings(chunks, steps)
        if steps == 1:
            self._backend.step()
        else:
            self._backend.run(steps)
        for request, count in chunks:
            request.done += count
        self._collect()
        self._torn = False

    def _admit(self) -> None:
        """Start waiting requests in order: one that finds no pages holds up the rest, so none starves.

        One whose beginning is just being read lets others pass, but for the slot it will need.
        """
        most, waiting = min(self._limits.slots, self._limits.rows), 0
        for request in self.running if self.queue else ():
            self._keep(request)
        for request in list(self.queue):
            if len(self.running) + waiting >= most:
                return
            path = self._cache.find(request.reusable())
            if self._is_being_read(request, len(path)):
                waiting += 1
                continue
            if not self._cache.has_room(request.length, path):
                return
            slot = self.slots.index(None)
            self.slots[slot] = request
            self._start(request, slot, path)
            self.queue.remove(request)

    def _is_being_read(self, request: Request, known: int) -> bool:
        """Whether a running prompt shares more than `known` pages with this one and has yet to compute them."""
        reading = [other for other in self.running if other.unread] if self._cache.keeps else []
        shared = [(common_pages(request.reusable(), other.reusable()), other.done) for other in reading]
        return any(pages > known and done < pages * PAGE_TOKENS for pages, done in shared)

    def _keep(self, request: Request) -> None:
        """Let others find the pages it has filled since it was last asked."""
        count = request.computed // PAGE_TOKENS
        if self._cache.keeps and count > request.kept:
            self._cache.keep(request.slot, request.keys(count))
            request.kept = count

    def _move_rings(self, chunks: list[tuple[Request, int]], steps: int) -> None:
        """Have pages for the positions the next steps write. What a ring would write over is kept first."""
        ends = [(request, request.done + count) for request, count in chunks]
        reach = steps * (1 + self._limits.drafts)
        ends += [(r, min(r.computed + reach, r.length)) for r in self.running if r.tokens]
        for request, end in ends:
            if end > self._cache.reach(request.slot):
                self._keep(request)
                self._cache.grow(request.slot, end)

    def _start(self, request: Request, slot: int, path: Sequence[Node]) -> None:
        state, sampling = self._state, request.sampling
        self._cache.take(slot, request.length, path)
        request.done = request.reused = len(path) * PAGE_TOKENS
        request.kept = 0
        state.slot_finished[slot] = state.slot_count[slot] = 0
        # The whole prompt counts as seen from the start: what the penalty does must not depend on the chunks.
        prompt = np.asarray(request.prompt, np.uint32)
        state.slot_seen[slot] = 0
        np.bitwise_or.at(state.slot_seen[slot], prompt >> 5, np.uint32(1) << (prompt & 31))
        state.slot_limit[slot] = request.length
        state.slot_stop[slot] = -1
        state.slot_stop[slot, : len(request.stop_tokens)] = request.stop_tokens
        state.slot_temperature[slot], state.slot_top_k[slot] = sampling.temperature, sampling.top_k
        state.slot_top_p[slot], state.slot_min_p[slot] = sampling.top_p, sampling.min_p
        state.slot_penalty[slot] = sampling.repetition_penalty
        state.slot_seed[slot] = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
        state.slot_stream[slot] = sampling.stream & 0xFFFF_FFFF
        if self._limits.drafts:
            state.start_drafts(slot, request.prompt, request.drafts, request.reused)
        request.started = time.perf_counter()
        request.slot = slot  # last: from here on the slot's state is this request's

    def _add_prompt_rows(self) -> list[tuple[Request, int]]:
        """Append prompt chunks after the decode rows: an even share each; short ones leave the rest."""
        state = self._state
        row, output = int(state.n_rows[0]), int(state.n_outputs[0])
        reading = sorted((r for r in self.running if r.unread), key=lambda r: r.unread)
        chunks = []
        for i, request in enumerate(reading):
            count = min(request.unread, (self._limits.rows - row) // (len(reading) - i))
            if not count:
                continue
            rows, start = slice(row, row + count), request.done
            state.row_token[rows] = request.prompt[start : start + count]
            state.row_slot[rows] = request.slot
            state.row_position[rows] = np.arange(start, start + count)
            state.row_output[rows] = -1
            state.clear_drafts(rows)
            row += count
            if count == request.unread:  # its last row is the first to want a token
                state.row_output[row - 1], state.output_row[output] = output, row - 1
                output += 1
            chunks.append((request, count))
        state.n_rows[0], state.n_outputs[0] = row, output
        return chunks

    def _collect(self) -> None:
        """Take committed tokens from the rings; free what finished."""
        state, now = self._state, time.perf_counter()
        for slot, request in enumerate(self.slots):
            if request is None or request.slot < 0:
                continue
            had, count = len(request.tokens), int(state.slot_count[slot])
            ring = state.slot_tokens[slot]
            for i in range(had, count):
                token = int(ring[i % len(ring)])
                if token >= 0:  # -1: nothing could be chosen
                    request.tokens.append(token)
            if not had and request.tokens:
                request.first_token = now
            if request.drafts:
                request.steps = int(state.slot_steps[slot])
                request.drafted = tuple(state.slot_drafted[slot].tolist())
                request.accepted = tuple(state.slot_accepted[slot].tolist())
            if state.slot_finished[slot]:
                request.ended, request.finish = now, FINISH[int(state.slot_finished[slot])]
                self._free(slot)

    def _free(self, slot: int) -> None:
        request = self.slots[slot]
        if request is not None and request.finish == "invalid":
            # Not-a-number in a masked position of a later owner would still poison its sums.
            self._cache.spoil(slot)
        elif request is not None and request.slot >= 0:
            request.kept = 0  # all of them again: what others had filed may be gone by now
            self._keep(request)
        self._cache.release(slot)
        self._cache.scrub(self._backend.zero_pages)
        self.slots[slot] = None

    def _rebuild(self) -> None:
        """Derive slots, pages and decode rows from the requests again."""
        state = self._state
        for slot, request in enumerate(self.slots):
            if request is None or request.slot < 0 or request.finish:
                self._free(slot)
        self._collect()
        self.queue = deque(r for r in self.queue if r.slot < 0 and not r.finish)
        decoding = [r for r in self.running if r.tokens]
        for i, request in enumerate(decoding):
            request.done = len(request.prompt)
            state.row_token[i], state.row_slot[i] = request.tokens[-1], request.slot
            state.row_position[i] = len(request.prompt) + len(request.tokens) - 1
            state.row_output[i] = state.output_row[i] = i
        state.clear_drafts(slice(len(decoding)))
        state.n_rows[0] = state.n_outputs[0] = len(decoding)
        self._torn = False
