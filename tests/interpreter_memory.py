"""Which access of which program happens before which: a vector-clock race detector over a kernel's buffers.

Programs are ordered only by a release that an acquire sees (C++ memory model; counters change by atomic addition
alone, so every earlier release is in the release sequence that an acquire reads). Two accesses of one byte, of
which one writes and not both are atomic, race unless one happens before the other (Flanagan and Freund, FastTrack,
PLDI 2009, without the epoch compression of reads). Bytes are watched in granules of two.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
import torch

GRANULE = 2
GENERATED = "<onelaunch_step"  # how the file names of generated modules start


class Fault(Exception):
    """What a program did wrong."""


class Race(Fault):
    """Two unordered accesses of the same bytes."""


class Stray(Fault):
    """An access outside every buffer, a store to constant memory, or a load of what no program wrote."""


@dataclass
class Buffer:
    """One argument's memory. `constant`: never written; `fresh`: read only after a program wrote it."""

    name: str
    start: int
    end: int
    programs: int
    constant: bool = False
    fresh: bool = False
    writer: np.ndarray = field(init=False)  # [granules]: who wrote last ...
    written: np.ndarray = field(init=False)  # ... and when, by its own clock; 0: never
    read: np.ndarray = field(init=False)  # [programs, granules]: when each read last
    counted: np.ndarray = field(init=False)  # [programs, granules]: when each last changed it atomically

    def __post_init__(self) -> None:
        size = 0 if self.constant else -(-(self.end - self.start) // GRANULE)
        self.writer, self.written = np.zeros(size, np.int8), np.zeros(size, np.int32)
        self.read, self.counted = (np.zeros((self.programs, size), np.int32) for _ in range(2))


class Clocks:
    """Every program's knowledge of every other's progress, and the checks that follow from it."""

    def __init__(self, tensors: dict[str, torch.Tensor], programs: int, constant: set[str], fresh: set[str]) -> None:
        spans = {n: (t.data_ptr(), t.data_ptr() + t.nbytes) for n, t in tensors.items() if t.nbytes}
        made = [Buffer(n, a, b, programs, n in constant, n in fresh) for n, (a, b) in spans.items()]
        self.buffers = sorted(made, key=lambda b: b.start)
        self.starts = [b.start for b in self.buffers]
        self.known = np.eye(programs, dtype=np.int32)  # [who, of whom]
        self.released: dict[int, np.ndarray] = {}

    def load(self, me: int, addresses: np.ndarray, width: int) -> None:
        buffer = self._buffer(me, addresses, width, "load")
        if buffer is None or buffer.constant:
            return
        at = _granules(buffer, addresses, width)
        self._after_writes(buffer, me, at, "load")
        self._ordered(buffer, me, at, buffer.counted, "load", "atomic")
        if buffer.fresh and not buffer.written[at].all():
            self._fail(Stray, buffer, me, at[buffer.written[at] == 0], "load", "which no program wrote in this step")
        buffer.read[me, at] = self.known[me, me]

    def store(self, me: int, addresses: np.ndarray, width: int) -> None:
        buffer = self._buffer(me, addresses, width, "store")
        if buffer is None:
            return
        at = _granules(buffer, addresses, width)
        if buffer.constant:
            self._fail(Stray, buffer, me, at, "store", "which is constant")
        self._after_writes(buffer, me, at, "store")
        self._ordered(buffer, me, at, buffer.counted, "store", "atomic")
        self._ordered(buffer, me, at, buffer.read, "store", "load")
        buffer.writer[at], buffer.written[at] = me, self.known[me, me]

    def atomic(self, me: int, addresses: np.ndarray, width: int, polls: bool) -> None:
        """An atomic access; unless it `polls`, it changes memory."""
        buffer = self._buffer(me, addresses, width, "atomic")
        if buffer is None:
            return
        at = _granules(buffer, addresses, width)
        self._after_writes(buffer, me, at, "atomic")
        if not polls:
            self._ordered(buffer, me, at, buffer.read, "atomic", "load")
            buffer.counted[me, at] = self.known[me, me]

    def release(self, me: int, addresses: np.ndarray) -> None:
        for address in addresses.tolist():
            before = self.released.get(address, 0)
            self.released[address] = np.maximum(before, self.known[me])
        self.known[me, me] += 1

    def acquire(self, me: int, addresses: np.ndarray) -> None:
        for address in addresses.tolist():
            self.known[me] = np.maximum(self.known[me], self.released.get(address, 0))

    def place(self, address: int) -> str:
        """A buffer's name and the word in it."""
        buffer = self.buffers[bisect_right(self.starts, address) - 1]
        return f"{buffer.name}[{(address - buffer.start) // 4}]"

    def _buffer(self, me: int, addresses: np.ndarray, width: int, what: str) -> Buffer | None:
        """Whose memory all addresses are in; None if there are none."""
        if not addresses.size:
            return None
        low, high = int(addresses.min()), int(addresses.max()) + width
        number = bisect_right(self.starts, low) - 1
        if number < 0 or high > self.buffers[number].end:
            near = self.buffers[max(number, 0)]
            raise Stray(f"{what} by program {me} at {where()}: bytes {low - near.start}.. of `{near.name}`,"
                        f" which has {near.end - near.start}")  # fmt: skip
        return self.buffers[number]

    def _after_writes(self, buffer: Buffer, me: int, at: np.ndarray, what: str) -> None:
        writer = buffer.writer[at]
        bad = buffer.written[at] > self.known[me][writer]
        if bad.any():
            other = writer[bad][0]
            self._fail(Race, buffer, me, at[bad], what, f"unordered with a store by program {other}")

    def _ordered(self, buffer: Buffer, me: int, at: np.ndarray, when: np.ndarray, what: str, earlier: str) -> None:
        bad = when[:, at] > self.known[me][:, None]
        if bad.any():
            other, first = np.argwhere(bad)[0]
            self._fail(Race, buffer, me, at[first:], what, f"unordered with a {earlier} by program {other}")

    def _fail(self, kind: type[Fault], buffer: Buffer, me: int, at: np.ndarray, what: str, why: str) -> None:
        raise kind(f"{what} of {buffer.name}[{at[0] * GRANULE // 4}] by program {me} at {where()}, {why}")


def _granules(buffer: Buffer, addresses: np.ndarray, width: int) -> np.ndarray:
    first = (addresses - np.uint64(buffer.start)).astype(np.int64) // GRANULE
    parts = [first + i for i in range(max(1, width // GRANULE))]
    return np.concatenate(parts) if len(parts) > 1 else first


def where() -> str:
    """The line of generated code that runs now."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(GENERATED):
        frame = frame.f_back
    return f"{frame.f_code.co_name}, line {frame.f_lineno}" if frame else "no generated code"
