"""A compiled step kernel on one device: loading it, what it needs of the device, launching it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

from ..ir.errors import HostError, LoadError, UsageError
from .cuda_driver import Context, CudaError, Driver, release, release_number
from .cuda_target import CudaTarget, Entry

WRONG_CUBIN = ("CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION")


def check_driver(driver: Driver, target: CudaTarget) -> None:
    """HostError if the installed driver is known to be older than the target needs."""
    have, need = release_number(release()), release_number(target.min_driver)
    if 0 < have < need:
        raise HostError(
            f"target `{target.name}`: expected NVIDIA driver {need} or newer, got {release()} (CUDA {driver.version})",
            hint="update the driver, or compile with an older Triton",
        )


class TooSmall(HostError):
    """The device has no room for as many workers as any task table needs."""


class Kernel:
    """The step kernels of a target on one device: how they are launched, and how many workers fit at once."""

    def __init__(self, context: Context, target: CudaTarget, read: Callable[[str], bytes]) -> None:
        """`read` returns the verified bytes of a file of the artifact."""
        self.context, self.target = context, target
        self.call, self._api, self._device = context.driver.call, context.driver.api, context.device
        modules = {name: self._load(name, read(name)) for name in target.cubins()}
        found = {entry: self._function(modules[entry.cubin], entry) for entry in dict.fromkeys(target.entries)}
        self._functions = [found[entry] for entry in target.entries]
        self._per_sm = min(self._ready(entry, function) for entry, function in found.items())

    def _function(self, module: Any, entry: Entry) -> Any:
        try:
            return self.call("cuModuleGetFunction", module, entry.name.encode())
        except CudaError as error:
            raise LoadError(f"{entry.cubin}: expected a kernel `{entry.name}`, got none") from error

    def _ready(self, entry: Entry, function: Any) -> int:
        """Check a kernel and give it its shared memory; how many of its blocks an SM holds."""
        self._check_parameters(entry, function)
        self._check_limits(entry, function)
        # Always: without it the limit is 48 KiB less what the kernel holds statically, which varies.
        most = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.call("cuFuncSetAttribute", function, most, entry.shared)
        occupancy = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        return int(self.call(occupancy, function, entry.threads, entry.shared))

    def _load(self, name: str, cubin: bytes) -> Any:
        try:
            return self.context.make("cuModuleLoadData", cubin, undo="cuModuleUnload")
        except CudaError as error:
            if error.code not in WRONG_CUBIN:
                raise
            newest = self.context.driver.version
            raise HostError(
                f"{name}: expected a driver and device that take {self.target.arch} code, "
                f"got {error.code} from a driver for CUDA {newest} on {self._device.arch}",
                hint=f"update NVIDIA's driver ({self.target.min_driver or 'no release'} is needed) or compile again",
            ) from error

    def _check_parameters(self, entry: Entry, function: Any) -> None:
        """The manifest's list against the kernel's own: a wrong one would corrupt memory silently."""
        sizes = []
        try:
            for i in range(len(self.target.params) + 1):
                sizes.append(int(self.call("cuFuncGetParamInfo", function, i)[1]))
        except CudaError:
            pass  # past the last one
        except HostError:
            return  # CUDA before 12.4 cannot tell
        expected = [8 if kind.startswith("*") else 4 for _, kind in self.target.params]
        if sizes != expected:
            raise LoadError(
                f"target `{self.target.name}`: expected `params` of {sizes} bytes as `{entry.name}` in {entry.cubin}, "
                f"got {expected}",
                hint="manifest and kernel are not of one compilation: compile the model again",
            )

    def _check_limits(self, entry: Entry, function: Any) -> None:
        most = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
        threads = int(self.call("cuFuncGetAttribute", most, function))
        device, name = self._device, f"target `{self.target.name}`"
        reasons = []
        if entry.threads > threads:
            reasons.append(f"{name}: expected blocks of at most {threads} threads, got {entry.threads}")
        if entry.shared > device.shared:
            reasons.append(
                f"{name}: expected {entry.shared} bytes of shared memory per block, "
                f"got {device.shared} on {device.name}"
            )
        if not device.cooperative:
            reasons.append(f"{name}: expected a device with cooperative launches, got {device.name}")
        if reasons:
            raise HostError(reasons, hint="compile for this device")

    def pick_workers(self, threads: int | None) -> int:
        """The most workers that have a task table and are resident together, or the count asked for."""
        known, sms = self.target.workers, self._device.sms
        if threads is not None and threads not in known:
            raise UsageError(
                f"threads: expected one of {', '.join(map(str, known))}, got {threads}",
                hint="a worker count needs its own task table: compile with it, or pick one of these",
            )
        fitting = [n for n in known if n <= self._per_sm * sms and threads in (None, n)]
        if not fitting:
            raise TooSmall(
                f"target `{self.target.name}`: expected {threads or min(known)} thread blocks at once, "
                f"got {self._per_sm * sms} ({self._per_sm} on each of {sms} SMs of {self._device.name})",
                hint=f"workers wait for each other, so all must run: compile for a machine of {self._per_sm * sms} SMs"
                if self._per_sm
                else "the kernel needs more registers or shared memory than this device has: compile for it",
            )
        return max(fitting)

    def launch(
        self, bucket: int, workers: int, values: Mapping[str, int], stream: Any, *, together: bool = True
    ) -> None:
        """Queue one launch of a bucket's kernel. `together`: its workers wait for each other, so it is cooperative,
        and fails instead of hanging if not all blocks can be resident."""
        api, entry = self._api, self.target.entries[bucket]
        attribute = api.CUlaunchAttribute()
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = int(together)
        config = api.CUlaunchConfig()
        config.gridDimX, config.blockDimX = workers, entry.threads
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes, config.hStream = entry.shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        kinds = [ctypes.c_uint64 if kind.startswith("*") else ctypes.c_int32 for _, kind in self.target.params]
        arguments = [kind(values[name]) for (name, _), kind in zip(self.target.params, kinds, strict=True)]
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self.call("cuLaunchKernelEx", config, self._functions[bucket], ctypes.addressof(pointers), 0)
