"""Prefix reuse in compiled models: text, streams and logits are to the bit what they are without it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onelaunch.ir.errors import VerifyError
from onelaunch.runtime import Model, host, load
from onelaunch.tests import toy
from onelaunch.tests.checkpoints import save_random
from onelaunch.tests.compiled import ArtifactCache, all_logits
from onelaunch.tests.toy import NAN, answer

LIMITS = {"rows": 80, "slots": 3, "context": 512, "outputs": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 2}),
    "mistral, all windowed": ("mistral", {"num_hidden_layers": 2, "sliding_window": 70}),
    "gemma3, some windowed": (
        "gemma3_text",
        {"hidden_size": 96, "sliding_window": 33, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
}
SMALL = 448  # KV tokens: less than three slots' contexts


@pytest.fixture(scope="module", params=CASES)
def path(request: Any, compiled: ArtifactCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random(folder, model_type, torch.bfloat16, **config)
    return compiled(folder, limits=LIMITS)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[Model]:
    with load(path, prefix_cache=False) as model:
        yield model


def random_prompts(rng: random.Random, count: int, vocab: int) -> list[list[int]]:
    """Prompts that begin as earlier ones do, up to anywhere."""
    made: list[list[int]] = []
    for _ in range(count):
        stem = rng.choice(made) if made and rng.random() < 0.8 else []
        cut = rng.choice([len(stem), len(stem) // 64 * 64, rng.randint(0, len(stem))])
        more = [rng.randrange(vocab) for _ in range(rng.choice([1, 64, rng.randint(1, 150)]))]
        made.append([*stem[:cut], *more][: SMALL - 100])
    return made


@pytest.mark.parametrize("seed", range(3))
def test_random_prompts_in_a_small_cache_say_the_same(path: Path, plain: Model, seed: int) -> None:
    rng, reused = random.Random(seed), 0
    prompts = random_prompts(rng, 16, plain.vocab)
    with load(path, kv_tokens=SMALL) as model:
        for start in range(0, len(prompts), 4):
            settings = {
                "max_new_tokens": rng.randint(1, 90),
                "temperature": rng.choice([0.0, 0.9]),
                "repetition_penalty": rng.choice([1.0, 1.2]),
                "seed": seed,
                "stop_tokens": rng.sample(range(plain.vocab), rng.choice([0, 2])),
            }
            part = prompts[start : start + 4]
            got, expected = model.generate(part, **settings), plain.generate(part, **settings)
            assert [r.tokens for r in got] == [r.tokens for r in expected]
            assert [r.finish_reason for r in got] == [r.finish_reason for r in expected]
            assert not any(r.reused_tokens for r in expected)
            reused += sum(r.reused_tokens for r in got)
        cache = model._cache
        assert all(held == 0 for held, _, _ in cache.counts())
        cache.forget()
        assert [free for _, _, free in cache.counts()] == [pool.size for pool in cache.pools]
    assert reused > 0


def test_logits_after_reuse_have_the_same_bits(path: Path, plain: Model) -> None:
    """Of the first token and of later ones, which attend to shared and to own pages."""
    prompt = np.random.default_rng(1).integers(0, plain.vocab, 300).tolist()
    with load(path) as model:
        model.generate(prompt, max_new_tokens=1)
        for cut in (299, 257, 200, 129):
            stream = model.stream([*prompt[:cut], 7], max_new_tokens=3, stop_tokens=[])
            # A tokenizer-less stream has no pieces: it runs to its end, and the last logits are there to read.
            assert list(stream) == []
            last = model._backend.logits(1)[0].copy()
            fed = [*prompt[:cut], 7, *stream.result.tokens[:2]]
            expected = all_logits(plain, fed, 1)[-1]
            assert (last.view(np.int32) == expected.view(np.int32)).all(), cut
            assert stream.result.reused_tokens == cut // 64 * 64


def test_steps_and_benchmarks_neither_see_nor_spoil_what_is_kept(path: Path, plain: Model) -> None:
    prompt = np.random.default_rng(2).integers(0, plain.vocab, 300).tolist()
    expected = plain.generate(prompt, max_new_tokens=40, stop_tokens=[])
    logits = all_logits(plain, prompt[:150], 3)
    with load(path) as model:
        model.generate(prompt, max_new_tokens=40, stop_tokens=[])
        model.step([1, 2, 3], [2, 2, 2])
        assert (all_logits(model, prompt[:150], 3).view(np.int32) == logits.view(np.int32)).all()
        again = model.generate(prompt, max_new_tokens=40, stop_tokens=[])
        assert (again.tokens, again.reused_tokens) == (expected.tokens, 256)
        model.bench_decode(30, depth=300, slots=3)  # every page, and so an end of what was kept
        model.bench_prefill(400)
        last = model.generate(prompt, max_new_tokens=40, stop_tokens=[])
        assert (last.tokens, last.reused_tokens) == (expected.tokens, 0)


def test_streams_closed_in_the_middle_leave_only_what_is_true(path: Path, plain: Model) -> None:
    rng = random.Random(5)
    prompts = random_prompts(rng, 12, plain.vocab)
    expected = [plain.generate(p, max_new_tokens=60, stop_tokens=[]).tokens for p in prompts]
    with load(path, kv_tokens=SMALL) as model:
        for prompt in prompts:
            stream = model.stream(prompt, max_new_tokens=60, stop_tokens=[])
            model._submit([stream._output.request])
            stream._started = True
            for _ in range(rng.randint(0, 60)):
                model._advance(1)
            stream.close()
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert model.generate(prompt, max_new_tokens=60, stop_tokens=[]).tokens == tokens


@pytest.fixture(scope="module")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONELAUNCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        host.kernel_folder.cache_clear()
        library = toy.compiled(tmp_path_factory.mktemp("toy"))
        yield toy.write_artifact(tmp_path_factory.mktemp("artifact") / "toy", library)
    host.kernel_folder.cache_clear()


def test_an_error_in_the_middle_leaves_the_others_right(toy_path: Path) -> None:
    stem = [i % 250 for i in range(200)]
    with load(toy_path) as model:
        other = model.stream([*stem, 1], max_new_tokens=60, stop_tokens=[])
        next(other)
        with pytest.raises(VerifyError, match="not-a-number"):
            model.generate([*stem, NAN], max_new_tokens=20)
        assert list(other)
        assert other.result.tokens == answer([*stem, 1], 60)
        for end in (2, 3):
            result = model.generate([*stem, end], max_new_tokens=30, stop_tokens=[])
            assert result.tokens == answer([*stem, end], 30)
        assert result.reused_tokens == 192


def test_a_conversation_reads_only_what_is_new(toy_path: Path) -> None:
    with load(toy_path) as model:
        text: list[int] = []
        for turn in range(4):
            text += [turn + 1] * 70
            result = model.generate(text, max_new_tokens=30, stop_tokens=[])
            assert result.tokens == answer(text, 30)
            assert result.reused_tokens == max(0, 100 * turn - 1) // 64 * 64
            assert result.timings.prompt_per_second > 0
            text += result.tokens


def test_a_stop_string_and_a_burst_past_it_keep_what_was_computed(toy_path: Path) -> None:
    prompt = list(range(100))
    full = answer(prompt, 80)
    with load(toy_path) as model:
        stop = bytes(t for t in full[30:34] if t < 256).decode("utf-8", "replace")
        model.generate(prompt, max_new_tokens=80, stop=stop, stop_tokens=[])
        result = model.generate([*prompt, *full[:40]], max_new_tokens=40, stop_tokens=[])
        assert result.tokens == full[40:]


def test_off_by_a_switch(toy_path: Path) -> None:
    with load(toy_path, prefix_cache=False) as model:
        for _ in range(2):
            assert model.generate([3] * 200, max_new_tokens=4, stop_tokens=[]).reused_tokens == 0
