"""What `--target` names: processors by instruction-set level, GPUs by machine or architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import CompileError, UsageError, nearest
from .build import LEVELS, Level, host_level
from .gpu.machines import Machine, machine_for, machines

HOST = ("auto", "cpu")  # the best level of this machine


@dataclass(frozen=True)
class GpuTarget:
    """One architecture, `sm_90`, and the machines it is compiled for: one cubin, a task table per SM count."""

    arch: str
    machines: tuple[Machine, ...]

    @property
    def number(self) -> int:
        """90 of sm_90."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def workers(self) -> tuple[int, ...]:
        """One worker per SM, for every machine."""
        return tuple(sorted({machine.sms for machine in self.machines}))


@dataclass(frozen=True)
class Targets:
    """What one artifact is compiled for; at least one of either."""

    levels: tuple[Level, ...]
    gpus: tuple[GpuTarget, ...]


def parse_targets(text: str, files: Sequence[Path] = ()) -> Targets:
    """`sm_90,rtx4090,cpu` as targets; `files` add machines. UsageError for a name that is none."""
    levels: dict[str, Level] = {}
    chosen: dict[str, dict[str, Machine]] = {}
    known: Mapping[str, Machine] | None = None
    for name in (part.strip() for part in text.split(",")):
        if name in HOST or name in LEVELS:
            level = host_level() if name in HOST else LEVELS[name]
            levels[level.name] = level
            continue
        known = machines(files) if known is None else known
        machine = _machine(name, known)
        chosen.setdefault(machine.arch, {})[machine.name] = machine
    gpus = [GpuTarget(arch, tuple(found.values())) for arch, found in chosen.items()]
    return Targets(tuple(levels.values()), tuple(sorted(gpus, key=lambda gpu: gpu.number)))


def _machine(name: str, known: Mapping[str, Machine]) -> Machine:
    try:
        return machine_for(name, known)
    except CompileError as error:
        if name.startswith("sm_"):
            reasons = [f"--{reason}" for reason in error.reasons]
            raise UsageError(reasons, hint=error.hint) from None
        words = [*HOST, *LEVELS, *known]
        raise UsageError(
            f"--target: expected {', '.join(words)} or an architecture such as sm_90, got `{name}`",
            hint=nearest(name, words) or "a list of them is separated by commas; `onelaunch targets` has the GPUs",
        ) from None
