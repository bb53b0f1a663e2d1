"""First tokens kept under a window on the GPU: bodies interpreted beside the reference, the compiled PTX emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
from compiled_kernels import CompiledStep, group
from emulated import PROMPT, EmulatedStep, cpu_text, emulator
from interpreter_lockstep import Lockstep
from interpreter_step import random_model
from test_triton_bodies import LIMITS, check

from onelaunch.compiler.gpu.sync_lint import lint
from onelaunch.models.window import with_window
from onelaunch.tests.compiled import ArtifactCache
from onelaunch.tests.test_sinks import PLAIN

FAMILY, WINDOW, SINKS = PLAIN
COUNT = 6
pytestmark = group(FAMILY)
# (token, slot, position) with a window of 24: no sinks yet, some, all; begun in the split of the sinks and after it.
FEW = [(5, 1, 23), (7, 0, 27), (9, 1, 260)]
MANY = [(i, i % 2, p) for i, p in enumerate((3, 40, 90, 255, 279, 280))]


@pytest.mark.parametrize(("kv_dtype", "sinks"), [("f32", 6), ("bf16", 64)])
def test_attention_to_sinks_is_the_reference(kv_dtype: str, sinks: int) -> None:
    made = random_model("gemma3", "f32", 2, layers=1, layer_kinds=("local",))
    pair = Lockstep(replace(made, program=with_window(made.program, 0, sinks)), replace(LIMITS, kv_dtype=kv_dtype))
    for rows in (FEW, MANY):
        assert "attend" in check(pair, rows)


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    return CompiledStep(FAMILY, 90, bounds=(WINDOW, SINKS))


def test_it_spills_nothing_and_keeps_the_rules_of_synchronisation(step: CompiledStep) -> None:
    assert step.kernel("few").spills == 0
    assert lint(step.kernel("few").ptx) == []


def test_emulated_text_is_the_cpu_targets(step: CompiledStep, compiled: ArtifactCache) -> None:
    """The prompt four rows a step: with a window so short, they have sinks already."""
    emulator()
    gpu = EmulatedStep(step, ("few",))
    tokens = []
    for at in range(0, len(PROMPT), 4):
        gpu.set_rows([(PROMPT[p], 0, p) for p in range(at, at + 4)], [3])
        gpu.state["slot_count"][0] = 0
        assert gpu.run(at).races == []
    for seed in range(COUNT):
        tokens.append(int(gpu.state["output_token"][0]))
        assert gpu.run(seed).races == []
    assert tokens == cpu_text(compiled, FAMILY, COUNT, WINDOW, SINKS)
    assert not gpu.faulted()
