"""Faults planted into the compiled step, on the emulator: what planted.py says that this rung notices, it notices.

Every fault of a table, of a schedule and of compiled code is planted into every family, each on the architecture after
the one before and, of compiled code, in the row buckets by turns; those of the generated text, which cost a
compilation each, into one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

import planted
import pytest
from compiled_kernels import ARCHS, DENSE, group
from emulated import PROMPT, EmulatedStep, emulated_step, emulator

from onelaunch.ir.table import lower

INTERLEAVINGS = 8


def names(kind: str) -> list[str]:
    return [fault.name for fault in planted.faults(kind, planted.EMULATOR)]


def noticed(gpu: EmulatedStep, seed: int, rows: int = 4, tables=None, change=str) -> str:
    """What gives a step away: an error of the emulator, `race`, `fault`, `tokens`, or nothing.

    Every slot has as many rows and wants logits: no wait is idle.
    """
    gpu.reset()
    each = rows // 4
    gpu.set_rows([(PROMPT[i], i // each, i % each) for i in range(rows)], list(range(each - 1, rows, each)))
    table = (tables or gpu.tables)[gpu.bucket]
    try:
        report = gpu.run(seed, table, change)
    except emulator().PTXError as error:
        return type(error).__name__
    if report.races:
        return "race"
    return "fault" if gpu.faulted() else ""


def first_noticed(gpu: EmulatedStep, seed: int, **how) -> str:
    return next(filter(None, (noticed(gpu, seed + i, **how) for i in range(INTERLEAVINGS))), "")


@cache
def intact(family: str, arch: int, rows: int = 4) -> EmulatedStep:
    """A step that gives nothing away before something is planted into it."""
    gpu = emulated_step(family, arch)
    assert noticed(gpu, arch, rows) == ""
    return gpu


def planted_into(kind: str, row_counts: Sequence[int] = (4,)):
    """Parametrize by family, architecture, the names of a kind of faults and, in turn, rows of a step."""
    made = []
    for i, family in enumerate(DENSE):
        for j, name in enumerate(names(kind)):
            arch, rows = ARCHS[(i + j) % len(ARCHS)], row_counts[i % len(row_counts)]
            case = f"{name} {family} sm_{arch} {rows}"
            made.append(pytest.param(family, arch, name, rows, id=case, marks=group(family)))
    return pytest.mark.parametrize(("family", "arch", "name", "rows"), made)


@planted_into("table")
def test_faults_of_a_table_are_noticed(family, arch, name, rows):
    gpu = intact(family, arch, rows)
    broken = planted.FAULTS[name].apply(gpu.tables, Random(arch))
    found = first_noticed(gpu, arch, tables=broken, rows=12 if name == "swapped_buckets" else rows)
    expected = {"target_too_high": {"Deadlock"}, "dropped_signal": {"Deadlock"}}
    assert found in expected.get(name, {"race", "PoisonRead", "OutOfBounds"})


@planted_into("schedule")
def test_faults_of_a_schedule_are_noticed(family, arch, name, rows):
    gpu = intact(family, arch, rows)
    broken = planted.FAULTS[name].apply(gpu.schedules["few"], Random(arch))
    tables = {"few": lower(broken, gpu.source.bodies["few"], gpu.plan)}
    assert first_noticed(gpu, arch, tables=tables, rows=rows) in {"race", "PoisonRead"}


@planted_into("ptx", (4, 12))
def test_faults_of_compiled_code_are_noticed(family, arch, name, rows):
    gpu = intact(family, arch, rows)
    assert first_noticed(gpu, arch, rows=rows, change=planted.FAULTS[name].apply) == "race"


@pytest.mark.xdist_group("qwen3")
@pytest.mark.parametrize("name", names("source"))
def test_faults_of_the_generated_text_are_noticed(name):
    gpu = emulated_step("qwen3", 90).with_text(planted.FAULTS[name].apply)
    assert first_noticed(gpu, 0) in {"race", "PoisonRead"}


# ---- experts ------------------------------------------------------------------------------------

EXPERTS = ("qwen3_moe", 120)


@group(EXPERTS[0])
@pytest.mark.parametrize("seed", range(3))
def test_routes_that_workers_share_are_noticed(seed):
    gpu = emulated_step(*EXPERTS)
    assert noticed(gpu, seed) == ""
    (fault,) = planted.faults("schedule", planted.EMULATOR, experts=True)
    broken = lower(fault.apply(gpu.schedules["few"], Random(seed)), gpu.source.bodies["few"], gpu.plan)
    assert first_noticed(gpu, seed, tables={"few": broken}) in {"race", "PoisonRead"}


@group(EXPERTS[0])
def test_a_barrier_missing_among_experts_is_noticed():
    """Those after routes and between experts are missed by nobody: reductions of Triton's have barriers there too."""
    (fault,) = planted.faults("source", planted.EMULATOR, experts=True)
    assert first_noticed(emulated_step(*EXPERTS).with_text(fault.apply), 0) in {"race", "PoisonRead"}
