"""Weights asked for ahead, in the step model: who asked for how much of which matrix, and how much has come.

Memory answers in the order of asking. What was asked for goes to L2, so it is bound by the bandwidth of memory
alone, not by what the asking worker could draw; the worker reads it from L2 later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Ask:
    """`size` bytes of a matrix, of which `left` have not come."""

    weight: str
    size: float
    left: float


class Ahead:
    """What every worker has asked for and not yet used."""

    def __init__(self, workers: int) -> None:
        self._open: list[list[Ask]] = [[] for _ in range(workers)]
        self._batches: list[list[Ask]] = []  # asked for at the same time

    def ask(self, wanted: Iterable[tuple[str, float]]) -> None:
        """Per worker the matrix and the bytes; 0: nothing."""
        batch = []
        for asks, (weight, size) in zip(self._open, wanted, strict=True):
            if size:
                batch.append(Ask(weight, size, size))
                asks.append(batch[-1])
        self._batches.append(batch)

    def serve(self, size: float) -> None:
        """Memory had time for `size` bytes besides what workers draw."""
        while self._batches and size > 0:
            left = sum(ask.left for ask in self._batches[0])
            part = min(1.0, size / left) if left else 1.0
            for ask in self._batches[0]:
                ask.left -= part * ask.left
            size -= left
            if part == 1.0:
                self._batches.pop(0)

    def use(self, reads: Iterable[frozenset[str]]) -> list[Ask | None]:
        """Per worker, what it asked for of the matrices it reads now; what is left of it has to come still."""
        found: list[Ask | None] = []
        for asks, weights in zip(self._open, reads, strict=True):
            ask = next((a for a in asks if a.weight in weights), None)
            if ask is not None:
                asks.remove(ask)
            found.append(ask)
        used = [ask for ask in found if ask is not None]
        self._batches = [[a for a in batch if all(a is not u for u in used)] for batch in self._batches]
        return found
