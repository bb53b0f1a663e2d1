"""All programs of a grid at once, one at a time: a deterministic scheduler under Triton's interpreter.

Every program has a thread; exactly one holds the baton and hands it on at memory operations, to whom a seeded
source of chance says. The same seed gives the same interleaving. A program that polls a counter waits until the
counter changes; when nobody can go on, that is a deadlock, found at once.

What this cannot see: a program here is sequential, so barriers between the threads of one CTA mean nothing
(the PTX emulator and the lint of compiled code look for those), and the assembly forms of waits do not run.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import torch
from interpreter import Builder, Function, argument, interpreting
from interpreter_memory import Clocks, Fault, where

SWITCH = 0.05  # chance that a load or store hands the baton on; polls and signals always may
SPREAD = 2.0  # of the logarithm of a program's speed: some lag far behind
CHANGE = 0.01  # chance that a switch gives every program a new speed


class Deadlock(Fault):
    """Every program that has not ended waits."""


class _Ended(BaseException):
    """Unwinds the programs that are left when one has failed."""


class Grid:
    """The programs of one launch; what Builder tells its memory operations to."""

    def __init__(self, clocks: Clocks, programs: int, seed: int) -> None:
        self.clocks, self.programs, self.random = clocks, programs, Random(seed)
        self.current = self.random.randrange(programs)
        self.failure: BaseException | None = None
        self.turns = [threading.Semaphore(0) for _ in range(programs)]
        self.alive = set(range(programs))
        self.waits: dict[int, tuple[int, int]] = {}  # program: the address it polls and what it saw there
        self.polled: tuple[int, int, str, int] | None = None  # the last operation, if it was a poll
        self._new_speeds()

    # ---- memory operations ------------------------------------------------------------------

    def load(self, addresses: np.ndarray, width: int) -> None:
        self._operation()
        self.clocks.load(self.current, addresses, width)

    def store(self, addresses: np.ndarray, width: int) -> None:
        self._operation()
        self.clocks.store(self.current, addresses, width)

    @contextmanager
    def atomic(self, addresses: np.ndarray, width: int, order: str, polls: bool) -> Iterator[None]:
        if polls:
            self._poll(int(addresses[0]), order)
        else:
            self._operation(always=True)
        me = self.current
        self.clocks.atomic(me, addresses, width, polls)
        if order in ("release", "acquire_release"):
            self.clocks.release(me, addresses)
        yield
        if order in ("acquire", "acquire_release"):
            self.clocks.acquire(me, addresses)

    def _operation(self, always: bool = False) -> None:
        self.polled = None
        if len(self.alive) > 1 and (always or self.random.random() < SWITCH):
            self._hand_on(self._choose())

    def _poll(self, address: int, order: str) -> None:
        """Let others run until a counter that was polled just before has another value."""
        me, seen = self.current, _word(address)
        if self.polled == (me, address, order, seen):
            self.waits[me] = (address, seen)
            self._hand_on(self._choose())
            del self.waits[me]
        self.polled = (me, address, order, _word(address))

    # ---- whose turn it is -------------------------------------------------------------------

    def _new_speeds(self) -> None:
        self.speeds = [2.718 ** (SPREAD * self.random.gauss(0, 1)) for _ in range(self.programs)]

    def _choose(self) -> int:
        """A program that can go on."""
        if self.random.random() < CHANGE:
            self._new_speeds()
        ready = [p for p in sorted(self.alive) if p not in self.waits or _word(self.waits[p][0]) != self.waits[p][1]]
        if not ready:
            stuck = (
                f"program {p} waits for {self.clocks.place(a)}, which stays {v}" for p, (a, v) in self.waits.items()
            )
            raise Deadlock("; ".join(stuck) + f"; the last at {where()}")
        return self.random.choices(ready, [self.speeds[p] for p in ready])[0]

    def _hand_on(self, to: int) -> None:
        me = self.current
        if to == me:
            return
        self.current = to
        self.turns[to].release()
        self.turns[me].acquire()
        if self.failure is not None:
            raise _Ended

    def _run(self, me: int, kernel: Function, arguments: Mapping[str, Any]) -> None:
        """One program from its first turn to its end."""
        self.turns[me].acquire()
        try:
            if self.failure is None:
                with np.errstate(all="ignore"):
                    kernel(**arguments)
        except _Ended:
            pass
        except BaseException as error:
            self.failure = error
        self._finish(me)

    def _finish(self, me: int) -> None:
        self.alive.discard(me)
        self.waits.pop(me, None)
        if not self.alive:
            return
        try:
            self.current = min(self.alive) if self.failure else self._choose()
        except Deadlock as error:
            self.failure = error
            self.current = min(self.alive)
        self.turns[self.current].release()

    def run(self, kernel: Function, arguments: Mapping[str, Any]) -> None:
        threads = [threading.Thread(target=self._run, args=(p, kernel, arguments)) for p in range(self.programs)]
        for thread in threads:
            thread.start()
        self.turns[self.current].release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure


def launch(
    kernel: Function,
    arguments: Mapping[str, torch.Tensor | int],
    programs: int,
    seed: int = 0,
    constant: tuple[str, ...] = (),
    fresh: tuple[str, ...] = (),
) -> None:
    """Run a kernel on host tensors with all its programs live. Raises Race, Stray or Deadlock (see Buffer)."""
    tensors = {n: a for n, a in arguments.items() if isinstance(a, torch.Tensor)}
    grid = Grid(Clocks(tensors, programs, set(constant), set(fresh)), programs, seed)
    with interpreting(Builder(grid)):
        grid.run(kernel, {n: argument(a) for n, a in arguments.items()})


def _word(address: int) -> int:
    return ctypes.c_int32.from_address(address).value
