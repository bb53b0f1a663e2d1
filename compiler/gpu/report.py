"""What `inspect` shows of an artifact's GPU target: its code and what it costs, a modelled step."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...codegen.triton.build import Kernel, run_tool
from ...ir.errors import HostError, UsageError, nearest
from ...ir.schedule import BUCKETS, Schedule
from ...ir.table import FIELDS
from ...passes import SCHEDULE_PASSES, schedule
from ...runtime.artifact import Artifact
from ..reports.artifact import fused_program, stored_schedule
from .kernel_report import KernelReport, body_formats, budget, problems, report
from .machines import Machine, machine_for
from .step_model import StepModel, model
from .step_work import measured_costs
from .sync_lint import lint
from .timeline import trace

Row = dict[str, Any]


@dataclass(frozen=True)
class GpuView:
    """One GPU target of an artifact, for one machine."""

    artifact: Artifact
    name: str
    entry: Mapping[str, Any]
    machine: Machine

    def kernels(self) -> dict[str, dict[str, Any]]:
        """Per bucket, what the manifest says of its kernel."""
        own = self.entry.get("entries", {})
        return {bucket: {**self.entry, **own.get(bucket, {})} for bucket in BUCKETS}


def find_target(artifact: Artifact, wanted: str) -> GpuView | None:
    """The target that a name means: sm_90, h100, or None for the CPU's; '' is the CPU's if there is one."""
    raw = artifact.manifest.raw["targets"]
    gpus = {name: entry for name, entry in raw.items() if entry.get("kind") == "cuda"}
    if wanted in ("cpu", *(raw.keys() - gpus.keys())) or not wanted:
        if len(gpus) < len(raw):
            return None
        wanted = wanted or next(iter(gpus))
    arch = wanted if wanted in gpus else _arch(wanted)
    if arch not in gpus:
        names = ", ".join(raw)
        raise UsageError(f"--target: expected one of {names}, got `{wanted}`", hint=nearest(wanted, raw))
    named = machine_for(wanted) if wanted != arch else machine_for(gpus[arch]["machines"][0])
    return GpuView(artifact, arch, gpus[arch], named)


def _arch(name: str) -> str:
    from ...ir.errors import CompileError

    try:
        return machine_for(name).arch
    except CompileError:
        return ""


# ---- code ------------------------------------------------------------------------------------------------


def source(view: GpuView) -> list[tuple[str, str]]:
    """(file name, text) of the generated Triton module."""
    return _files(view, ["source"])


def ptx(view: GpuView) -> list[tuple[str, str]]:
    """(file name, text) of each bucket's PTX."""
    return _files(view, ["ptx"])


def sass(view: GpuView) -> list[tuple[str, str]]:
    """(file name, nvdisasm's listing) of each bucket's machine code; HostError without Triton's tools."""
    found = []
    for name in dict.fromkeys(kernel["cubin"] for kernel in view.kernels().values()):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "step.cubin")
            path.write_bytes(view.artifact.read(name))
            found.append((name, run_tool("nvdisasm", "-c", str(path))))
    return found


def _files(view: GpuView, keys: list[str]) -> list[tuple[str, str]]:
    names = dict.fromkeys(kernel[key] for kernel in view.kernels().values() for key in keys)
    return [(name, view.artifact.read(name).decode()) for name in names]


def reports(view: GpuView) -> dict[str, KernelReport]:
    """Per bucket, what its kernel uses and costs."""
    text, formats = source(view)[0][1], body_formats(fused_program(view.artifact))
    return {bucket: report(_kernel(view, entry), text, formats) for bucket, entry in view.kernels().items()}


def _kernel(view: GpuView, entry: Mapping[str, Any]) -> Kernel:
    read = view.artifact.read
    return Kernel(
        entry["arch"], entry["entry"], read(entry["ptx"]).decode(), read(entry["cubin"]), entry["num_warps"],
        entry["shared"], entry["registers"], entry["stack"], entry["spills"], entry["static_shared"],
        tuple((name, kind) for name, kind in entry["params"]), {}, entry["options"],
    )  # fmt: skip


def mix(view: GpuView, kernels: Mapping[str, KernelReport] | None = None) -> list[Row]:
    """One row per kernel: the report's numbers, cost of main loops against the budget, what is wrong with it.

    kernels: `reports(view)`, where it is known.
    """
    found = []
    for bucket, kernel in (kernels or reports(view)).items():
        entry = view.kernels()[bucket]
        rows = []
        for branch in kernel.branches:
            most = budget(branch, view.machine) if branch.format else None
            rows.append({**asdict(branch), "issue_budget": most})
        faults = [str(fault) for fault in lint(view.artifact.read(entry["ptx"]).decode())]
        found.append(
            {"bucket": bucket, **asdict(kernel), "branches": rows, "machine": view.machine.name,
             "problems": problems(kernel, view.machine) + faults}
        )  # fmt: skip
    return found


# ---- the step --------------------------------------------------------------------------------------------


def target_schedule(view: GpuView) -> Schedule:
    """The schedule that the target's task table was made from, few rows, a worker per SM of the machine.

    HostError where the passes make another one today, as they would of a schedule that was edited.
    """
    workers = view.machine.sms
    stored, limits = stored_schedule(view.artifact), view.artifact.manifest.limits
    made = schedule(stored.program, limits, BUCKETS[0], workers, stored.tuning)
    for _, change in SCHEDULE_PASSES:
        made = change(made)
    name = f"tables/{view.name}-{workers}.npy"
    if name not in view.artifact.manifest.files:
        counts = ", ".join(map(str, view.entry["workers"]))
        raise UsageError(f"{view.machine.name}: expected a task table for one of {counts} SMs, got {workers}")
    table = np.load(io.BytesIO(view.artifact.read(name)), allow_pickle=False)[0]
    for worker in range(workers):
        sections = [made.section(graph.name) for graph, _ in made.program.sections()]
        queue = [[t.first, t.last, t.step] for section in sections for t in section.queues[worker]]
        if table[worker, : len(queue), FIELDS.index("first") : FIELDS.index("step") + 1].tolist() != queue:
            raise HostError(
                f"{name}: expected the table of the schedule in `ir`, worker {worker} has another",
                hint="the artifact was compiled from an edited schedule, or by another version",
            )
    return made


def modelled(view: GpuView, depth: int, kernels: Mapping[str, KernelReport] | None = None) -> StepModel:
    """A step of one row after `depth` cached tokens, with instructions counted in the compiled code."""
    found = kernels or reports(view)
    return model(target_schedule(view), view.machine, measured_costs(found[BUCKETS[0]]), depth)


def phases(step: StepModel) -> list[Row]:
    """One row per phase: bytes and microseconds of all its layers, what bounds it, its share of the step."""
    return [
        {
            "section": p.section,
            "phase": p.phase,
            "kind": p.kind,
            "layers": p.layers,
            "bytes": p.layers * p.memory,
            "us": p.layers * p.us,
            "join_us": p.layers * p.join_us,
            "start_us": p.layers * max(p.start_us),
            "stream_us": p.layers * max(p.stream_us),
            "floor_us": p.layers * step.machine.floor_us(p.memory),
            "bound": p.bound,
            "share": p.layers * p.us / step.us,
        }
        for p in step.phases
    ]


def summary(step: StepModel) -> Row:
    """The step as a whole, and what the model assumes."""
    return {
        "machine": step.machine.name,
        "workers": step.workers,
        "depth": step.depth,
        "bytes": step.memory,
        "us": step.us,
        "floor_us": step.floor_us,
        "of_floor": step.of_floor,
        "launch_us": step.machine.launch_us,
        "assumptions": list(step.assumptions),
    }


def write_timeline(view: GpuView, step: StepModel, path: Path) -> None:
    """The modelled step as a file that ui.perfetto.dev opens."""
    try:
        path.write_text(json.dumps(trace(step, target_schedule(view))) + "\n")
    except OSError as error:
        raise HostError(f"cannot write `{path}`: {error.strerror}") from None
