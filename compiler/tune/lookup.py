"""What `compile` takes from the tuning database: choices for its targets, and a record for the manifest."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...ir.errors import CompileError
from ...ir.graph import Program
from ...ir.limits import Limits
from ...ir.text import show
from ...ir.tuning import UNTUNED, Tuning
from ..build import Level
from ..gpu.machines import Machine
from ..target_list import Targets
from .database import Found, find


@dataclass(frozen=True)
class Chosen:
    """Choices of one artifact; `record`: for the manifest, by target what was chosen, from where, and its timing."""

    tuning: Tuning
    limits: Limits
    record: dict[str, dict[str, Any]] = field(default_factory=dict)


def program_key(program: Program, quant: str) -> str:
    """Of a program as imported, with shapes and formats, and of how it is quantised."""
    return hashlib.sha256(f"{show(program)}\n{quant}".encode()).hexdigest()[:16]


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    line = next((x for x in lines if x.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.processor() or platform.machine()


def cpu_environment(level: Level) -> dict[str, Any]:
    return {"machine": processor(), "cores": os.cpu_count() or 1, "level": level.name}


def gpu_environment(machine: Machine) -> dict[str, Any]:
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "none"
    return {"machine": machine.name, "triton": compiler}


def choose(program: Program, quant: str, targets: Targets, limits: Limits, given: Tuning | None, tune: str) -> Chosen:
    """`given` (live) if there is one, else what the database holds for each target; `tune` none: the defaults.

    What is chosen for a GPU goes into the code that all architectures share, and what changes limits into the state:
    both only where the artifact has no other target that would have it otherwise.
    """
    if given is not None:
        live: dict[str, Any] = {"choices": given.as_dict(), "source": "live"}
        return _with_limits(given, limits, {name: dict(live) for name in _names(targets)})
    if tune == "none":
        return Chosen(UNTUNED, limits)
    key = program_key(program, quant)
    found = {level.name: find(key, level.name, cpu_environment(level)) for level in targets.levels}
    for gpu in targets.gpus:
        found[gpu.arch] = find(key, gpu.machines[0].name, gpu_environment(gpu.machines[0]))
    record = {name: _record(f) for name, f in found.items()}
    tuning, alone = UNTUNED, len(found) == 1
    for kind, names in (("cpu", [x.name for x in targets.levels]), ("gpu", [x.arch for x in targets.gpus])):
        tuning |= _agreed([found[n] for n in names], kind, alone)
    return _with_limits(tuning, limits, record)


def _names(targets: Targets) -> list[str]:
    return [*(x.name for x in targets.levels), *(x.arch for x in targets.gpus)]


def _agreed(found: Sequence[Found], kind: str, alone: bool) -> Tuning:
    """The choices of targets that share their code: all of the only one, what is alike in all of several."""
    chosen = [f.entry.tuning if f.entry else UNTUNED for f in found]
    if alone and chosen:
        return chosen[0]
    parts = {c.only(kind) for c in chosen}
    return parts.pop() if len(parts) == 1 else UNTUNED


def _record(found: Found) -> dict[str, Any]:
    entry = found.entry
    if entry is None:
        return {"choices": {}, "source": found.source, "passed_by": list(found.passed_by)}
    return {
        "choices": entry.choices,
        "source": found.source,
        "how": entry.how,
        "default_us": entry.default_us,
        "us": entry.us,
        "floor_us": entry.floor_us,
        "workload": entry.workload,
        "per_test": entry.per_test,
        "candidates": entry.candidates,
        "environment": entry.environment,
    }


def _with_limits(tuning: Tuning, limits: Limits, record: dict[str, dict[str, Any]]) -> Chosen:
    """The limits with what was chosen of them; what they do not allow is left as it was, and recorded."""
    changed, skipped = limits, []
    for name, where in (("few_rows", "few_rows"), ("split", "split_tokens")):
        if name not in tuning.as_dict():
            continue
        try:
            changed = replace(changed, **{where: tuning[name]})  # type: ignore[arg-type]
        except CompileError as error:
            skipped.append(f"{name}: {error.reasons[0]}")
    applied = _applied(tuning, skipped)
    for one in record.values():
        mine: Mapping[str, int] = one["choices"]
        one["applied"] = {k: v for k, v in mine.items() if applied.as_dict().get(k) == v}
        if skipped:
            one["skipped"] = skipped
    return Chosen(applied, changed, record)


def _applied(tuning: Tuning, skipped: Sequence[str]) -> Tuning:
    names = {text.partition(":")[0] for text in skipped}
    return Tuning(tuple((k, v) for k, v in tuning.values if k not in names))
