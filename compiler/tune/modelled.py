"""A GPU's candidates, compiled for it on any machine and modelled: no device is needed, and none was asked.

The kernel of few rows is compiled for the architecture; registers, spills, shared memory and instructions per weight
are read from the machine code (kernel_report.py), and the task table of one row is simulated on the machine's data
(step_model.py): bytes over bandwidth, issue slots, joins, the wave's tail, what is asked for ahead. Besides that the
tuner supposes

    in flight   all chunks of the ring but the one in use are on their way
    issue       a scheduler issues every clock from two warps on; with fewer, in proportion
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...codegen.triton.build import Kernel, stages
from ...codegen.triton.render import STREAMED, Source, render_kernel
from ...ir.graph import Program
from ...ir.limits import Limits
from ...ir.schedule import Schedule
from ...ir.tuning import UNTUNED, Tuning
from ...passes import SCHEDULE_PASSES, schedule
from ..gpu.compile import misfits
from ..gpu.kernel_report import body_formats, report
from ..gpu.machines import Machine
from ..gpu.process import compile_apart
from ..gpu.step_model import StepModel, model
from ..gpu.step_work import Cost, measured_costs
from .result import Result, geometric_mean

FULL_ISSUE_WARPS = 8  # two for each of an SM's four schedulers: a result takes four clocks, half of them are filled
DEPTHS = (0, 4096)


@dataclass(frozen=True)
class Compiled:
    """A kernel of few rows, and what its bodies cost."""

    kernel: Kernel
    costs: Mapping[str, Cost]


class Modelled:
    """Compiles and models candidates of a program, fused but not yet tuned, on one machine."""

    how = "modelled"

    def __init__(self, program: Program, limits: Limits, machine: Machine, depths: Sequence[int] = DEPTHS) -> None:
        self.program, self.limits, self.machine = program, limits, machine
        self.depths = tuple(d for d in depths if d < limits.context) or (0,)
        self._kernels: dict[str, Compiled] = {}
        self.default = self.steps(UNTUNED)

    @property
    def tests(self) -> list[str]:
        return [f"tg1@{depth}" for depth in self.depths]

    def default_us(self) -> float:
        return self.default[self.depths[0]].us

    def floor_us(self) -> float:
        return next(iter(self.default.values())).floor_us

    def evaluate(self, tuning: Tuning) -> Result:
        """Model a candidate beside the default. CompileError where it does not compile."""
        made = self._compiled(self._schedule(tuning), tuning)
        wrong = [f"{made.kernel.spills} bytes spilled"] if made.kernel.spills else []
        wrong += misfits(made.kernel, self.machine)
        if wrong:
            return Result(9.0, wrong="; ".join(wrong), notes=self._notes(made))
        steps = self.steps(tuning)
        ratios = {f"tg1@{d}": steps[d].us / self.default[d].us for d in self.depths}
        per_test = {f"tg1@{d}": (self.default[d].us, steps[d].us) for d in self.depths}
        deepest = self.depths[-1]
        per_phase = {
            f"{b.section}.{b.phase}": (a.layers * a.us, b.layers * b.us)
            for a, b in zip(self.default[deepest].phases, steps[deepest].phases, strict=True)
        }
        bounds = {f"{p.section}.{p.phase}": p.bound for p in steps[deepest].phases}
        notes = self._notes(made) | {"bounds": bounds}
        return Result(geometric_mean(list(ratios.values())), per_test, ratios, per_phase, notes=notes)

    def steps(self, tuning: Tuning) -> dict[int, StepModel]:
        """The modelled step of one row by depth."""
        made = self._schedule(tuning)
        costs = self._compiled(made, tuning).costs
        return {depth: model(made, self.machine, costs, depth) for depth in self.depths}

    def segments(self, tuning: Tuning) -> dict[str, float]:
        """Microseconds of one launch, and of a launch for each phase: a boundary in place of a join, nothing asked for
        ahead."""
        made = self._schedule(tuning)
        costs, depth = self._compiled(made, tuning).costs, self.depths[0]
        apart = replace(self.machine, join_us=self.machine.boundary_us, l2_bytes=1)
        return {
            "mega": model(made, self.machine, costs, depth).us,
            "per-phase": model(made, apart, costs, depth).us,
        }

    # ---- one candidate ----------------------------------------------------------------------------------------

    def _schedule(self, tuning: Tuning) -> Schedule:
        limits = replace(self.limits, split_tokens=tuning["split"]) if "split" in tuning.as_dict() else self.limits
        made = schedule(self.program, limits, STREAMED, self.machine.sms, tuning)
        for _, change in SCHEDULE_PASSES:
            made = change(made)
        return made

    def _compiled(self, made: Schedule, tuning: Tuning) -> Compiled:
        source = render_kernel({STREAMED: made})
        ring = stages(source.slot_bytes, self.machine.shared_bytes_per_block, source.ring), source.slot_bytes
        key = hashlib.sha256(f"{source.text}{ring}{source.warps}".encode()).hexdigest()
        if key not in self._kernels:
            arch = int(self.machine.arch.removeprefix("sm_"))
            kernel = compile_apart(source.text, made.limits, source.kv_names, arch, STREAMED, ring, source.warps)
            self._kernels[key] = Compiled(kernel, self._costs(kernel, source, ring))
        return self._kernels[key]

    def _costs(self, kernel: Kernel, source: Source, ring: tuple[int, int]) -> dict[str, Cost]:
        found = measured_costs(report(kernel, source.text, body_formats(self.program)))
        slower = max(1.0, FULL_ISSUE_WARPS / kernel.warps)
        flight = float((ring[0] - 1) * ring[1])
        return {title: Cost(cost.per_weight * slower, flight) for title, cost in found.items()}

    def _notes(self, made: Compiled) -> dict[str, Any]:
        kernel = made.kernel
        return {
            "registers": kernel.registers,
            "spills": kernel.spills,
            "shared": kernel.shared,
            "per_weight": round(max((c.per_weight for c in made.costs.values()), default=0.0), 3),
            "in_flight": max((c.in_flight or 0 for c in made.costs.values()), default=0),
        }
