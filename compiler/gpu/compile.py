"""The GPU part of an artifact: one generated Triton source, cubins per architecture, a task table per SM count.

A cubin holds the kernel of one row bucket.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...codegen.triton.build import REGISTERS, Kernel, stages
from ...codegen.triton.formats import READERS
from ...codegen.triton.linear import PART_ROWS
from ...codegen.triton.render import STREAMED, Source, render_kernel
from ...ir.errors import CompileError
from ...ir.graph import Program
from ...ir.limits import Limits
from ...ir.stream import streams
from ...ir.table import WeightPlan, lower
from ..artifact import ArtifactFolder, stack_tables
from ..lowering import Lowered
from ..target_list import GpuTarget
from .machines import Machine
from .process import compile_apart

SOURCE = "kernels/triton/step.py"
BLOCK_THREADS = 1024  # CUDA's limit
OWN = ("entry", "shared", "static_shared", "registers", "stack", "spills", "options")  # of a kernel in the manifest
# CUDA Toolkit Release Notes, minimum driver for minor-version compatibility, by major version of ptxas.
MIN_DRIVER = {"12": "525", "13": "580"}


def with_fewest_rows(limits: Limits) -> Limits:
    """The limits, the small bucket no larger than decoding needs: a GPU's code for it is written out row by row."""
    return replace(limits, few_rows=PART_ROWS) if limits.decode_rows <= PART_ROWS else limits


@dataclass(frozen=True)
class GpuCode:
    """The source, the same for all architectures; by SM count task tables, int32 [2 buckets, SMs, records, 32], and
    weight streams, int64 [SMs, chunks]."""

    source: Source
    tables: dict[int, np.ndarray]
    streams: dict[int, np.ndarray]


def refuse_formats(program: Program, gpus: Sequence[GpuTarget]) -> None:
    """CompileError that names every weight format no GPU kernel reads, before anything is compiled or packed."""
    if not gpus:
        return
    users: dict[str, list[str]] = {}
    for graph in program.graphs:
        for weight in graph.weights:
            if len(weight.tensor.shape) > 1 and weight.tensor.dtype not in READERS:
                users.setdefault(weight.tensor.dtype, []).append(f"{graph.name}.{weight.name[2:]}")
    if users:
        arches = ", ".join(gpu.arch for gpu in gpus)
        raise CompileError(
            [
                f"{arches}: expected weights in {', '.join(READERS)}, got `{name}` in {', '.join(found)}"
                for name, found in users.items()
            ],
            hint="leave the GPUs out with `--target cpu`, or compile an unquantised checkpoint with `--quant`",
        )


def render_gpu(gpus: Sequence[GpuTarget], lowered: Lowered, plan: WeightPlan) -> GpuCode | None:
    """The source and a table for every SM count; None without GPUs."""
    if not gpus:
        return None
    counts = sorted({count for gpu in gpus for count in gpu.workers})
    source = render_kernel(lowered.rendered(counts))
    chunks = source.chunk_blocks.__getitem__
    part = next(iter(lowered.rendered(counts).values())).tuning["ahead_part"]
    ahead = {n: min(m.ahead_bytes(part) for gpu in gpus for m in gpu.machines if m.sms == n) for n in counts}
    tables = {
        n: stack_tables(
            {
                b: lower(s, source.bodies[b], plan, ahead[n], chunks if b == STREAMED else None)
                for b, s in lowered.schedules[n].items()
            }
        )
        for n in counts
    }
    return GpuCode(source, tables, {n: streams(lowered.schedules[n][STREAMED], plan, chunks) for n in counts})


def compile_bucket(gpu: GpuTarget, bucket: str, source: Source, limits: Limits) -> tuple[Kernel, float]:
    """The kernel of one bucket for one architecture, and the seconds it took.

    CompileError: it does not compile, or a machine of the target cannot hold it.
    """
    start = time.perf_counter()
    chunks = min(stages(source.slot_bytes, machine.shared_bytes_per_block, source.ring) for machine in gpu.machines)
    ring = chunks, source.slot_bytes
    kernel = compile_apart(source.text, limits, source.kv_names, gpu.number, bucket, ring, source.warps)
    reasons = [f"{gpu.arch}: {kernel.entry}: {r}" for machine in gpu.machines for r in misfits(kernel, machine)]
    if reasons:
        raise CompileError(reasons, hint="leave the machine out, or compile for fewer --rows and --outputs")
    return kernel, time.perf_counter() - start


def misfits(kernel: Kernel, machine: Machine) -> Iterator[str]:
    """What of a kernel is beyond a machine: one block must fit on an SM, or the grid cannot be resident."""
    threads = 32 * kernel.warps
    per_block = -(-kernel.registers // 8) * 8 * threads  # registers are handed out by eight per thread
    for what, got, most in (
        ("bytes of shared memory per block", kernel.shared, machine.shared_bytes_per_block),
        ("bytes of shared memory per SM", kernel.shared + kernel.static_shared, machine.shared_bytes_per_sm),
        ("registers per thread", kernel.registers, REGISTERS),
        ("registers per block", per_block, machine.registers_per_sm),
        ("threads per block", threads, min(BLOCK_THREADS, machine.threads_per_sm)),
    ):
        if got > most:
            yield f"expected at most {most} {what} on {machine.name}, got {got}"


def add_target(
    gpu: GpuTarget, kernels: dict[str, Kernel], control_words: int, folder: ArtifactFolder
) -> dict[str, Any]:
    """Write an architecture's code; the manifest's entry: what a launch needs, and how the kernels were made.

    `kernels` are by bucket. An entry of `entries` has what is a kernel's own, resources in bytes.
    """
    one = next(iter(kernels.values()))
    entries = {}
    for bucket, kernel in kernels.items():
        ptx, cubin = (f"kernels/{gpu.arch}/{kernel.entry}.{suffix}" for suffix in ("ptx", "cubin"))
        folder.path(ptx).write_text(kernel.ptx)
        folder.path(cubin).write_bytes(kernel.cubin)
        own = {name: getattr(kernel, name) for name in OWN}
        entries[bucket] = {"cubin": cubin, "ptx": ptx, "num_warps": kernel.warps, **own}
    return {
        "kind": "cuda",
        "arch": one.arch,
        "entries": entries,
        "params": [list(param) for param in one.params],
        "workers": list(gpu.workers),
        "control_words": control_words,
        "min_driver": MIN_DRIVER.get(one.versions["ptxas"].partition(".")[0], ""),
        "machines": [machine.name for machine in gpu.machines],
        "source": SOURCE,
        **one.versions,
    }


def usage_line(target: dict[str, Any]) -> str:
    """The resources of a compiled target for people: `few 128 registers, 11.0 KiB shared; many ..`."""
    lines = []
    for bucket, entry in target["entries"].items():
        spills = f", {entry['spills']} bytes spilled" if entry["spills"] else ""
        lines.append(f"{bucket} {entry['registers']} registers, {entry['shared'] / 1024:.1f} KiB shared{spills}")
    return "; ".join(lines)
