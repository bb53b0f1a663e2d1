"""The generated GPU kernel's sampling and commit of drafted rows: interpreted, the reference's bits on random steps."""

from __future__ import annotations

import random

import numpy as np
import pytest
from interpreter_lockstep import Lockstep
from interpreter_step import random_model, set_rows, start_slot

from onelaunch.ir.limits import Limits
from onelaunch.ir.reference import Slot
from onelaunch.ir.sampling import Sampling

pytestmark = pytest.mark.xdist_group("interpreted bodies")
LIMITS = Limits(rows=16, slots=4, context=1200, outputs=12, few_rows=8, drafts=4, kv_dtype="f32")
VOCAB = 70


@pytest.fixture(scope="module")
def pair() -> Lockstep:
    return Lockstep(random_model("llama", "f32", layers=1, vocab=VOCAB), LIMITS)


def random_rows(rng: random.Random, first: int) -> tuple[list[tuple[int, int, int]], list[int], list[int]]:
    """Rows, outputs and drafts of slots that read or run; no more outputs than fit."""
    rows, outputs, drafts, words = [], [], [], rng.choice([3, VOCAB])
    for slot in range(rng.randint(1, 4)):
        if rng.random() < 0.2:  # the end of a prompt
            rows += [(rng.randrange(words), slot, i) for i in range(2)]
            drafts += [0, 0]
            outputs.append(len(rows) - 1)
            continue
        for i in range(1 + rng.randint(0, min(4, 11 - len(outputs) - (3 - slot)))):
            outputs.append(len(rows))
            rows.append((rng.randrange(words), slot, first + i))
            drafts.append(i)
    return rows, outputs, drafts


def random_step(pair: Lockstep, rng: random.Random) -> None:
    """Both states alike, in the middle of texts."""
    noise = np.random.default_rng(rng.randrange(2**32))
    first = rng.choice([5, 1040, 1100])
    rows, outputs, drafts = random_rows(rng, first)
    history = noise.integers(0, rng.choice([3, VOCAB]), pair.step.state.slot_history.shape)
    seen = noise.integers(0, 2**32, pair.step.state.slot_seen.shape, np.uint32) * (noise.random() < 0.5)
    slots = []
    for _ in range(4):
        sampling = Sampling(rng.choice([0, 0.8]), repetition_penalty=rng.choice([1, 1.5]), seed=rng.randrange(99))
        stop = frozenset(rng.sample(range(VOCAB), rng.choice([0, 8])))
        slots.append((Slot(sampling, rng.choice([1200, first + 3]), stop), rng.choice([1, 4]), rng.choice([0, 1, 4])))
    for state in (pair.step.state, pair.machine.state):
        for number, (how, now, most) in enumerate(slots):
            start_slot(state, number, how, LIMITS)
            state.slot_drafts_most[number], state.slot_drafts[number] = most, min(now, most)
        state.slot_history[:], state.slot_seen[:] = history, seen
    logits = noise.normal(0, 2, (len(outputs), VOCAB)).astype(np.float32)
    for j, row in enumerate(outputs[:-1]):  # what the next row guesses is likely
        logits[j, rows[row + 1][0]] += rng.choice([0, 3, 9])
    if rng.random() < 0.5:
        logits[:, :3] += 6
    if rng.random() < 0.15:
        logits[rng.randrange(len(logits)), rng.randrange(VOCAB)] = np.nan
    pair.set_rows(rows, outputs)
    for state in (pair.step.state, pair.machine.state):
        state.row_draft[: len(rows)] = drafts
    pair.put_logits(logits)


def test_random_steps_end_as_the_reference_says(pair: Lockstep) -> None:
    ends, guessed = set(), 0
    for seed in range(100):
        random_step(pair, random.Random(seed))
        for number, anchor, _ in pair.records():
            if anchor in ("sample", "commit"):
                pair.run_both(number)
        for name in pair.machine.state._views:
            got, expected = getattr(pair.step.state, name), getattr(pair.machine.state, name)
            assert (got == expected).all(), (seed, name, got, expected)
        ends |= set(pair.step.state.slot_finished.tolist())
        guessed += int(pair.step.state.row_draft[: pair.step.state.n_rows[0]].max(initial=0) > 0)
    assert ends == {0, 1, 2, 3}
    assert guessed > 20
    assert pair.step.state.slot_accepted.sum() > 50


def test_the_whole_step_says_with_drafts_what_it_says_without(pair: Lockstep) -> None:
    """Interpreted; what it will say is put where it is looked up."""
    step, prompt = pair.step, [(7 * i + 3) % VOCAB for i in range(16)]
    said, steps = plain_text(pair, prompt, [], 0)
    again, fewer = plain_text(pair, prompt, [*prompt[-2:], *said[:6], 5, *said[7:]][:14], 4)
    assert again == said
    assert fewer < steps
    assert step.state.slot_accepted[0].sum() == steps - fewer


def plain_text(pair: Lockstep, prompt: list[int], remembered: list[int], most: int) -> tuple[list[int], int]:
    """Twelve tokens after a prompt, of which the step remembers something else, and the steps they took."""
    step, state, steps = pair.step, pair.step.state, 0
    step.reset()
    state.slot_history[0, : len(prompt)] = prompt
    state.slot_history[0, : len(remembered)] = remembered
    state.slot_drafts_most[0] = state.slot_drafts[0] = most
    state.slot_limit[0] = len(prompt) + 11
    set_rows(state, [(t, 0, i) for i, t in enumerate(prompt)], [len(prompt) - 1])
    while state.n_rows[0]:
        step.run(steps)
        steps += 1
    return state.slot_tokens[0, : state.slot_count[0]].tolist(), steps
