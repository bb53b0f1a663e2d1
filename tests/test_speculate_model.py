"""Compiled models say the same with drafts as without, token for token: random ones of every kind, and a real one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onelaunch.compiler.driver import Request, compile_model
from onelaunch.ir.errors import UsageError
from onelaunch.ir.limits import Limits
from onelaunch.models.fetch import fetch
from onelaunch.runtime import Generation, Model, load
from onelaunch.tests.bench.speculate_prompts import COPY, PROSE
from onelaunch.tests.checkpoints import save_hf
from onelaunch.tests.compiled import ArtifactCache

pytestmark = pytest.mark.xdist_group("drafts")  # with test_speculate_end.py, which runs the same library
LIMITS = {"rows": 80, "slots": 4, "context": 512, "outputs": 12, "drafts": 4}
CONFIG = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 96, "sliding_window": 33, "num_attention_heads": 3,
          "num_key_value_heads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def path(compiled: ArtifactCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some layers windowed, so that drafts are written to rings."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf(folder, "gemma3_text", torch.bfloat16, **CONFIG)
    return compiled(folder, limits=LIMITS)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[Model]:
    with load(path, speculate="off", prefix_cache=False) as model:
        yield model


def random_prompt(rng: random.Random, vocab: int) -> list[int]:
    """With repeats in it."""
    stem = [rng.randrange(vocab) for _ in range(rng.randint(1, 30))]
    return (stem * rng.randint(1, 6))[: rng.randint(1, 150)]


def random_requests(rng: random.Random, vocab: int, seed: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts, some with a prefix of another, and how to continue them."""
    prompts = [random_prompt(rng, vocab) for _ in range(7)]
    prompts += [p + p[:70] for p in prompts[:3]]  # prefixes to reuse
    settings = {
        "max_new_tokens": rng.choice([5, 90, 200]),
        "temperature": rng.choice([0.0, 0.3, 0.9]),
        "top_k": rng.choice([0, 5]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        "seed": seed,
        "stop_tokens": rng.sample(range(vocab), rng.choice([0, 1])),
    }
    return prompts, settings


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_say_the_same(path: Path, plain: Model, seed: int) -> None:
    rng = random.Random(seed)
    prompts, settings = random_requests(rng, plain.vocab, seed)
    with load(path, kv_tokens=rng.choice([None, 448]), speculate=rng.choice(["auto", "ngram:2"])) as model:
        got, expected = model.generate(prompts, **settings), plain.generate(prompts, **settings)
    assert [r.tokens for r in got] == [r.tokens for r in expected]
    assert [r.finish_reason for r in got] == [r.finish_reason for r in expected]


def test_the_random_requests_do_draft(path: Path, plain: Model) -> None:
    """And what is counted adds up."""
    prompts = [[1, 2, 3, 4, 5] * 20, [9, 8, 7] * 10]
    with load(path) as model:
        results = model.generate(prompts, max_new_tokens=200, stop_tokens=[])
        streamed = model.stream(prompts[0], max_new_tokens=200, stop_tokens=[])
        assert list(streamed) == []
    for result in [*results, streamed.result]:
        found = result.speculation
        assert found is not None
        assert found.steps + sum(found.accepted) == len(result.tokens) - 1
        assert found.tokens_per_step == pytest.approx((len(result.tokens) - 1) / found.steps)
        assert all(a <= d for a, d in zip(found.accepted, found.drafted, strict=True))
        assert found.tokens_per_step > 1.5
    assert streamed.result.tokens == results[0].tokens
    assert plain.generate([1, 2], max_new_tokens=4).speculation is None


def test_explicit_rows_and_benchmarks_have_no_drafts(path: Path, plain: Model) -> None:
    prompt = [1, 2, 3] * 30
    with load(path) as model:
        model.generate(prompt, max_new_tokens=40)
        for _ in range(2):
            assert (model.step(prompt[:40]) == plain.step(prompt[:40])).all()
            model.reset(), plain.reset()
        assert len(model.bench_decode(90, depth=60)) == 90
        assert model._backend.state.slot_steps[0] == 90  # one token each
        assert len(model.bench_decode(30, depth=60, slots=4)) == 30
        again = model.generate(prompt, max_new_tokens=40, stop_tokens=[])
    assert again.tokens == plain.generate(prompt, max_new_tokens=40, stop_tokens=[]).tokens


def test_more_drafts_than_compiled_are_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="at most ngram:4, what was compiled, got `ngram:5`"):
        load(path, speculate="ngram:5")


# ---- a real model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """With drafts and without."""
    output = tmp_path_factory.mktemp("smollm") / "artifact"
    limits = Limits(rows=128, slots=4, context=1024, outputs=10, drafts=4)
    compile_model(Request(fetch("smollm2-135m-instruct"), output, limits=limits, workers=(2,)))
    with load(output, threads=2) as drafting, load(output, threads=2, speculate="off") as plain:
        yield drafting, plain


def both(models: tuple[Model, Model], prompts: list[str], **settings: Any) -> list[Generation]:
    """The same text of both, prompts side by side."""
    got, expected = (
        model.generate([[{"role": "user", "content": p}] for p in prompts], chat=True, stop_tokens=[], **settings)
        for model in models
    )
    assert [r.tokens for r in got] == [r.tokens for r in expected]
    return got


@pytest.mark.weights
def test_two_thousand_greedy_tokens_of_a_real_model_are_the_same(smollm: tuple[Model, Model]) -> None:
    beside = [COPY["edit"], COPY["quote"], PROSE["story"], PROSE["explain"]]
    results = both(smollm, beside, max_new_tokens=400)
    for prompt in (COPY["edit code"], COPY["extract"]):  # alone
        results += both(smollm, [prompt], max_new_tokens=200)
    assert sum(len(r.tokens) for r in results) == 2000
    assert results[-1].speculation is not None
    assert results[-1].speculation.tokens_per_step > 2


@pytest.mark.weights
def test_drawn_tokens_of_a_real_model_are_the_same(smollm: tuple[Model, Model]) -> None:
    how = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7}
    both(smollm, [COPY["extract"], PROSE["history"], COPY["quote"]], max_new_tokens=100, **how)
