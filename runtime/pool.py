"""The pages of one cache group: which hold tokens that are known, and which of those were of use last."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .prefix import NONE, Node

Pages = NDArray[np.int32]


class Pool:
    """Who holds a page is the cache's business: `held` counts the holders of each.

    A page whose tokens are known (`used` > 0) is never written; one that nobody holds may be evicted. `used` is
    the truth: it is written last when a page becomes known and first when it stops, so an interrupt tears nothing.
    """

    def __init__(self, group: int, pages: int) -> None:
        self.group, self.size = group, pages
        self.nodes: list[Node | None] = [None] * pages
        self.used = np.zeros(pages, np.int64)  # when a known page was last of use, by this pool's count; else 0
        self.spoiled = np.zeros(pages, bool)  # may hold not-a-number: cleared before its next use
        self._clock = 1

    def find(self, node: Node) -> int:
        """The page that holds the node's keys and values, or NONE."""
        page = node.pages[self.group]
        return page if page != NONE and self.used[page] and self.nodes[page] is node else NONE

    def learn(self, page: int, node: Node) -> None:
        """The page holds this node, from now on and until it is evicted."""
        node.pages[self.group], self.nodes[page] = page, node
        self.touch(np.array([page]), known=True)

    def touch(self, pages: Pages, known: bool = False) -> None:
        """The known ones of these were of use, the last one last."""
        known_pages = pages if known else pages[self.used[pages] > 0]
        self._clock += len(known_pages)
        self.used[known_pages] = self._clock - np.arange(len(known_pages))[::-1]

    def evict(self, page: int) -> None:
        self.used[page] = 0
        node, self.nodes[page] = self.nodes[page], None
        if node is not None and node.pages[self.group] == page:
            node.forget(self.group)

    def room(self, held: NDArray[np.int32]) -> int:
        """Pages that can be had: free, or known and held by nobody."""
        return int(np.count_nonzero((held == 0) & ~self.spoiled))

    def take(self, count: int, held: NDArray[np.int32], after: int = NONE) -> Pages:
        """Pages nobody holds, evicting the least recently used if too few are free.

        They are the ones behind page `after`, else the tightest run that holds them (read linearly then), else any.
        """
        usable = (held == 0) & ~self.spoiled
        missing = count - int(np.count_nonzero(usable & (self.used == 0)))
        if missing > 0:
            known = np.flatnonzero(usable & (self.used > 0))
            assert len(known) >= missing, (len(known), missing)
            for page in known[np.argsort(self.used[known])[:missing]].tolist():
                self.evict(page)
        free = np.flatnonzero(usable & (self.used == 0)).astype(np.int32)
        behind = free[(free > after) & (free <= after + count)] if after != NONE else free[:0]
        if len(behind) == count:
            return behind
        runs = np.split(free, np.flatnonzero(np.diff(free) != 1) + 1)
        return min((run for run in runs if len(run) >= count), key=len, default=free)[:count]
