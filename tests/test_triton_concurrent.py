"""The whole generated GPU kernel, 4 programs at once, interpreted with a race detector (second rung of the ladder).

Tokens and logits are the reference's under several interleavings, no two accesses race, nothing reads what nobody
wrote, and every planted fault of a schedule, a table or the memory order of the kernel is noticed. What is invisible
here: barriers between the threads of a program, and whatever a compiler does (the rungs above look there).
"""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import numpy as np
import planted
import pytest
from interpreter_memory import Fault
from interpreter_step import InterpretedStep, fused, random_model, schedules, set_rows, start_slot

from onelaunch.compiler.check.rounding import rounded_program
from onelaunch.ir.limits import Limits
from onelaunch.ir.reference import ReferenceModel, RowBatch, Slot
from onelaunch.ir.sampling import Sampling

pytestmark = pytest.mark.xdist_group("interpreted concurrent")
WORKERS = 4
LIMITS = {"rows": 16, "slots": 2, "context": 384, "outputs": 4, "few_rows": 4}
PROMPT = [5, 17, 100, 33, 8, 91, 4, 50, 77, 12, 101, 60]  # twelve rows: the first step takes the `many` bucket
# family, format, cache, largest error of logits. The reference rounds what matrices read, as the kernel does: apart
# from the order of sums there remain an int8 code that falls to the other side, and what attention rounds to bf16.
CASES = {
    "llama q8_0": ("llama", "q8_0", "f32", 5e-3),
    "qwen2 f32": ("qwen2", "f32", "f32", 1e-4),
    "qwen3 bf16": ("qwen3", "bf16", "bf16", 3e-2),
    "gemma3 q4_0": ("gemma3", "q4_0", "f32", 5e-3),
    "qwen2_moe f32": ("qwen2_moe", "f32", "f32", 1e-4),
    "gpt_oss f32": ("gpt_oss", "f32", "f32", 1e-4),
}


class Pair:
    """The generated step and the reference model that rounds alike, given the same requests and steps."""

    def __init__(self, step: InterpretedStep, tolerance: float) -> None:
        self.step, self.tolerance, limits = step, tolerance, step.limits
        bf16 = limits.kv_dtype == "bf16"
        program = rounded_program(step.imported.program, step.weights.formats, bf16=True)
        self.reference = ReferenceModel(program, step.weights, limits.slots, limits.context, bf16)

    def start(self, slot: int, prompt: list[int], sampling: Sampling) -> list[tuple[int, int, int]]:
        how = Slot(sampling, self.step.limits.context, seen=frozenset(prompt))
        start_slot(self.step.state, slot, how, self.step.limits)
        self.reference.start(slot, how)
        return [(token, slot, i) for i, token in enumerate(prompt)]

    def run(self, rows: list[tuple[int, int, int]], outputs: list[int], seed: int) -> np.ndarray:
        """Both take the step and must agree; its logits [outputs, vocab]."""
        state, n = self.step.state, len(outputs)
        set_rows(state, rows, outputs)
        schedule = self.step.schedules[self.step.bucket]
        self.step.run(seed)
        wanted = self.reference.step(RowBatch.of(rows, outputs))
        value = schedule.program.logits
        start, pitch = (
            schedule.buffer(schedule.program.exit.name, value.name).offset // 4,
            -(-value.tensor.width // 32) * 32,
        )
        logits = self.step.workspace[start : start + n * pitch].reshape(n, pitch)[:, : value.tensor.width]
        expected = wanted.logits.numpy()
        assert np.abs(logits - expected).max() <= self.tolerance * np.abs(expected).max()
        assert state.output_token[:n].tolist() == wanted.tokens.tolist()
        assert self.rows() == list(self.reference.state.rows)
        return logits.copy()

    def rows(self) -> list[tuple[int, int, int]]:
        """The rows that the last commit left for the next step."""
        s, n = self.step.state, int(self.step.state.n_rows[0])
        return list(zip(s.row_token[:n].tolist(), s.row_slot[:n].tolist(), s.row_position[:n].tolist(), strict=True))


def serve(pair: Pair, seed: int, steps: int) -> list[np.ndarray]:
    """A greedy prompt in one slot, a drawn one in the other, then both decode."""
    pair.step.reset()
    pair.reference.reset()
    first = pair.start(0, PROMPT, Sampling())
    second = pair.start(1, PROMPT[3:6], Sampling(temperature=0.9, top_k=20, repetition_penalty=1.2, seed=5))
    rows, outputs = first + second, [len(first) - 1, len(first) + len(second) - 1]
    found = []
    for i in range(steps):
        found.append(pair.run(rows, outputs, seed + i))
        rows = pair.rows()
        outputs = list(range(len(rows)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_interleaving_gives_the_references_tokens(case):
    family, fmt, kv_dtype, tolerance = CASES[case]
    step = InterpretedStep(random_model(family, fmt), Limits(**LIMITS, kv_dtype=kv_dtype), WORKERS)
    pair = Pair(step, tolerance)
    first, second = serve(pair, 0, 3), serve(pair, 100, 2)
    for one, two in zip(first[:2], second, strict=True):
        assert (one == two).all()  # to the last bit: no sum depends on who comes first


def test_the_number_of_workers_changes_no_bit():
    made = [
        serve(Pair(InterpretedStep(random_model("qwen2", "q8_0"), Limits(**LIMITS, kv_dtype="f32"), n), 5e-3), n, 2)
        for n in (1, 3)
    ]
    for one, two in zip(*made, strict=True):
        assert (one == two).all()


# ---- planted faults -----------------------------------------------------------------------------

# Four slots of one row each, and as many tiles of logits: every worker has work in every phase, so no wait is idle.
FAULT_LIMITS = Limits(rows=16, slots=4, context=128, outputs=4, few_rows=4, kv_dtype="f32")
INTERLEAVINGS = 6


class Broken:
    """A step to break: `tokens` are those of the sound one."""

    def __init__(self, family: str) -> None:
        self.imported = random_model(family, "f32", vocab=128)
        self.sound = self.made()
        self.tokens = {rows: self._tokens(self.sound, 0, rows) for rows in (4, 8)}

    def made(self, **changes: Any) -> InterpretedStep:
        return InterpretedStep(self.imported, FAULT_LIMITS, WORKERS, **changes)

    def noticed(self, step: InterpretedStep, seed: int, rows: int = 4) -> str:
        """What gives a broken step away: the fault that was raised, `tokens`, or nothing."""
        try:
            return "" if self._tokens(step, seed, rows) == self.tokens[rows] else "tokens"
        except Fault as fault:
            return type(fault).__name__

    def _tokens(self, step: InterpretedStep, seed: int, rows: int) -> list[int]:
        step.reset()
        each = rows // 4  # rows of a slot, the last wants logits
        set_rows(step.state, [(PROMPT[i], i // each, i % each) for i in range(rows)], list(range(each - 1, rows, each)))
        step.run(seed)
        return step.state.output_token.tolist()


@pytest.fixture(scope="module")
def broken():
    return Broken("gemma3")


@pytest.fixture(scope="module")
def broken_experts():
    return Broken("qwen3_moe")


def names(kind: str, experts: bool = False) -> list[str]:
    return [fault.name for fault in planted.faults(kind, planted.GRID, experts)]


@pytest.mark.parametrize(("name", "seed"), product(names("table"), range(4)))
def test_faults_of_a_table_are_noticed(broken, name, seed):
    step = broken.made()
    step.tables = planted.FAULTS[name].apply(step.tables, Random(seed))
    rows = 8 if name == "swapped_buckets" else 4
    # A wait that lets go one signal early shows where somebody waits while exactly one is missing.
    tries = INTERLEAVINGS if name == "target_too_low" else 1
    found = next(filter(None, (broken.noticed(step, seed + i, rows) for i in range(tries))), "")
    expected = {"target_too_high": ("Deadlock",), "dropped_signal": ("Deadlock",)}
    assert found in expected.get(name, ("Race", "Stray"))


@pytest.mark.parametrize(("name", "seed"), product(names("schedule"), range(3)))
def test_faults_of_a_schedule_are_noticed(broken, name, seed):
    made = schedules(fused(broken.imported.program), FAULT_LIMITS, WORKERS)
    made["few"] = planted.FAULTS[name].apply(made["few"], Random(seed))
    assert broken.noticed(broken.made(broken=made), seed)


@pytest.mark.parametrize(("name", "seed"), product((*names("schedule", True), "early_reuse"), range(3)))
def test_faults_of_a_schedule_of_experts_are_noticed(broken_experts, name, seed):
    made = schedules(fused(broken_experts.imported.program), FAULT_LIMITS, WORKERS)
    made["few"] = planted.FAULTS[name].apply(made["few"], Random(seed))
    assert broken_experts.noticed(broken_experts.made(broken=made), seed)


@pytest.mark.parametrize("number", range(4))
def test_a_doubled_share_of_experts_is_noticed(broken_experts, number):
    """Each worker in turn takes its neighbour's tiles of active experts."""
    step = broken_experts.made()
    code = next(b.code for key, b in step.source.bodies["few"].items() if key[1] == "gate_up" and "pack" not in key[2])
    table = step.tables["few"].copy()
    (record,) = np.argwhere(table[number, :, 0] == code)[0].tolist()
    table[number, record, planted.WORD["first"]] = (number + 1) % WORKERS
    step.tables = {**step.tables, "few": table}
    assert broken_experts.noticed(step, number) in ("Race", "Stray")


@pytest.mark.parametrize(("name", "seed"), product(names("source"), range(2)))
def test_faults_of_memory_order_are_noticed(broken, name, seed):
    assert broken.noticed(broken.made(edit=planted.FAULTS[name].apply), seed) == "Race"


def test_barriers_are_invisible_here(broken):
    """So that nobody takes this rung for more than it is: their faults are the emulator's and the lint's."""
    for fault in planted.FAULTS.values():
        if planted.GRID not in fault.seen_by and fault.kind != "ptx" and not fault.experts:
            assert fault.kind == "source"
            assert broken.noticed(broken.made(edit=fault.apply), 0) == ""
