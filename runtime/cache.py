"""KV page allocation: which slot holds which pages of which cache group, and what they hold.

A page is 64 tokens. A slot gets all pages of its longest possible length when it is admitted, so a running
request never runs out. A windowed group needs only a ring of pages: when the window has left a page, the slot
takes it again for later positions. The page of a window's sinks stays outside of the ring: the slot's first.

Full pages are kept and shared: `keep` files a slot's pages under their tokens, `find` gives the pages that a prompt
begins with, `take` starts a slot on them. Reference counts are derived from the page tables of the slots that live,
so none can be lost. A page that is kept, or that two slots hold, is never written: where a ring would, `grow` puts
another page in its place. No page is copied. What nobody holds stays until its page is needed, the least recently
used first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import UsageError
from ..ir.limits import PAGE_TOKENS, Limits
from .manifest import CacheGroup
from .pool import Pages, Pool
from .prefix import NONE, Node

__all__ = ["Cache", "Pages", "Pool", "page_counts"]


def page_counts(
    groups: Sequence[CacheGroup], limits: Limits, kv_tokens: int | None = None
) -> tuple[int, ...]:
    """Pages per group: room for every slot at full length, or for `kv_tokens` tokens in all."""
    if kv_tokens is None:
        return tuple(limits.slots * group.ring_pages for group in groups)
    if kv_tokens < PAGE_TOKENS:
        raise UsageError(f"kv_tokens: expected at least one page of {PAGE_TOKENS} tokens, got {kv_tokens}")
    pages = pages_of(kv_tokens)
    return tuple(min(limits.slots * group.ring_pages, pages) for group in groups)


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


@dataclass(frozen=True)
class Span:
    """What a slot holds of one group: pages of positions 64 * first .. 64 * end - 1, and the page of its sinks; `need`
    of them at most."""

    first: int
    end: int
    need: int
    total: int  # pages of all positions the slot may fill


class Cache:
    """All pools, and the page tables `tables[g, slot, position // 64]` a step reads.

    `_spans[slot]` is the truth about who holds what: set last, removed first, so an interrupt tears nothing.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        counts: Sequence[int],
        tables: Pages,
        context: int,
        keep_prefixes: bool = True,
    ) -> None:
        self._most = [group.ring_pages for group in groups]
        self._pinned = [group.pinned for group in groups]
        self._rings = [most - pinned for most, pinned in zip(self._most, self._pinned, strict=True)]
        # Pages that hold the window before a page's first position; without a window, all of them.
        self._back = [pages_of(group.window - 1) if group.window else context for group in groups]
        self._windowed = [g for g, group in enumerate(groups) if group.window]
        self.pools = [Pool(g, count) for g, count in enumerate(counts)]
        self.keeps = keep_prefixes
        self.root = Node(None, b"", [NONE] * len(groups))
        self._tables = tables
        self._spans: dict[int, list[Span]] = {}
        # Positions one request may fill in an empty cache; a group that holds a full ring holds any length.
        self.capacity = min(
            context if count >= ring else count * PAGE_TOKENS
            for count, ring in zip(counts, self._most, strict=True)
        )
        self.capacity = min(self.capacity, context)

    def find(self, keys: Sequence[bytes]) -> list[Node]:
        """The longest beginning of these pages of tokens that need not be computed again.

        A windowed group must hold only what its window reaches back to from the first page to compute, and the page
        of its sinks: nothing else that is before does a later row read. Where it does not, less is reused, even if
        the other groups have more.
        """
        path = self.root.path(keys) if self.keeps else []
        pinned = [pool for pool, count in zip(self.pools, self._pinned, strict=True) if count]
        if path and any(pool.find(path[0]) == NONE for pool in pinned):
            return []
        runs, best = [0] * len(self.pools), 0
        for n, node in enumerate(path, 1):
            for g, pool in enumerate(self.pools):
                runs[g] = runs[g] + 1 if pool.find(node) != NONE else 0
            if all(run >= min(n, back) for run, back in zip(runs, self._back, strict=True)):
                best = n
        return path[:best]

    def has_room(self, length: int, path: Sequence[Node] = ()) -> bool:
        """Whether a slot of `length` positions that starts on the pages of `path` can be had."""
        for g, pool in enumerate(self.pools):
            need = min(self._most[g], pages_of(length))
            if g in self._windowed:
                # A slot swaps pages as it goes, shared ones for its own: each is due its whole ring.
                due = sum(spans[g].need for spans in self._spans.values())
                if pool.size - int(np.count_nonzero(pool.spoiled)) - due < need:
                    return False
            elif pool.room(self._held(g, [pool.find(node) for node in path])) < need - len(path):
                return False
        return True

    def take(self, slot: int, length: int, path: Sequence[Node] = ()) -> None:
        """Give a slot pages for `length` positions, the first of them those of `path`; `has_room` must hold."""
        self.release(slot)
        total, spans = pages_of(length), []
        for g, pool in enumerate(self.pools):
            pinned = self._pinned[g]
            first = max(pinned, len(path) - self._back[g])
            end = min(total, first + self._rings[g])
            old = np.array([pool.find(node) for node in (*path[:pinned], *path[first:])], np.int32)
            after = int(old[-1]) if len(old) else NONE
            own = np.concatenate([old, pool.take(pinned + end - first - len(old), self._held(g, old), after)])
            # Entries outside repeat the slot's own pages: a stray read stays in its memory.
            ring = own[pinned:] if end > first else own
            self._tables[g, slot] = ring[(np.arange(self._tables.shape[2]) - first) % len(ring)]
            self._tables[g, slot, :pinned] = own[:pinned]
            spans.append(Span(first, end, min(self._most[g], total), total))
        self._spans[slot] = spans

    def reach(self, slot: int) -> int:
        """Positions a slot has pages for; past them, `grow` first."""
        if not self.keeps or not self._windowed:
            return self.capacity
        spans = self._spans[slot]
        return min(PAGE_TOKENS * spans[g].end for g in self._windowed)

    def grow(self, slot: int, end: int) -> None:
        """Move the slot's rings on to hold positions up to `end`: at most a step's rows after what is computed."""
        for g in self._windowed:
            while PAGE_TOKENS * self._spans[slot][g].end < end:
                self._move(g, slot)

    def _move(self, g: int, slot: int) -> None:
        """One page further: the page that the window left if it is this slot's alone, else another one."""
        pool, span, row = self.pools[g], self._spans[slot][g], self._tables[g, slot]
        assert (span.end < span.total, span.end - span.first) == (True, self._rings[g]), span
        page, held = int(row[span.first]), self._held(g)
        if pool.used[page] or pool.spoiled[page] or held[page] > 1:
            pool.touch(row[span.first : span.first + 1])
            held[page] -= 1
            page = int(pool.take(1, held, after=int(row[span.end - 1]))[0])
        row[span.end :: self._rings[g]] = page
        spans = list(self._spans[slot])
        spans[g] = Span(span.first + 1, span.end + 1, span.need, span.total)
        self._spans[slot] = spans

    def keep(self, slot: int, keys: Sequence[bytes]) -> None:
        """File a slot's first pages under their tokens: they are computed, and will not be written any more."""
        if not self.keeps or slot not in self._spans:
            return
        node = self.root
        for p, key in enumerate(keys):
            node = node.child(key)
            for g, pool in enumerate(self.pools):
                span, page = self._spans[slot][g], int(self._tables[g, slot, p])
                held = p < self._pinned[g] or span.first <= p < span.end
                if held and pool.find(node) == NONE and not pool.spoiled[page]:
                    pool.learn(page, node)

    def of(self, slot: int) -> list[Pages]:
        """The pages a slot holds of each group, by position."""
        if slot not in self._spans:
            return [np.zeros(0, np.int32)] * len(self.pools)
        rows = zip(self._tables[:, slot], self._pinned, self._spans[slot], strict=True)
        return [np.concatenate([row[:pinned], row[span.first : span.end]]) for row, pinned, span in rows]

    def release(self, slot: int) -> None:
        """What is known stays, the beginning of a prompt longest: it is of use to the most."""
        for pool, pages in zip(self.pools, self.of(slot), strict=True):
            pool.touch(pages[::-1])
        self._spans.pop(slot, None)

    def spoil(self, slot: int) -> None:
        """What a slot holds is of no use to anybody and to be cleared: see `scrub`."""
        for pool, pages in zip(self.pools, self.of(slot), strict=True):
            pool.spoiled[pages] = True
            for page in pages.tolist():
                pool.evict(page)

    def scrub(self, zero: Callable[[int, Pages], None]) -> None:
        """Clear spoiled pages that nobody holds any more: masked, not-a-number would still poison sums."""
        for g, pool in enumerate(self.pools):
            if pool.spoiled.any():
                pages = np.flatnonzero(pool.spoiled & (self._held(g) == 0)).astype(np.int32)
                zero(g, pages)
                pool.spoiled[pages] = False

    def forget(self) -> None:
        """Drop every page that nobody holds."""
        for g, pool in enumerate(self.pools):
            for page in np.flatnonzero((self._held(g) == 0) & (pool.used > 0)).tolist():
                pool.evict(page)

    def counts(self) -> list[tuple[int, int, int]]:
        """Pages of each group: held by slots, known but held by nobody, free."""
        found = []
        for g, pool in enumerate(self.pools):
            held = self._held(g) > 0
            known = int(np.count_nonzero(~held & (pool.used > 0)))
            found.append((int(np.count_nonzero(held)), known, pool.size - int(np.count_nonzero(held)) - known))
        return found

    def _held(self, g: int, more: Sequence[int] | Pages = ()) -> NDArray[np.int32]:
        """How many slots hold each page of a group; those in `more` count as held once more."""
        held = np.zeros(self.pools[g].size, np.int32)
        for slot in self._spans:
            held[self.of(slot)[g]] += 1
        held[np.asarray(more, np.int32)] += 1
        return held
