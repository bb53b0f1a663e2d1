"""A step as CUDA graphs: the launches of each row bucket, captured once and replayed.

One cooperative launch walks the whole task table (`mega`), or one launch per segment of it walks the same records
between kernel boundaries (`per-phase`, `ir/segments.py`). Tables, arguments and code are fixed at the capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import HostError
from ..ir.segments import streamed
from .cuda_kernel import Kernel

NOTHING = {"global_scratch": 0, "profile_scratch": 0}


@dataclass(frozen=True)
class Launch:
    """One kernel of a step: the addresses of its table and its part of the weight stream, and their sizes."""

    table: int
    stream: int
    workers: int
    records: int
    chunks: int


class StepGraphs:
    """The graph of each bucket, in `replay` order. All calls are made in the kernel's current context.

    tables: int32 [buckets, workers, records, words]; weight_stream: int64 [workers, chunks]; memory: addresses by
    kernel parameter, `control` as one address per bucket in `controls`.
    """

    def __init__(
        self,
        kernel: Kernel,
        stream: Any,
        tables: NDArray[np.int32],
        weight_stream: NDArray[np.int64],
        segments: str,
        memory: Mapping[str, int],
        controls: Sequence[int],
    ) -> None:
        self._kernel, self._stream, self._context, self._call = kernel, stream, kernel.context, kernel.call
        self._api = kernel.context.driver.api
        self._memory, self._controls, self._alone = memory, controls, segments == "mega"
        self.launches = [
            self._place([(table, weight_stream)] if self._alone else streamed(table, weight_stream)) for table in tables
        ]
        # Copies from memory that is not page-locked may still be under way, and not in our stream.
        self._call("cuCtxSynchronize")
        self._graphs = [self._capture(bucket) for bucket in range(len(tables))]
        self._events: list[Any] = []

    def replay(self, bucket: int) -> None:
        """Queue one step."""
        self._call("cuGraphLaunch", self._graphs[bucket], self._stream)

    def time(self, bucket: int) -> None:
        """Capture a bucket anew, with an event before its first launch and after each: see `times`."""
        flags = self._api.CUevent_flags.CU_EVENT_DEFAULT
        count = len(self.launches[bucket]) + 1
        self._events = [self._context.make("cuEventCreate", flags, undo="cuEventDestroy") for _ in range(count)]
        timed = self._capture(bucket, self._events)
        self._context.free(self._graphs[bucket])
        self._graphs[bucket] = timed

    def times(self) -> list[float]:
        """Seconds between the events of the last replay of the bucket that `time` was called for."""
        pairs = zip(self._events, self._events[1:], strict=False)
        return [1e-3 * float(self._call("cuEventElapsedTime", a, b)) for a, b in pairs]

    def _place(self, parts: Sequence[tuple[NDArray[np.int32], NDArray[np.int64]]]) -> list[Launch]:
        """Tables and streams on the device; records are whole lines of 128 bytes."""
        tables = self._upload([table for table, _ in parts])
        streams = self._upload([stream for _, stream in parts])
        return [
            Launch(at, stream_at, len(table), table.shape[1], stream.shape[1])
            for (table, stream), at, stream_at in zip(parts, tables, streams, strict=True)
        ]

    def _upload(self, arrays: Sequence[NDArray[Any]]) -> list[int]:
        """The arrays on the device, one after the other; their addresses."""
        words = np.concatenate([array.reshape(-1) for array in arrays])
        at = int(self._context.allocate(words.nbytes))
        self._call("cuMemcpyHtoD", at, words.ctypes.data, words.nbytes)
        ends = np.cumsum([0, *(array.nbytes for array in arrays)])
        return [at + int(end) for end in ends[:-1]]

    def _capture(self, bucket: int, events: Sequence[Any] = ()) -> Any:
        """A bucket's launches as a graph, ready to be replayed."""
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            self._launch(bucket, events)
        except HostError:
            with contextlib.suppress(HostError):  # the capture is invalid: end it, but say what made it so
                self._call("cuGraphDestroy", self._call("cuStreamEndCapture", self._stream))
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            ready = self._context.make("cuGraphInstantiate", graph, 0, undo="cuGraphExecDestroy")
        finally:
            self._call("cuGraphDestroy", graph)
        self._call("cuGraphUpload", ready, self._stream)
        return ready

    def _launch(self, bucket: int, events: Sequence[Any]) -> None:
        values = {**self._memory, **NOTHING, "control": self._controls[bucket]}
        self._record(events[:1])
        for i, one in enumerate(self.launches[bucket]):
            values |= {"table": one.table, "stream": one.stream, "records": one.records, "chunks": one.chunks}
            self._kernel.launch(bucket, one.workers, values, self._stream, together=self._alone)
            self._record(events[i + 1 : i + 2])

    def _record(self, events: Sequence[Any]) -> None:
        # External: a node that records at every replay; otherwise the event would only order the capture.
        external = self._api.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL
        for event in events:
            self._call("cuEventRecordWithFlags", event, self._stream, external)
