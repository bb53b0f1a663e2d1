"""The CPU backend: a native step library, called through ctypes (which releases the GIL meanwhile)."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import HostError, LoadError, UsageError
from ..ir.limits import PAGE_RUN
from .backend import StepFault
from .manifest import MAX_GROUPS, Manifest, Target
from .memory import Memory
from .state import State


class OlMemory(ctypes.Structure):
    """`struct OlMemory` of the step library."""

    _fields_ = (
        ("tables", ctypes.c_void_p * 2),  # few rows, many rows: int32 [workers][records][32]
        ("records", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("kv", ctypes.c_void_p * MAX_GROUPS),
        ("kv_pages", ctypes.c_int32 * MAX_GROUPS),
    )


def open_library(path: Path, target: Target) -> ctypes.CDLL:
    """Load a step library and declare its functions; LoadError if it is not what the manifest says."""
    try:
        library = ctypes.CDLL(str(path))
        handle, number = ctypes.c_void_p, ctypes.c_int32
        library.ol_level.restype, library.ol_level.argtypes = number, ()
        library.ol_create.restype, library.ol_create.argtypes = handle, (ctypes.POINTER(OlMemory), number)
        library.ol_step.restype, library.ol_step.argtypes = number, (handle,)
        library.ol_run.restype, library.ol_run.argtypes = number, (handle, number)
        library.ol_destroy.restype, library.ol_destroy.argtypes = None, (handle,)
        library.ol_read_gbps.restype = ctypes.c_double
        library.ol_read_gbps.argtypes = (handle, ctypes.c_uint64, handle)
    except (OSError, AttributeError) as error:
        raise LoadError(
            f"{target.library}: expected a step library for this system, got {error}",
            place=str(path),
            hint="it was compiled for another system: compile the model here",
        ) from error
    if library.ol_level() != target.level:
        raise LoadError(
            f"{target.library}: expected `level` {target.level}, got {library.ol_level()}", place=str(path)
        )
    return library


def _destroy(library: ctypes.CDLL, handle: int, memory: Memory, process: int) -> None:
    """Join the workers. `memory` is an argument so that it outlives them; a forked child has none to join."""
    if os.getpid() == process:
        library.ol_destroy(handle)


class CpuBackend:
    """`Backend` over a step library and its worker threads."""

    def __init__(self, library: Path, target: Target, manifest: Manifest, memory: Memory) -> None:
        self._library = open_library(library, target)
        self._manifest, self._memory = manifest, memory
        self.observer: Callable[[int], None] | None = None
        self.state = State(memory.state, manifest.fields)
        workers = memory.tables.shape[1]
        native = self._native_memory(memory)
        handle = self._library.ol_create(ctypes.byref(native), workers)
        if not handle:
            raise HostError(
                f"step: expected to start {workers} workers, got none",
                hint="the system refused threads or memory: load with fewer `threads`",
            )
        self._handle, self._process = handle, os.getpid()
        self._finalizer = weakref.finalize(self, _destroy, self._library, handle, memory, self._process)

    @staticmethod
    def _native_memory(memory: Memory) -> OlMemory:
        native = OlMemory(records=memory.tables.shape[2])
        for bucket in range(2):
            native.tables[bucket] = memory.tables[bucket].ctypes.data
        native.weights = memory.weights.ctypes.data
        native.workspace = memory.workspace.ctypes.data
        native.state = memory.state.ctypes.data
        for g, (kv, pages) in enumerate(zip(memory.kv, memory.kv_pages, strict=True)):
            native.kv[g], native.kv_pages[g] = kv.ctypes.data, pages
        return native

    def _ready(self) -> int:
        if not self._finalizer.alive:
            raise UsageError("model: expected an open one, got a closed one")
        if os.getpid() != self._process:
            raise UsageError(
                "model: expected one loaded in this process, got one from before a fork",
                hint="threads do not survive a fork: load the model in the child",
            )
        return int(self._handle)

    def step(self) -> None:
        rows = int(self.state.n_rows[0])
        if self._library.ol_step(self._ready()) != 0:
            raise StepFault.read(self.state.fault)
        if self.observer is not None:
            self.observer(rows)

    def run(self, steps: int) -> int:
        if self.observer is not None:
            return self._run_observed(steps)
        done = int(self._library.ol_run(self._ready(), steps))
        if done < 0:
            raise StepFault.read(self.state.fault)
        return done

    def _run_observed(self, steps: int) -> int:
        """`run`, a step at a time."""
        for done in range(steps):
            if self.state.n_rows[0] <= 0:
                return done
            self.step()
        return steps

    def logits(self, outputs: int) -> NDArray[np.float32]:
        start, stride = self._manifest.logits_offset, self._manifest.logits_stride
        raw = self._memory.workspace[start : start + 4 * stride * outputs]
        return raw.view(np.float32).reshape(outputs, stride)[:, : self._manifest.vocab]

    def zero_pages(self, group: int, pages: NDArray[np.int32]) -> None:
        cache = self._manifest.caches[group]
        pool = self._memory.pool(group, cache.layers * cache.kv_heads)
        pool[pages // PAGE_RUN, :, pages % PAGE_RUN] = 0

    def read_gbps(self) -> float:
        weights = self._memory.weights
        return float(self._library.ol_read_gbps(weights.ctypes.data, weights.nbytes, self._ready()))

    def close(self) -> None:
        """Stop the workers and give the memory back."""
        if self._finalizer.alive:
            self._finalizer()
            self.state = State(np.zeros(self._manifest.state_bytes, np.uint8), self._manifest.fields)
            buffers, self._memory = self._memory.buffers, _nothing(self._memory)
            for buffer in buffers:
                buffer.close()


def _nothing(memory: Memory) -> Memory:
    empty = np.empty(0, np.uint8)
    return Memory(np.empty((2, 0, 0, 32), np.int32), empty, empty, empty, (), ())
