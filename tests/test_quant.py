"""Rounded weights against transformers run on the same weights, as the formats' own meaning has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from onelaunch.compiler.build import LEVELS
from onelaunch.compiler.driver import quantization
from onelaunch.ir.errors import UsageError
from onelaunch.ir.formats import FORMATS, decode, quantize
from onelaunch.passes.quantize import SCHEMES
from onelaunch.runtime import load
from onelaunch.tests.checkpoints import save_random
from onelaunch.tests.compiled import all_logits, host_targets, relative_errors
from onelaunch.tests.tiny import tiny

LENGTH = 100
LIMITS = {"rows": 64, "slots": 1, "context": 128, "outputs": 64, "kv_dtype": "f32"}
CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 160, "intermediate_size": 352, "vocab_size": 259, "head_dim": 32,
    "num_attention_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is compiled, and the bounds on relative errors, about one and a half times what was measured.

    exact: of any row, against activations that are not rounded. alike: of the best third of the rows, against
    activations rounded as ours are; in the others a value fell to the other side of a rounding.
    """

    scheme: str
    exact: float
    alike: float
    target: str = "auto"
    config: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)


CASES = {
    "int4": Case("int4", 0.06, 1e-5),
    "int8": Case("int8", 0.05, 1e-5),
    "bf16": Case("bf16", 0.02, 4e-3),
    "bf16 without its dot": Case("bf16", 1e-5, 1e-5, "cpu-avx2"),
    "int4 portable": Case("int4", 0.06, 1e-5, "cpu-portable"),
    "int8, bf16 cache": Case("int8", 0.05, 0.04, limits={"kv_dtype": "bf16"}),
    "int4 where rows are whole blocks": Case("int4", 0.04, 1e-5, config={"hidden_size": 72}),
}
COSINE = 0.999  # the least of any row, against activations that are not rounded


def fits(weight: torch.nn.Parameter, scheme: str) -> bool:
    return weight.ndim == 2 and (scheme == "bf16" or weight.shape[1] % 32 == 0)


@torch.no_grad()
def round_weights(hf: torch.nn.Module, scheme: str) -> None:
    """Every matrix to the format and back, in place."""
    fmt = FORMATS[SCHEMES[scheme]]
    for weight in hf.parameters():
        if fits(weight, scheme):
            weight.copy_(torch.from_numpy(decode(fmt, quantize(fmt, weight.numpy()), weight.shape[1])))


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """What a matrix of integer codes reads: int8 with a scale per 32."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(-2)


def round_activations(hf: torch.nn.Module, scheme: str, level: int) -> None:
    """Make every matrix read what ours reads; bf16 is read as float32 where there is no dot of bf16."""
    change = to_int8 if scheme != "bf16" else lambda x: x.bfloat16().float() if level == 2 else x
    for module in hf.modules():
        if isinstance(module, torch.nn.Linear) and fits(module.weight, scheme):
            module.register_forward_pre_hook(lambda _, args: (change(args[0]),))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest cosine of any row."""
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_rounded_weights_compute_what_transformers_computes_with_them(case, compiled, tmp_path):
    if case.target not in ("auto", *host_targets()):
        pytest.skip("this machine cannot run it")
    hf = save_random(tmp_path, "qwen3", gain=1.0, **{**CONFIG, **case.config})
    tokens = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], LENGTH).tolist()
    limits = {**LIMITS, **case.limits}
    with load(compiled(tmp_path, target=case.target, quant=case.scheme, limits=limits)) as model:
        got, level = all_logits(model, tokens, LIMITS["rows"]), LEVELS[model.target].number
    round_weights(hf, case.scheme)
    exact = hf(torch.tensor([tokens])).logits[0].numpy()
    round_activations(hf, case.scheme, level)
    alike = hf(torch.tensor([tokens])).logits[0].numpy()
    assert cosine(got, exact) >= COSINE
    assert relative_errors(got, exact).max() <= case.exact
    assert np.sort(relative_errors(got, alike))[LENGTH // 3] <= case.alike


def test_a_checkpoint_that_is_quantised_already_is_refused():
    with pytest.raises(UsageError, match="--quant int4: expected matrices of f32, f16, bf16, got q8_0"):
        quantization(tiny("llama", "q8_0").program, "int4")
    quantization(tiny("llama", "bf16").program, "int4")
