"""Every family against Hugging Face transformers, float32 on both sides, on tiny checkpoints of odd shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onelaunch.runtime import Model, load
from onelaunch.tests.checkpoints import save_random
from onelaunch.tests.compiled import all_logits, host_targets, relative_errors

LIMITS = {"rows": 64, "slots": 2, "context": 384, "outputs": 64, "kv_dtype": "f32"}
PROMPT, NEW = 280, 64  # past a 256-token split, past every window and the ring of pages behind it
ERROR = 2e-3

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"hidden_size": 84, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 7,
         "num_key_value_heads": 1, "head_dim": 80, "vocab_size": 50001, "tie_word_embeddings": False},
    ),
    "llama tied, rope linear": (
        "llama",
        {"num_hidden_layers": 2, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama, rope llama3": (
        "llama",
        {"num_hidden_layers": 2, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 5e5}},
    ),
    "llama, rope yarn": (
        "llama",
        {"num_hidden_layers": 2, "rope_parameters": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}},
    ),
    "mistral": ("mistral", {"num_hidden_layers": 3, "head_dim": 24, "vocab_size": 131, "sliding_window": 40}),
    "qwen2": (
        "qwen2",
        {"hidden_size": 896, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 14,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 321, "tie_word_embeddings": True},
    ),
    "qwen2, upper layers windowed": (
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
    ),
    "qwen3": (
        "qwen3",
        {"hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
         "head_dim": 80, "tie_word_embeddings": False},
    ),
    "gemma3": (
        "gemma3_text",
        {"hidden_size": 72, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 32, "sliding_window": 33, "query_pre_attn_scalar": 2, "vocab_size": 99},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"hidden_size": 96, "num_hidden_layers": 2, "num_experts": 60, "num_experts_per_tok": 4,
         "moe_intermediate_size": 48, "norm_topk_prob": True, "tie_word_embeddings": False},
    ),
    "qwen3_moe, gates as they are": (
        "qwen3_moe",
        {"hidden_size": 288, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2,
         "moe_intermediate_size": 80, "vocab_size": 131, "tie_word_embeddings": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"hidden_size": 96, "num_hidden_layers": 2, "num_experts": 60, "num_experts_per_tok": 4,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 72},
    ),
    "mixtral": ("mixtral", {"num_hidden_layers": 2, "num_local_experts": 8, "sliding_window": 40}),
    "mixtral, all experts": (
        "mixtral", {"num_hidden_layers": 2, "hidden_size": 192, "num_local_experts": 3, "num_experts_per_tok": 3},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"hidden_size": 192, "intermediate_size": 96, "num_hidden_layers": 3, "num_local_experts": 32,
         "num_experts_per_tok": 4, "sliding_window": 33},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A compiled model and what transformers computes from the same checkpoint."""

    model: Model
    hf: torch.nn.Module
    prompt: list[int]


def random_prompt(vocab: int) -> list[int]:
    return np.random.default_rng(1).integers(0, vocab, PROMPT).tolist()


@pytest.fixture(scope="module", params=CASES)
def pair(request, compiled, tmp_path_factory):
    model_type, config = CASES[request.param]
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    hf = save_random(folder, model_type, **config)
    prompt = random_prompt(hf.config.vocab_size)
    with load(compiled(folder, limits=LIMITS), threads=2) as model:
        yield Pair(model, hf, prompt)


@torch.no_grad()
def test_logits_of_every_position_are_those_of_transformers(pair):
    expected = pair.hf(torch.tensor([pair.prompt])).logits[0].numpy()
    assert relative_errors(all_logits(pair.model, pair.prompt, LIMITS["rows"]), expected).max() <= ERROR


@torch.no_grad()
def test_sixty_four_greedy_tokens_are_those_of_transformers(pair):
    tokens = torch.tensor([pair.prompt])
    mask = torch.ones_like(tokens)  # else a token 0 in the prompt counts as padding
    out = pair.hf.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    expected = out[0, PROMPT:].tolist()
    assert len(set(expected)) >= 8, "a text that repeats itself shows little"
    assert pair.model.generate(pair.prompt, max_new_tokens=NEW, stop_tokens=()).tokens == expected


@pytest.mark.parametrize("target", host_targets())
@torch.no_grad()
def test_every_isa_level_computes_the_same_model(target, compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model_type, config = CASES["gemma3"]
    hf = save_random(folder, model_type, **config)
    prompt = random_prompt(hf.config.vocab_size)
    expected = hf(torch.tensor([prompt])).logits[0].numpy()
    with load(compiled(folder, target=target, limits=LIMITS), target=target) as model:
        assert relative_errors(all_logits(model, prompt, LIMITS["rows"]), expected).max() <= ERROR
