"""A second model that drafts in the compiled PTX, emulated: the CPU target's text, no races, the ring in step."""

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
COUNT, DRAFTS = 8, 2


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    """One whose weights are of another format drafts."""
    return CompiledStep(FAMILY, 90, DRAFTS, "qwen2")


@pytest.mark.parametrize("bucket", BUCKETS)
def test_it_spills_nothing_and_keeps_the_rules_of_synchronisation(step: CompiledStep, bucket: str) -> None:
    found = report(step.kernel(bucket), step.source.text, body_formats(step.program))
    assert problems(found, machine_for("sm_90")) == []
    assert lint(step.kernel(bucket).ptx) == []


def test_text_is_the_cpu_targets_without_drafts(step: CompiledStep, compiled: ArtifactCache) -> None:
    """The prompt's first chunk wants no logits: the chunks of the head are passed by, those of the draft model read."""
    emulator()
    said = cpu_text(compiled, FAMILY, COUNT)
    gpu = EmulatedStep(step)
    state, steps = gpu.state, 0
    state["slot_limit"][0] = len(PROMPT) + COUNT - 1
    state["slot_drafts_most"][0] = state["slot_drafts"][0] = DRAFTS
    state["slot_history"][0, : len(PROMPT)] = PROMPT
    gpu.set_rows([(token, 0, i) for i, token in enumerate(PROMPT[:5])], [])
    assert gpu.run(0).races == []
    gpu.set_rows([(token, 0, 5 + i) for i, token in enumerate(PROMPT[5:])], [len(PROMPT) - 6])
    while state["n_rows"][0]:
        assert gpu.bucket == "few"
        assert gpu.run(1 + steps).races == []
        steps += 1
    assert not gpu.faulted()
    assert state["slot_tokens"][0, :COUNT].tolist() == said
    assert int(state["slot_accepted"][0].sum()) == COUNT - steps
    assert int(state["slot_drafted"][0].sum()) > 3
