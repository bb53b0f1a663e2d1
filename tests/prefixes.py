"""A scheduler over the toy model that watches every page, for the tests of prefix reuse."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from onelaunch.ir.limits import PAGE_TOKENS, Limits
from onelaunch.runtime.cache import Cache, page_counts
from onelaunch.runtime.manifest import CacheGroup
from onelaunch.runtime.rows import Request, RowScheduler
from onelaunch.tests.test_rows import finish, interrupted
from onelaunch.tests.toy import LIMITS, VOCAB, ToyBackend, groups


class Watched(ToyBackend):
    """A toy that refuses to write a page that is kept or that two slots hold, or to read one that is not the slot's."""

    cache: Cache

    def step(self) -> None:
        s = self.state
        for r in range(int(s.n_rows[0])):
            slot, p = int(s.row_slot[r]), int(s.row_position[r]) // PAGE_TOKENS
            for g, pool in enumerate(self.cache.pools):
                page = int(s.pages[g, slot, p])
                assert page in self.cache.of(slot)[g]
                assert self.cache._held(g)[page] == 1
                assert not pool.used[page]
                lowest = max(0, int(s.row_position[r]) - (self._groups[g].window or 10**9) + 1)
                assert lowest // PAGE_TOKENS >= self.cache._spans[slot][g].first or lowest < self._groups[g].pinned * 64
                assert not self._groups[g].pinned or int(s.pages[g, slot, 0]) in self.cache.of(slot)[g]
        super().step()


class Fixture:
    """A scheduler, its backend and its cache."""

    def __init__(
        self,
        limits: Limits = LIMITS,
        kv_tokens: int | None = None,
        kinds: Sequence[CacheGroup] = (),
        keep: bool = True,
        toy: type[Watched] = Watched,
    ) -> None:
        kinds = kinds or groups(limits)
        counts = page_counts(kinds, limits, kv_tokens)
        self.backend = toy(limits, kinds, counts)
        self.cache = Cache(kinds, counts, self.backend.state.pages, limits.context, keep)
        self.backend.cache = self.cache
        self.rows = RowScheduler(self.backend, limits, self.cache, VOCAB)

    def run(self, *requests: Request, burst: int = 1) -> None:
        for request in requests:
            self.rows.submit(request)
        finish(self.rows, burst)

    def serve(self, rng: random.Random, requests: Sequence[Request]) -> list[Request]:
        """Requests come, run and are cancelled at random, checked after every step; the cancelled."""
        waiting, cancelled = list(reversed(requests)), list[Request]()
        while waiting or not self.rows.idle:
            while waiting and rng.random() < 0.3:
                self.rows.submit(waiting.pop())
            self.rows.step(rng.choice([1, 1, 7, 40]))
            if rng.random() < 0.02 and self.rows.running:
                cancelled.append(rng.choice(self.rows.running))
                self.rows.cancel(cancelled[-1:])
            self.check()
        return cancelled

    def serve_interrupted(self, rng: random.Random, requests: Sequence[Request]) -> None:
        """Steps are interrupted at any line, checked wherever the scheduler believes itself whole."""
        for request in requests:
            self.rows.submit(request)
        while not self.rows.idle:
            interrupted(lambda: self.rows.step(rng.choice([1, 4])), after=rng.randint(1, 1500))
            if not self.rows._torn:
                self.check()

    def check(self) -> None:
        """Every page that is kept holds the tokens it is filed under, and is filed where it is found."""
        for g, pool in enumerate(self.cache.pools):
            for page in np.flatnonzero(pool.used > 0).tolist():
                node = pool.nodes[page]
                assert node is not None
                assert pool.find(node) == page
                assert (self.backend.kv[g][:, page] == np.frombuffer(node.tokens, np.int32)).all()
                while node.parent:
                    assert node.parent.children[node.tokens] is node
                    node = node.parent
                assert node is self.cache.root

    def check_no_leak(self) -> None:
        """Nothing is held; with what is kept dropped, every page is free and no token remembered."""
        assert all(held == 0 for held, _, _ in self.cache.counts())
        self.cache.forget()
        assert [free for _, _, free in self.cache.counts()] == [pool.size for pool in self.cache.pools]
        assert not self.cache.root.children


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]
