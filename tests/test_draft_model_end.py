"""Native commit and guesses where a second model drafts: the reference's bits on random steps."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from onelaunch.ir.sampling import Sampling
from onelaunch.ir.vm.commit import run_commit
from onelaunch.ir.vm.guess import run_guess
from onelaunch.tests.checkpoints import save_hf
from onelaunch.tests.compiled import ArtifactCache
from onelaunch.tests.end_of_step import EndOfStep
from onelaunch.tests.test_draft_model import LIMITS
from onelaunch.tests.test_speculate_end import random_step, reference_token
from onelaunch.tests.test_speculate_model import CONFIG

pytestmark = pytest.mark.xdist_group("drafts")
VOCAB = 64


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory, compiled: ArtifactCache) -> EndOfStep:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf(folder, "gemma3_text", torch.bfloat16, **CONFIG)
    return EndOfStep(compiled(folder, workers=(1,), limits=LIMITS, draft=folder))


def follow(end: EndOfStep, rng: random.Random) -> None:
    """What the draft model has followed: all but the step's own tokens, some more or fewer."""
    state = end.state
    for i in range(int(state.n_rows[0])):
        if not state.row_draft[i] and (i == 0 or state.row_slot[i] != state.row_slot[i - 1]):
            first = int(state.row_position[i])
            state.slot_followed[state.row_slot[i]] = first and first + 1 - (rng.random() < 0.3)


def likeliest(state: SimpleNamespace, logits: np.ndarray) -> list[int]:
    rows = logits[: int(state.n_outputs[0])]
    return [int(row.argmax()) if np.isfinite(row).all() else -1 for row in rows]


def test_random_steps_end_as_the_reference_says(end: EndOfStep) -> None:
    guesses, held, behind, broken = 0, 0, 0, 0
    for seed in range(1000):
        rng = random.Random(seed)
        logits = random_step(end, rng)
        follow(end, rng)
        drafting = np.random.default_rng(seed).normal(0, 2, (4, VOCAB)).astype(np.float32).round(1)  # some alike
        if rng.random() < 0.1:
            drafting[rng.randrange(4), rng.randrange(VOCAB)] = rng.choice([np.nan, np.inf])
        expected = SimpleNamespace(**end.fields())
        held -= int(expected.slot_accepted.sum())
        tokens = end.run(logits, drafting)
        for j, row in enumerate(expected.output_row[: len(logits)]):
            expected.output_token[j] = reference_token(expected, int(row), logits[j])
        run_commit(expected, end.limits)  # type: ignore[arg-type]
        for _ in range(end.limits.drafts):
            wanted = likeliest(expected, drafting)
            broken += wanted.count(-1)
            run_guess(expected, end.limits, wanted)  # type: ignore[arg-type]
        assert tokens == expected.output_token[: len(tokens)].tolist(), seed
        for name, value in vars(expected).items():
            assert (getattr(end.state, name) == value).all(), (seed, name)
        guesses += int(expected.row_draft[: expected.n_rows[0]].max(initial=0))
        held += int(expected.slot_accepted.sum())
        behind += int((expected.end_drafts[: expected.n_ends[0]] == 0).sum())
    assert min(guesses, held) > 500
    assert behind > 50
    assert broken > 10


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_a_stop_token_inside_a_draft_ends_the_text_there(end: EndOfStep, stop_at: int) -> None:
    said = [11, 12, 13, 14, 15]
    end.start(0, Sampling(), 512, [said[stop_at]], 4)
    end.state.slot_followed[0] = 21
    end.put([(10, 0, 20, 0), *((said[i], 0, 21 + i, i + 1) for i in range(4))], range(5))
    end.run(np.eye(VOCAB, dtype=np.float32)[said])
    assert end.state.slot_tokens[0, : end.state.slot_count[0]].tolist() == said[: stop_at + 1]
    assert (end.state.slot_finished[0], end.state.n_rows[0]) == (1, 0)
    assert end.state.slot_followed[0] == 21 + stop_at  # what others may reuse, the draft model has as well

