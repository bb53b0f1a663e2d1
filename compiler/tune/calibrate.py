"""How far the step model is off where it can be measured: on this machine's processor.

Two figures nobody prints for a processor, what a join costs and how many clocks a weight takes, are fitted to the
default's steps at depth 0; the rest is predicted with them. What is left is the model's error, on every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING

from ...ir.schedule import Schedule
from ...passes import SCHEDULE_PASSES, schedule
from ...runtime import load
from ..gpu.machines import ISSUE_LANES, Machine, machines
from ..gpu.step_model import model
from ..gpu.step_work import Cost
from .measured import Measured, Test, read_gbps

if TYPE_CHECKING:
    from .session import Subject

DEPTHS = (0, 512, 1536)
JOINS_US = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
CLOCKS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)  # of a worker, per weight


@dataclass(frozen=True)
class Check:
    """One step as measured and as modelled; `fitted`: whether it was used to fit."""

    test: str
    threads: int
    measured_us: float
    modelled_us: float
    fitted: bool

    @property
    def error(self) -> float:
        return self.modelled_us / self.measured_us - 1


def calibrate(how: Measured, what: Subject) -> list[Check]:
    """Measure the default at some depths and thread counts, fit, and say what the model makes of each."""
    measured: dict[tuple[int, int], float] = {}
    rates: dict[int, float] = {}
    limits = how.default.limits
    for threads in (n for n in how.default.manifest.threads if n <= how.default.threads):
        with load(how.artifact, threads=threads, kv_tokens=None) as opened:
            for depth in (d for d in DEPTHS if d + 16 < limits.context):
                test = Test("tg", 1, depth)
                test.run(opened)
                measured[threads, depth] = min(test.run(opened, threads == 1) for _ in range(6))
            rates[threads] = max(read_gbps(opened, threads == 1) for _ in range(6))
    made = {n: _schedule(what, how, n) for n in rates}
    join, clocks = _fit(made, rates, {k: v for k, v in measured.items() if k[1] == 0})
    return [
        Check(str(Test("tg", 1, depth)), n, us, _modelled(made[n], rates[n], join, clocks, depth), depth == 0)
        for (n, depth), us in measured.items()
    ]


def _schedule(what: Subject, how: Measured, workers: int) -> Schedule:
    made = schedule(what.program, how.default.limits, "few", workers)
    for _, change in SCHEDULE_PASSES:
        made = change(made)
    return made


def _fit(
    made: dict[int, Schedule], rates: dict[int, float], measured: dict[tuple[int, int], float]
) -> tuple[float, float]:
    """The pair of figures with the least squared logarithmic error, of a grid: the error is no smooth function."""

    def loss(pair: tuple[float, float]) -> float:
        return sum(log(_modelled(made[n], rates[n], *pair, depth) / us) ** 2 for (n, depth), us in measured.items())

    return min(((join, clocks) for join in JOINS_US for clocks in CLOCKS), key=loss)


def _modelled(made: Schedule, gb_s: float, join_us: float, clocks: float, depth: int) -> float:
    return model(made, cpu_machine(made.workers, gb_s, join_us), cpu_costs(clocks), depth).us


def cpu_costs(clocks: float) -> Mapping[str, Cost]:
    """Of every body the same: so many clocks of a worker for a weight."""
    return _Same(Cost(clocks * ISSUE_LANES))


class _Same(dict[str, Cost]):
    """The same cost for every body."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def get(self, key: object, default: object = None) -> Cost:  # type: ignore[override]
        return self.cost


def cpu_machine(workers: int, gb_s: float, join_us: float) -> Machine:
    """A processor as the model sees it: a worker draws its even share alone, activations are in its own cache."""
    any_machine = next(iter(machines().values()))
    return replace(
        any_machine, name="cpu", title="this processor", arch="cpu", sms=workers, bandwidth_gb_s=gb_s,
        read_fraction=1.0, sm_share=float(workers), boost_mhz=3000, l2_bytes=workers << 15, l2_bytes_per_clock=32.0,
        l2_latency_us=0.02, memory_latency_us=0.1, join_us=join_us if workers > 1 else 0.01, launch_us=1.0,
    )  # fmt: skip


def mean_error(checks: Sequence[Check]) -> float:
    """Of what was not fitted, the mean of absolute errors."""
    free = [abs(c.error) for c in checks if not c.fitted] or [abs(c.error) for c in checks]
    return sum(free) / len(free)
