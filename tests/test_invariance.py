"""A row's logits depend on its own sequence alone, to the last bit.

Not on the other rows of the step, the slot, how its prompt was cut into steps (1 row or 80: other schedules,
other kernels), the number of threads, nor where a ring of cache pages begins. Contexts pass a 256-token split
and every window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from onelaunch.ir.sampling import Sampling, sample
from onelaunch.runtime import Model, load
from onelaunch.tests.checkpoints import save_random
from onelaunch.tests.compiled import all_logits, host_targets

ROWS, SLOTS, LENGTH = 80, 4, 300
LIMITS = {"rows": ROWS, "slots": SLOTS, "context": 384, "outputs": ROWS}
THREADS = (1, 2, 4, 8)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: quant, model type, config
    "bf16 mistral": ("", "mistral", {"num_hidden_layers": 2, "sliding_window": 40, "hidden_size": 72}),
    "int8 qwen2": (
        "int8",
        "qwen2",
        {"num_hidden_layers": 2, "hidden_size": 224, "num_attention_heads": 14, "intermediate_size": 352},
    ),
    "int4 gemma3": (
        "int4",
        "gemma3_text",
        {"hidden_size": 96, "sliding_window": 33, "head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "int4 qwen3_moe": (
        "int4",
        "qwen3_moe",
        {"hidden_size": 96, "num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 3,
         "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "int8 qwen2_moe": (
        "int8",
        "qwen2_moe",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 20, "num_experts_per_tok": 4,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    ),
    "bf16 gpt_oss": (
        "",
        "gpt_oss",
        {"hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 2, "num_local_experts": 8,
         "num_experts_per_tok": 2, "sliding_window": 40},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A model and the logits [LENGTH, vocab] of one prompt per slot, each read alone, 80 rows a step."""

    artifact: Any
    model: Model
    prompts: list[list[int]]
    logits: list[np.ndarray]


def make(compiled, folder, case: str, target: str = "auto") -> Any:
    quant, model_type, config = CASES[case]
    save_random(folder, model_type, torch.bfloat16, **config)
    return compiled(folder, target=target, quant=quant, workers=THREADS, limits=LIMITS)


def prompts_of(model: Model) -> list[list[int]]:
    return np.random.default_rng(2).integers(0, model.vocab, (SLOTS, LENGTH)).tolist()


@pytest.fixture(scope="module", params=CASES)
def case(request, compiled, tmp_path_factory):
    artifact = make(compiled, tmp_path_factory.mktemp("checkpoint"), request.param)
    with load(artifact, threads=2) as model:
        prompts = prompts_of(model)
        yield Compiled(artifact, model, prompts, [all_logits(model, p, ROWS) for p in prompts])


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.flatnonzero((got.view(np.int32) != expected.view(np.int32)).any(axis=-1))
    assert not len(wrong), f"{len(wrong)} of {len(got)} rows differ, first at {wrong[:5]}"


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 9, 31, 32, 33, 64])
def test_chunks_of_the_prompt_do_not_matter(case, chunk):
    assert_same_bits(all_logits(case.model, case.prompts[0], chunk), case.logits[0])


@pytest.mark.parametrize("threads", THREADS)
def test_the_number_of_threads_does_not_matter(case, threads):
    with load(case.artifact, threads=threads) as model:
        assert_same_bits(all_logits(model, case.prompts[0], ROWS), case.logits[0])
        assert_same_bits(all_logits(model, case.prompts[0][:40], 5), case.logits[0][:40])


def test_the_same_prompt_in_every_slot_gives_the_same_bits(case):
    case.model.reset()
    for chunk, start, end in ((20, 0, 240), (1, 240, 270), (2, 270, 300)):
        for first in range(start, end, chunk):
            tokens = case.prompts[0][first : first + chunk] * SLOTS
            slots = np.repeat(range(SLOTS), chunk)
            positions = np.tile(np.arange(first, first + chunk), SLOTS)
            got = case.model.step(tokens, slots, positions, range(len(tokens)))
            for rows in got.reshape(SLOTS, chunk, -1):
                assert_same_bits(rows, case.logits[0][first : first + chunk])


def random_steps(case: Compiled, model: Model, seed: int) -> None:
    """Read all prompts side by side in random pieces, slots in random order, with some rows' logits."""
    random = np.random.default_rng(seed)
    prompt_of, done = random.permutation(SLOTS), [0] * SLOTS
    model.reset()
    while min(done) < LENGTH:
        left = int(random.choice([4, 8, 9, 33, ROWS]))
        rows: list[tuple[int, int]] = []  # slot, position
        for slot in map(int, random.permutation(SLOTS)):
            count = int(min(random.integers(0, left + 1), LENGTH - done[slot]))
            rows += [(slot, done[slot] + i) for i in range(count)]
            done[slot] += count
            left -= count
        if not rows:
            continue
        outputs = random.permutation(len(rows))[: random.integers(0, len(rows) + 1)]
        tokens = [case.prompts[prompt_of[slot]][position] for slot, position in rows]
        got = model.step(tokens, *zip(*rows, strict=True), outputs)
        expected = [case.logits[prompt_of[rows[row][0]]][rows[row][1]] for row in outputs]
        if expected:
            assert_same_bits(got, np.stack(expected))


@pytest.mark.parametrize("seed", range(3))
def test_other_rows_of_the_step_do_not_matter(case, seed):
    random_steps(case, case.model, seed)


@pytest.mark.parametrize("name", ["int4 gemma3", "int4 qwen3_moe"])
@pytest.mark.parametrize("target", host_targets()[1:])
def test_the_other_isa_levels_keep_rows_apart_too(target, name, compiled, tmp_path_factory):
    artifact = make(compiled, tmp_path_factory.mktemp("checkpoint"), name, target)
    with load(artifact, threads=2, target=target) as model:
        prompts = prompts_of(model)
        alone = Compiled(artifact, model, prompts, [all_logits(model, p, ROWS) for p in prompts])
        random_steps(alone, model, 0)
    with load(artifact, threads=1, target=target) as model:
        assert_same_bits(all_logits(model, prompts[0], 7), alone.logits[0])


SETTINGS = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 2.0, "seed": 5, "stop_tokens": ()}


def test_requests_give_the_same_text_alone_and_together(case):
    prompts = [p[:n] for p, n in zip(case.prompts * 2, (1, 5, 64, 200, 9, 120, 33, 2), strict=True)]
    together = [g.tokens for g in case.model.generate(prompts, max_new_tokens=24, **SETTINGS)]
    for i, prompt in enumerate(prompts):
        alone = case.model.generate(prompt, max_new_tokens=24, first_stream=i, **SETTINGS)
        assert alone.tokens == together[i]


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_generated_tokens_are_what_sampling_makes_of_the_logits(case, first):
    """The penalty counts the whole prompt from the first token on."""
    prompt, model = case.prompts[0][first : first + 12], case.model
    tokens = model.generate(prompt, max_new_tokens=20, **SETTINGS).tokens
    logits = all_logits(model, prompt + tokens, ROWS)
    how = Sampling(**{k: v for k, v in SETTINGS.items() if k != "stop_tokens"})
    seen = np.zeros(model.vocab, bool)
    seen[prompt] = True
    for i, token in enumerate(tokens, len(prompt) - 1):
        assert token == sample(logits[i], how, seen, i)
        seen[token] = True
