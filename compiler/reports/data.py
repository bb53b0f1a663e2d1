"""What the report says of an artifact, as plain data: every number is the manifest's or is derived from its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.schedule import BUCKETS, Schedule
from ...passes import SCHEDULE_PASSES, schedule
from ...runtime.artifact import Artifact
from ..gpu import report as gpu_report
from ..gpu.machines import machine_for
from ..gpu.step_model import StepModel, model
from ..tune.calibrate import cpu_costs, cpu_machine
from .artifact import memory, overview, phases, stored_schedule

Row = dict[str, Any]
CPU_JOIN_US, CPU_CLOCKS = 0.5, 0.03  # of a join and of a weight: assumed, `autotune` fits them to the machine


@dataclass(frozen=True)
class TargetView:
    """A modelled step on one target. peak: operations per microsecond that its lanes can issue, without tensor cores.

    resources: rows of a table of what its code uses.
    """

    name: str
    step: StepModel
    schedule: Schedule
    peak: float
    resources: list[Row]
    phases: list[Row]

    @property
    def summary(self) -> Row:
        return gpu_report.summary(self.step)


@dataclass(frozen=True)
class Report:
    """One artifact; `seconds` by pass, empty where it was not compiled just now."""

    overview: Row
    seconds: Mapping[str, float]
    files: list[Row]
    tiles: list[Row]
    memory: list[Row]
    targets: list[TargetView]
    tuned: Mapping[str, Row]


def gather(artifact: Artifact, seconds: Mapping[str, float], gbps: float) -> Report:
    """Read an artifact for the page; `gbps`: what a processor reads."""
    raw = artifact.manifest.raw
    files = [{"name": name, "digest": digest} for name, digest in artifact.manifest.files.items()]
    return Report(
        overview(artifact, gbps), seconds, files, _tiles(stored_schedule(artifact)), memory(artifact),
        list(_targets(artifact, gbps)), raw.get("tuned", {}),
    )  # fmt: skip


def _tiles(made: Schedule) -> list[Row]:
    """What the tile pass chose of every phase that reads matrices."""
    return [
        {"phase": f"{g.name}.{p.name}", "layout": p.layout, "unit": p.unit, "fetch": p.fetch or made.tuning["fetch"],
         "formats": ", ".join(dict.fromkeys(w.tensor.dtype for w in p.weights if len(w.tensor.shape) > 1))}
        for g in made.program.graphs for p in g.phases if p.reads_matrix
    ]  # fmt: skip


def _targets(artifact: Artifact, gbps: float) -> Iterator[TargetView]:
    for name, entry in artifact.manifest.raw["targets"].items():
        if entry.get("kind") == "cuda":
            yield _gpu(artifact, name)
        else:
            yield _cpu(artifact, name, entry, gbps)


def _gpu(artifact: Artifact, name: str) -> TargetView:
    view = gpu_report.find_target(artifact, name)
    assert view is not None
    kernels = gpu_report.reports(view)
    step = gpu_report.modelled(view, 0, kernels)
    resources = [
        {"bucket": r["bucket"], "body": b["function"], "format": b["format"] or "", "warps": r["warps"],
         "registers": r["registers"], "spills": r["spills"], "shared": r["shared"],
         "per_weight": min((x["per_weight"] for x in b["loops"]), default=None), "budget": b["issue_budget"]}
        for r in gpu_report.mix(view, kernels) for b in r["branches"]
    ]  # fmt: skip
    peak = 2e6 * machine_for(view.machine.name).fp32_tflops
    return TargetView(name, step, gpu_report.target_schedule(view), peak, resources, _phases(artifact, step))


def _cpu(artifact: Artifact, name: str, entry: Mapping[str, Any], gbps: float) -> TargetView:
    made = _cpu_schedule(artifact)
    machine = cpu_machine(made.workers, gbps, CPU_JOIN_US)
    step = model(made, machine, cpu_costs(CPU_CLOCKS))
    peak = made.workers * machine.boost_mhz * 2 / CPU_CLOCKS
    resources = [{"compiler": entry["compiler"], "level": entry["level"], "library": entry["library"]}]
    return TargetView(name, step, made, peak, resources, _phases(artifact, step))


def _cpu_schedule(artifact: Artifact) -> Schedule:
    """Of as many threads as the artifact would run on here; the stored text may be of a GPU's workers."""
    stored = stored_schedule(artifact)
    made = schedule(stored.program, artifact.manifest.limits, BUCKETS[0], artifact.pick_threads(), stored.tuning)
    for _, change in SCHEDULE_PASSES:
        made = change(made)
    return made


def _phases(artifact: Artifact, step: StepModel) -> list[Row]:
    """The model's rows with operations beside bytes."""
    work = {(r["section"], r["phase"]): r for r in phases(artifact, 1.0, 0)}
    return [
        r | {"operations": work[r["section"], r["phase"]]["operations"], "percent": f"{100 * r['share']:.1f} %"}
        for r in gpu_report.phases(step)
    ]


