"""Compiled steps in which a second model drafts: the text is that of the first alone, whoever guesses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onelaunch.runtime import Model, load
from onelaunch.tests.checkpoints import save_hf, save_random
from onelaunch.tests.compiled import ArtifactCache
from onelaunch.tests.test_speculate_model import CONFIG, random_prompt

pytestmark = pytest.mark.xdist_group("drafts")
LIMITS = {"rows": 80, "slots": 4, "context": 512, "outputs": 12, "drafts": 4, "drafter": "model"}
OTHER = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
         "num_key_value_heads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some layers windowed, so that drafts are written to rings."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf(folder, "gemma3_text", torch.bfloat16, **CONFIG)
    return folder


@pytest.fixture(scope="module")
def itself(checkpoint: Path, compiled: ArtifactCache) -> Path:
    return compiled(checkpoint, limits=LIMITS, draft=checkpoint)


@pytest.fixture(scope="module")
def stranger(checkpoint: Path, compiled: ArtifactCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drafted by a model of another family and size, that knows nothing of the first."""
    folder = tmp_path_factory.mktemp("draft")
    save_random(folder, "llama", torch.bfloat16, **OTHER)
    return compiled(checkpoint, limits=LIMITS, draft=folder)


@pytest.fixture(scope="module")
def plain(itself: Path) -> Iterator[Model]:
    with load(itself, speculate="off", prefix_cache=False) as model:
        yield model


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_say_the_same(itself: Path, stranger: Path, plain: Model, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [random_prompt(rng, plain.vocab) for _ in range(7)]
    prompts += [p + p[:70] for p in prompts[:3]]  # prefixes to reuse
    settings: dict[str, Any] = {
        "max_new_tokens": rng.choice([5, 90, 200]),
        "temperature": rng.choice([0.0, 0.3, 0.9]),
        "top_k": rng.choice([0, 5]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        "seed": seed,
        "stop_tokens": rng.sample(range(plain.vocab), rng.choice([0, 1])),
    }
    path = rng.choice([itself, stranger])
    with load(path, kv_tokens=rng.choice([None, 448]), speculate=rng.choice(["auto", "draft:2"])) as model:
        got, expected = model.generate(prompts, **settings), plain.generate(prompts, **settings)
    assert [r.tokens for r in got] == [r.tokens for r in expected]
    assert [r.finish_reason for r in got] == [r.finish_reason for r in expected]


def test_a_model_that_drafts_for_itself_is_always_right(itself: Path, plain: Model) -> None:
    """In a batch, after prompts in chunks, after prefixes that are not read again, and when others were cancelled."""
    rng = random.Random(3)
    prompts = [[rng.randrange(64) for _ in range(n)] for n in (1, 8, 150, 300)]
    prompts.append([*prompts[3][:200], 5, 6])
    with load(itself) as model:
        stream = model.stream(prompts[2], max_new_tokens=100, stop_tokens=[])
        next(iter(stream), None)
        stream.close()
        first, again = (model.generate(prompts, max_new_tokens=120, stop_tokens=[]) for _ in range(2))
    said = plain.generate(prompts, max_new_tokens=120, stop_tokens=[])
    for result, expected in zip(first + again, said + said, strict=True):
        found = result.speculation
        assert result.tokens == expected.tokens
        assert found is not None
        assert found.accepted == found.drafted
        assert found.tokens_per_step > 1.5
    assert again[3].reused_tokens >= 128


def test_a_prefix_that_is_not_read_again_is_not_followed_again(itself: Path) -> None:
    """Else the draft model would have to catch up, and a slot that catches up has no drafts."""
    prompt = [i * i % 61 for i in range(300)]
    with load(itself) as model:
        first, again = (model.generate(prompt, max_new_tokens=60, stop_tokens=[]) for _ in range(2))
    assert again.reused_tokens == 256
    assert again.speculation == first.speculation


def test_a_stop_token_inside_a_draft_ends_the_text(itself: Path, plain: Model) -> None:
    prompt = [3, 1, 4, 1, 5]
    text = plain.generate(prompt, max_new_tokens=60, stop_tokens=[]).tokens
    with load(itself) as model:
        for stop in sorted(set(text)):
            got = model.generate(prompt, max_new_tokens=60, stop_tokens=[stop])
            assert got.tokens == text[: text.index(stop) + 1]
            assert got.finish_reason == "stop"


def test_a_stranger_is_hardly_ever_right(stranger: Path, plain: Model) -> None:
    prompt = [9, 8, 7, 6]
    with load(stranger) as model:
        result = model.generate(prompt, max_new_tokens=200, stop_tokens=[])
    assert result.tokens == plain.generate(prompt, max_new_tokens=200, stop_tokens=[]).tokens
    assert result.speculation is not None
    assert result.speculation.acceptance[0] < 0.2
    assert result.speculation.drafted[0] > 150  # it does go on guessing one


def test_explicit_rows_have_no_drafts(itself: Path, plain: Model) -> None:
    prompt = [1, 2, 3] * 30
    with load(itself) as model:
        for _ in range(2):
            assert np.array_equal(model.step(prompt[:40]), plain.step(prompt[:40]))
            model.reset(), plain.reset()
        assert len(model.bench_decode(30, depth=60, slots=4)) == 30
