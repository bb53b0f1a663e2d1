"""Drafts in the compiled PTX, emulated: the CPU target's text, no races, and a step's drafts looked up right."""

from __future__ import annotations

import pytest
from compiled_kernels import FAMILIES, CompiledStep, checkpoint, group, limits
from emulated import PROMPT, EmulatedStep, emulator

from onelaunch.runtime import load
from onelaunch.tests.compiled import ArtifactCache

FAMILY = "llama"
pytestmark = group(FAMILY)
COUNT = 10


@pytest.mark.parametrize("arch", [90])
def test_text_with_drafts_is_the_cpu_targets(arch: int, compiled: ArtifactCache) -> None:
    """What it will say, but for one token, is put where it is looked up."""
    emulator()
    artifact = compiled(checkpoint(FAMILY), quant=FAMILIES[FAMILY][1], limits=limits(FAMILY).as_dict())
    with load(artifact) as cpu:
        said = cpu.generate(PROMPT, max_new_tokens=COUNT, stop_tokens=[]).tokens
    gpu = EmulatedStep(CompiledStep(FAMILY, arch, drafts=2))
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
