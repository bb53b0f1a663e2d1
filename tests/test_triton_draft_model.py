"""The generated GPU kernel where a second model drafts, interpreted: its bookkeeping is the reference's on random
steps, and whole steps, in a grid with a race detector, say what the first model says alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from interpreter_lockstep import Lockstep
from interpreter_step import InterpretedStep, random_model, set_rows
from test_triton_drafts import random_step

from onelaunch.ir.limits import Limits
from onelaunch.models.drafter import with_drafter
from onelaunch.models.importer import Imported

pytestmark = pytest.mark.xdist_group("interpreted bodies")
LIMITS = Limits(rows=16, slots=4, context=1200, outputs=12, few_rows=8, drafts=4, kv_dtype="f32", drafter="model")
VOCAB = 70


def pair_of(draft: Imported, passes: int, family: str = "llama") -> Imported:
    return with_drafter(random_model(family, "f32", layers=1, vocab=VOCAB), draft, passes)


@pytest.fixture(scope="module")
def pair() -> Lockstep:
    return Lockstep(pair_of(random_model("llama", "f32", layers=1, vocab=VOCAB), LIMITS.drafts), LIMITS)


def follow(pair: Lockstep, rng: random.Random) -> None:
    """Slots of which the draft model has followed all but a few tokens, or none."""
    state, n = pair.machine.state, int(pair.machine.state.n_rows[0])
    for slot in set(state.row_slot[:n].tolist()):
        first = int(state.row_position[:n][state.row_slot[:n] == slot].min())
        known = 0 if first == 0 else first + 1 - (rng.random() < 0.2)
        pair.step.state.slot_followed[slot] = state.slot_followed[slot] = known


def same(pair: Lockstep, what: object) -> None:
    for name in pair.machine.state._views:
        got, expected = getattr(pair.step.state, name), getattr(pair.machine.state, name)
        assert (got == expected).all(), (what, name, got, expected)


def test_random_steps_end_as_the_reference_says(pair: Lockstep) -> None:
    guesses, late, broken = 0, 0, 0
    for seed in range(60):
        rng = random.Random(seed)
        random_step(pair, rng)
        follow(pair, random.Random(seed))
        noise = np.random.default_rng(seed)
        for number, anchor, _ in pair.records():
            if anchor == "guess":
                outputs = int(pair.step.state.n_outputs[0])
                logits = noise.normal(0, 2, (outputs, VOCAB)).astype(np.float32).round(1)  # some alike
                if outputs and rng.random() < 0.1:
                    logits[rng.randrange(outputs), rng.randrange(VOCAB)] = rng.choice([np.nan, np.inf])
                    broken += 1
                pair.put_logits(logits, pair.machine.program.drafter)
            if anchor in ("sample", "commit", "guess"):
                pair.run_both(number)
                same(pair, (seed, number, anchor))
        state = pair.step.state
        guesses += int(state.row_draft[: state.n_rows[0]].max(initial=0))
        late += int(state.n_ends[0] > 0 and (state.end_drafts[: state.n_ends[0]] == 0).any())
    assert guesses > 40
    assert late > 3
    assert broken > 3


DRAFTS = 2
SMALL = Limits(rows=12, slots=2, context=128, outputs=6, few_rows=4, drafts=DRAFTS, kv_dtype="f32", drafter="model")


@pytest.mark.parametrize(("family", "drafter"), [("llama", "itself"), ("gemma3", "a stranger")])
def test_whole_steps_say_what_the_model_says_alone(family: str, drafter: str) -> None:
    """The prompt in two chunks, the first without outputs: the draft model's weights lie behind the head's."""
    sizes = {} if family == "gemma3" else {"layers": 1}
    target = random_model(family, "f32", vocab=VOCAB, **sizes)
    draft = target if drafter == "itself" else random_model("llama", "q8_0", seed=3, layers=1, vocab=VOCAB)
    step = InterpretedStep(with_drafter(target, draft, DRAFTS), SMALL, 2)
    said = text(step, 0)
    assert text(step, DRAFTS) == said
    drafted, held = int(step.state.slot_drafted[0].sum()), int(step.state.slot_accepted[0].sum())
    assert drafted > 3
    assert (held == drafted) if drafter == "itself" else (held < drafted)


def text(step: InterpretedStep, most: int) -> list[int]:
    """Ten tokens after a prompt."""
    prompt, state = [(7 * i + 3) % VOCAB for i in range(9)], step.state
    step.reset()
    state.slot_history[0, : len(prompt)] = prompt
    state.slot_drafts_most[0] = state.slot_drafts[0] = most
    state.slot_limit[0] = len(prompt) + 9
    set_rows(state, [(t, 0, i) for i, t in enumerate(prompt[:4])], [])
    step.run()
    set_rows(state, [(t, 0, 4 + i) for i, t in enumerate(prompt[4:])], [4])
    for seed in range(20):
        if state.n_rows[0]:
            step.run(seed)
    return state.slot_tokens[0, : state.slot_count[0]].tolist()
