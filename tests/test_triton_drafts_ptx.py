"""Drafts in the compiled PTX, emulated: the CPU target's text, no races, and a step's drafts looked up right."""

from __future__ import annotations

import pytest
from emulated import FAMILIES, PROMPT, EmulatedStep, checkpoint, emulator, limits_of

from onelaunch.ir.limits import Limits
from onelaunch.runtime import load
from onelaunch.tests.compiled import ArtifactCache

pytestmark = pytest.mark.xdist_group("emulated")
FAMILY = next(iter(FAMILIES))
COUNT = 10


@pytest.mark.parametrize("arch", [90])
def test_text_with_drafts_is_the_cpu_targets(arch: int, compiled: ArtifactCache) -> None:
    """What it will say, but for one token, is put where it is looked up."""
    emulator()
    given = limits_of(FAMILY)
    artifact = compiled(checkpoint(FAMILY), quant=FAMILIES[FAMILY][1], limits=given)
    with load(artifact) as cpu:
        said = cpu.generate(PROMPT, max_new_tokens=COUNT, stop_tokens=[]).tokens
    gpu = EmulatedStep(checkpoint(FAMILY), Limits(**{**given, "outputs": 8, "drafts": 2}), FAMILIES[FAMILY][1], arch)
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
