"""Compiled steps in which a second model drafts: the text is that of the first alone, whoever guesses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onelaunch.compiler.driver import Request, compile_model
from onelaunch.compiler.reports.artifact import overview, phases, summary_lines
from onelaunch.ir.errors import LoadError, OnelaunchError
from onelaunch.ir.limits import Limits
from onelaunch.models.checkpoint import TokenizerFiles
from onelaunch.models.drafter import with_drafter
from onelaunch.models.fetch import fetch
from onelaunch.runtime import Artifact, Model, load
from onelaunch.tests.bench.draft_model import compile_pair
from onelaunch.tests.bench.speculate_prompts import COPY, PROSE
from onelaunch.tests.checkpoints import save_hf, save_random
from onelaunch.tests.compiled import ArtifactCache
from onelaunch.tests.interpreter_step import random_model
from onelaunch.tests.test_speculate_model import CONFIG, random_requests

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
    prompts, settings = random_requests(rng, plain.vocab, seed)
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


# ---- what is refused, what is counted ------------------------------------------------------------------


def test_a_draft_model_that_does_not_fit_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    def refusal(model_type: str, **config: Any) -> str:
        folder = tmp_path / f"{model_type}{len(list(tmp_path.iterdir()))}"
        save_random(folder, model_type, **{**OTHER, **config})
        with pytest.raises(OnelaunchError) as error:
            compile_model(Request(checkpoint, tmp_path / "none", limits=Limits(**LIMITS), draft=folder))
        return str(error.value)

    assert "expected a vocabulary of 64 tokens, as the model has, got 66" in refusal("llama", vocab_size=66)
    assert "at most 256, the draft model's, got 512" in refusal("llama", max_position_embeddings=256)
    assert "expected a draft model without experts" in refusal(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    assert not (tmp_path / "none").exists()


def test_a_draft_model_with_another_tokenizer_is_refused() -> None:
    def tokenizer(words: dict[str, int]) -> Any:
        text = json.dumps({"model": {"vocab": words}, "added_tokens": [{"content": "<end>", "id": 2}]})
        return lambda: TokenizerFiles({"tokenizer.json": text.encode()})

    ours, theirs, alike = ({"a": 0, "b": 1}, {"a": 1, "b": 0}, {"b": 1, "a": 0})
    target, other, same = (
        replace(random_model("llama"), checkpoint=replace(random_model("llama").checkpoint, tokenizer=tokenizer(words)))
        for words in (ours, theirs, alike)
    )
    assert with_drafter(target, same, 2).program.passes == 2
    with pytest.raises(LoadError, match="the model's tokenizer, where `a` is token 0, got one where it is token 1"):
        with_drafter(target, other, 2)


def test_bytes_of_a_draft_model_are_counted_apart(itself: Path, checkpoint: Path, compiled: ArtifactCache) -> None:
    alone = Artifact.open(compiled(checkpoint, limits={**LIMITS, "drafter": "ngram"}))
    both = Artifact.open(itself)
    one, two = alone.manifest.traffic, both.manifest.traffic
    assert two["weights_per_step"] == one["weights_per_step"] == two["weights_per_guess"]
    assert two["weights"] == 2 * one["weights"]
    token = [sum(group.token_bytes() for group in a.manifest.caches) for a in (alone, both)]
    assert token[0] == token[1]  # of a step without guesses
    shown = summary_lines(overview(both, 10.0))
    assert any(line.startswith("drafts     ") and "up to 4 a step" in line for line in shown)
    weights = [sum(row["weight_bytes"] for row in phases(a, 10.0, 0)) for a in (alone, both)]
    assert weights[1] == pytest.approx(5 * weights[0], rel=1e-3)


@pytest.mark.weights
def test_greedy_tokens_of_a_real_model_are_the_same(tmp_path: Path) -> None:
    """Drafted by its own first layers; 2,000 tokens of it are what tests/bench/draft_model.py compares."""
    made = compile_pair(fetch("smollm2-135m-instruct"), 24, 3, tmp_path / "artifact", 2)
    with load(made, threads=2) as model, load(made, threads=2, speculate="off") as plain:
        for prompts, tokens in (([COPY["extract"]], 60), ([*PROSE.values()][:4], 25)):
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            got, expected = (
                m.generate(chats, chat=True, max_new_tokens=tokens, stop_tokens=[]) for m in (model, plain)
            )
            assert [r.tokens for r in got] == [r.tokens for r in expected]
            assert all(sum(r.speculation.accepted) > 0 for r in got if r.speculation)
