"""Drafts in the compiled PTX, emulated: the CPU target's text, no races, and a step's drafts looked up right."""

from __future__ import annotations

import pytest
from compiled_kernels import CompiledStep, group
from emulated import PROMPT, EmulatedStep, cpu_text, emulator

from onelaunch.compiler.gpu.kernel_report import body_formats, problems, report
from onelaunch.compiler.gpu.machines import machine_for
from onelaunch.compiler.gpu.sync_lint import lint
from onelaunch.ir.schedule import BUCKETS
from onelaunch.tests.compiled import ArtifactCache

FAMILY = "llama"
pytestmark = group(FAMILY)
COUNT = 10


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    return CompiledStep(FAMILY, 90, drafts=2)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_it_spills_nothing_and_keeps_the_rules_of_synchronisation(step: CompiledStep, bucket: str) -> None:
    found = report(step.kernel(bucket), step.source.text, body_formats(step.program))
    assert problems(found, machine_for("sm_90")) == []
    assert lint(step.kernel(bucket).ptx) == []


def test_text_with_drafts_is_the_cpu_targets(step: CompiledStep, compiled: ArtifactCache) -> None:
    """What it will say, but for one token, is put where it is looked up."""
    emulator()
    said = cpu_text(compiled, FAMILY, COUNT)
    gpu = EmulatedStep(step)
    state, steps = gpu.state, 0
    state["slot_limit"][0] = len(PROMPT) + COUNT - 1
    state["slot_drafts_most"][0] = state["slot_drafts"][0] = 2
    remembered = [*PROMPT[-2:], *said[:4], 3, *said[5:]]
    state["slot_history"][0, : len(remembered)] = remembered
    state["slot_history"][0, len(PROMPT) - 2 : len(PROMPT)] = PROMPT[-2:]
    gpu.prompt(PROMPT)
    while state["n_rows"][0]:
        report = gpu.run(steps)
        assert report.races == []
        steps += 1
    assert not gpu.faulted()
    assert state["slot_tokens"][0, :COUNT].tolist() == said
    assert state["slot_accepted"][0].sum() == COUNT - steps
    assert steps < COUNT
