"""The CUDA backend: a cubin, launched cooperatively and replayed as a CUDA graph through the driver API.

A step is one replay (`cuda_graph.py`): its arguments never change, the rows are in device memory, the kernel
writes the next step's rows itself. The host sends what it changed (`cuda_state.py`), replays, and takes a few
bytes back.

What the kernel must do for this: a launch that finds no rows commits nothing (a burst may end early; its last
replays find nothing to do), and one that finds a fault recorded drains out. What a fault leaves is not to be
trusted, so no step follows it.

A worker waits for event counters to reach epoch x producers. The two buckets' tables have different producers, so
each bucket has a control buffer of its own: its epoch counts that bucket's steps alone.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import HostError, LoadError, OnelaunchError, UsageError
from ..ir.limits import PAGE_RUN
from .artifact import Artifact
from .backend import StepFault
from .cuda_driver import Context, CudaError, Device, Driver, NoDevice, release
from .cuda_graph import StepGraphs
from .cuda_kernel import Kernel, TooSmall, check_driver
from .cuda_memory import check_memory, control_bytes, memory_plan
from .cuda_state import DeviceState
from .cuda_target import BUCKETS, CudaTarget
from .manifest import WEIGHTS, Manifest
from .memory import Buffer
from .state import State

FAULT_WORD = 8  # of the control buffer: kind, worker, record, event, seen, expected
PROBE_BYTES = 256 << 20  # of a bandwidth probe's copies: several times any L2
PROBE_TOTAL = 1 << 30


class OtherDevices(LoadError):
    """This machine has devices, but none that runs a target of the artifact."""


# Why an artifact that also has a processor's target runs there instead; anything else is an error to mend.
NOT_HERE = (NoDevice, OtherDevices, TooSmall)


def probe() -> dict[str, Any]:
    """What `onelaunch doctor` reports: driver version and release, devices; or `error` and `hint`. Never raises."""
    try:
        driver = Driver()
        devices = [{**asdict(device), "arch": device.arch} for device in driver.devices()]
        return {"driver": driver.version, "release": release(), "devices": devices}
    except OnelaunchError as error:
        return {"error": error.reasons[0], "hint": error.hint, "release": release(), "devices": []}


def find_device(targets: Sequence[CudaTarget]) -> tuple[Driver, Device, CudaTarget]:
    """The first device that can run one of the targets, with the newest of those.

    NoDevice: no driver or device. OtherDevices: devices, but of other architectures.
    """
    driver = Driver()
    devices = driver.devices()
    for device in devices:
        fitting = [target for target in targets if target.runs_on(device.major, device.minor)]
        if fitting:
            return driver, device, max(fitting, key=lambda t: t.version)
    got = ", ".join(f"{device.arch} ({device.name})" for device in devices) or "no device"
    raise OtherDevices(
        [f"target `{target.name}`: expected a device that runs {target.arch} code, got {got}" for target in targets],
        hint=f"compile for this device: `--target {devices[0].arch}`" if devices else "",
    )


def open_backend(
    artifact: Artifact,
    found: tuple[Driver, Device, CudaTarget],
    threads: int | None,
    kv_pages: Sequence[int],
    segments: str,
) -> tuple[CudaBackend, int]:
    """Verify the artifact and load it onto a device; the backend and its number of workers."""
    driver, device, target = found
    check_driver(driver, target)
    context = Context(driver, device)
    try:
        with context:
            kernel = Kernel(context, target, artifact.read)
            workers = kernel.pick_workers(threads)
            sizes = memory_plan(artifact.manifest, target, artifact.members[WEIGHTS].size, kv_pages)
            check_memory(context, sizes)
            tables = artifact.tables(workers, target.name)
            stream = artifact.stream(workers, target.name)
            weights = artifact.verify()
            backend = CudaBackend(kernel, artifact.manifest, tables, stream, weights, kv_pages, segments)
            weights.close()
    except BaseException:
        context.close()
        raise
    return backend, workers


def check_device(artifact: Artifact, target: CudaTarget) -> None:
    """Raise what `open_backend` would of a device, its driver and the kernel, without reading weights."""
    driver, device, _ = find_device([target])
    check_driver(driver, target)
    context = Context(driver, device)
    try:
        with context:
            Kernel(context, target, artifact.read).pick_workers(None)
    finally:
        context.close()


class CudaBackend:
    """`Backend` over a kernel and device memory. Built inside its context; owns it from then on."""

    state: State
    observer: Callable[[int], None] | None = None

    def __init__(
        self,
        kernel: Kernel,
        manifest: Manifest,
        tables: NDArray[np.int32],
        stream: NDArray[np.int64],
        weights: Buffer,
        kv_pages: Sequence[int],
        segments: str = "mega",
    ) -> None:
        self._manifest, self._context = manifest, kernel.context
        self._call, self._api = kernel.call, kernel.context.driver.api
        flags = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = self._context.make("cuStreamCreate", flags, undo="cuStreamDestroy")
        plan = memory_plan(manifest, kernel.target, weights.view.nbytes, kv_pages)
        self._weights_bytes = weights.view.nbytes
        self._at = self._allocate(plan)
        self._upload(self._at["weights"], weights.view)
        host = Buffer(plan["state"], "the step state")
        self._context.pin(host)
        self._logits = Buffer(4 * manifest.logits_stride * manifest.limits.outputs, "the logits")
        self._context.pin(self._logits)
        self._state = DeviceState(host.view, manifest.fields, self._context, self._stream, self._at["state"])
        self.state = self._state
        size = control_bytes(kernel.target)
        self._controls = [self._at["control"] + i * size for i in range(len(BUCKETS))]
        self._graphs = StepGraphs(kernel, self._stream, tables, stream, segments, self._at, self._controls)
        self._fault: StepFault | None = None
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, self._context.close)

    def _allocate(self, plan: dict[str, int]) -> dict[str, int]:
        """Zeroed memory of each size; addresses by name."""
        found = {}
        for name, size in plan.items():
            try:
                found[name] = int(self._context.allocate(size))
            except CudaError as error:
                if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                    raise
                free, _ = self._call("cuMemGetInfo")
                raise HostError(
                    f"memory: expected {size / 2**30:.2f} GiB for `{name}`, got none of {free / 2**30:.2f} GiB free",
                    hint=error.hint,
                ) from error
            if name != "weights":
                self._call("cuMemsetD8Async", found[name], 0, max(size, 1), self._stream)
        return found

    def _upload(self, address: int, data: NDArray[Any]) -> None:
        if data.nbytes:
            self._call("cuMemcpyHtoD", address, data.ctypes.data, data.nbytes)

    def _ready(self) -> Context:
        if not self._finalizer.alive:
            raise UsageError("model: expected an open one, got a closed one")
        if os.getpid() != self._process:
            raise UsageError(
                "model: expected one loaded in this process, got one from before a fork",
                hint="a device does not survive a fork: load the model in the child",
            )
        return self._context

    def step(self) -> None:
        rows = int(self._state.n_rows[0])
        self._replay(1)
        if self.observer is not None:
            with self._ready():
                self._state.download_routing()
            self.observer(rows)

    def run(self, steps: int) -> int:
        """As `Backend.run`. Replays go on to the end of the longest slot; all use the first one's bucket."""
        state = self._state
        if self.observer is not None:
            for done in range(steps):
                if not state.n_rows[0]:
                    return done
                self.step()
            return steps
        slots, _ = state.outputs()
        left = (state.slot_limit[slots] - state.row_position[state.output_row[: len(slots)]]).max(initial=0)
        return self._replay(min(steps, max(int(left), 1), self._manifest.limits.context))

    def _replay(self, steps: int) -> int:
        state, rows = self._state, int(self._state.n_rows[0])
        with self._ready():
            if self._fault:
                raise self._fault
            if not rows:
                return 0
            bucket = 0 if rows <= self._manifest.limits.few_rows else 1
            fault = self._controls[bucket] + 4 * FAULT_WORD
            slots, counts = state.outputs()
            try:
                state.upload()
                for _ in range(steps):
                    self._graphs.replay(bucket)
            finally:  # an interrupt must not lose what the device did
                try:
                    done = state.download(slots, counts, steps, fault)
                except KeyboardInterrupt:
                    state.download(slots, counts, steps, fault)
                    raise
        if state.fault[0]:
            self._fault = StepFault.read(state.fault)
            raise self._fault
        return done

    def time_launches(self, bucket: int) -> None:
        """From now on a bucket's steps note when each of their launches ended: see `launch_times`."""
        with self._ready():
            self._graphs.time(bucket)

    def launch_times(self) -> list[float]:
        """Seconds each launch of that bucket's last step took, gaps before it included; one number if it is one."""
        with self._ready():
            return self._graphs.times()

    def logits(self, outputs: int) -> NDArray[np.float32]:
        offset, stride = self._manifest.logits_offset, self._manifest.logits_stride
        host = self._logits.view[: 4 * stride * outputs]
        with self._ready():
            source = self._at["workspace"] + offset
            self._call("cuMemcpyDtoHAsync", host.ctypes.data, source, host.nbytes, self._stream)
            self._call("cuStreamSynchronize", self._stream)
        return host.view(np.float32).reshape(outputs, stride)[:, : self._manifest.vocab]

    def zero_pages(self, group: int, pages: NDArray[np.int32]) -> None:
        cache = self._manifest.caches[group]
        tile, heads = cache.tile_bytes, cache.layers * cache.kv_heads
        with self._ready():
            for page in pages.tolist():  # its tiles are PAGE_RUN tiles apart
                run, place = divmod(page, PAGE_RUN)
                at = self._at[f"kv{group}"] + (run * heads * PAGE_RUN + place) * tile
                self._call("cuMemsetD2D8Async", at, PAGE_RUN * tile, 0, tile, heads, self._stream)

    def read_gbps(self) -> float:
        """Bandwidth of device-to-device copies of the weights, bytes read and bytes written together.

        A kernel that only reads may reach a few percent more. Weights that fit in L2 give its speed.
        """
        with self._ready():
            free, _ = self._call("cuMemGetInfo")
            size = max(1, min(self._weights_bytes, PROBE_BYTES, free // 2))
            scratch = self._context.allocate(size)
            flags = self._api.CUevent_flags.CU_EVENT_DEFAULT
            events = [self._context.make("cuEventCreate", flags, undo="cuEventDestroy") for _ in range(2)]
            try:
                self._copy(int(scratch), size, size)  # warms up
                total = max(self._weights_bytes, PROBE_TOTAL) // size * size
                self._call("cuEventRecord", events[0], self._stream)
                self._copy(int(scratch), size, total)
                self._call("cuEventRecord", events[1], self._stream)
                self._call("cuStreamSynchronize", self._stream)
                milliseconds = float(self._call("cuEventElapsedTime", *events))
            finally:
                for made in (*events, scratch):
                    self._context.free(made)
        return 2 * total / max(milliseconds, 1e-3) * 1e-6

    def _copy(self, scratch: int, size: int, total: int) -> None:
        """Queue copies of `total` bytes of weights, from the start again after the end."""
        places = max(1, self._weights_bytes // size)
        for i in range(total // size):
            self._call("cuMemcpyDtoDAsync", scratch, self._at["weights"] + i % places * size, size, self._stream)

    def close(self) -> None:
        """Give the device's memory back; a second call does nothing."""
        self._finalizer()
