"""First tokens kept under a window on the GPU: bodies interpreted beside the reference, the compiled PTX emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
from compiled_kernels import CompiledStep, group
from emulated import PROMPT, EmulatedStep, cpu_text, emulator
from interpreter_lockstep import Lockstep
from interpreter_step import random_model
from test_triton_bodies import LIMITS, check

from onelaunch.compiler.kernel_report import body_formats, problems, report
from onelaunch.compiler.machines import machine_for
from onelaunch.compiler.sync_lint import lint
from onelaunch.models.window import with_window
from onelaunch.tests.compiled import ArtifactCache

FAMILY, BOUNDS, COUNT = "llama", (5, 3), 6
pytestmark = group(FAMILY)
# (token, slot, position) with a window of 24: no sinks yet, some, all; begun in the split of the sinks and after it.
FEW = [(5, 1, 23), (7, 0, 27), (9, 1, 260)]
MANY = [(i, i % 2, p) for i, p in enumerate((3, 40, 90, 255, 279, 280))]


@pytest.mark.parametrize(("kv_dtype", "sinks"), [("f32", 6), ("bf16", 64)])
def test_attention_to_sinks_is_the_reference(kv_dtype: str, sinks: int) -> None:
    """One layer with a window and one without."""
    made = random_model("gemma3", "f32", 2)
    pair = Lockstep(replace(made, program=with_window(made.program, 0, sinks)), replace(LIMITS, kv_dtype=kv_dtype))
    for rows in (FEW[2:], FEW, MANY):
        assert "attend" in check(pair, rows)


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    return CompiledStep(FAMILY, 90, bounds=BOUNDS)


def test_it_spills_nothing_and_keeps_the_rules_of_synchronisation(step: CompiledStep) -> None:
    found = report(step.kernel("few"), step.source.text, body_formats(step.program))
    assert problems(found, machine_for("sm_90")) == []
    assert lint(step.kernel("few").ptx) == []


def test_emulated_text_is_the_cpu_targets(step: CompiledStep, compiled: ArtifactCache) -> None:
    emulator()
    expected = cpu_text(compiled, FAMILY, COUNT, *BOUNDS)
    assert expected != cpu_text(compiled, FAMILY, COUNT, BOUNDS[0])
    gpu = EmulatedStep(step)
    tokens, reports = gpu.generate(PROMPT, COUNT)
    assert tokens == expected
    assert all(report.races == [] for report in reports)
    assert not gpu.faulted()
