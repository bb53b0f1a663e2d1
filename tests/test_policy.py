"""`--quant` with a policy file: which matrix gets what, what is refused, and that it computes what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import save_random
from test_quant import to_int8
from tiny import tiny

from onelaunch.compiler import driver
from onelaunch.ir.errors import CompileError
from onelaunch.ir.formats import FORMATS, decode, quantize
from onelaunch.ir.limits import Limits
from onelaunch.passes.policy import Policy, parse_policy, schemes, split_kinds
from onelaunch.passes.quantize import SCHEMES
from onelaunch.runtime import load
from onelaunch.tests.compiled import all_logits, relative_errors

POLICY = """
default = "nvfp4"
[tensors]
"0.*" = "int8"
"*.down" = "mxfp4"
"*.o" = "keep"
"*.v" = "fp8"
"""


def test_the_first_pattern_that_matches_decides():
    policy = Policy("nvfp4", {"head": "int8", "0.*": "fp8", "*.down": "keep"})
    found = [policy.scheme(key) for key in ("head", "0.down", "1.down", "1.q")]
    assert found == ["int8", "fp8", "", "nvfp4"]


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"default": "int5"}, "`default`: expected one of int4, .*, keep, got `int5`"),
        ({"tensors": {"*.q": "nvfp5"}}, "`nvfp5` .*nvfp4"),
        ({"defaults": "int4"}, "unknown name `defaults`"),
        ({"tensors": "int4"}, "`tensors`: expected"),
    ],
)
def test_a_damaged_policy_is_refused_by_name(tables, reason):
    with pytest.raises(CompileError, match=reason):
        parse_policy(tables, "policy.toml")


def test_layers_that_differ_become_kinds_of_their_own():
    program = tiny("llama", "f32").program
    assert split_kinds(program, lambda key: "") == program
    policy = Policy("", {"0.q": "int8"})
    found = split_kinds(program, policy.scheme)
    assert len(set(found.layers)) == len(set(program.layers)) + 1
    of = [schemes(found, policy)[name]["w.q"] for name in found.layers]
    assert of == ["int8", *[""] * (len(of) - 1)]


@torch.no_grad()
def test_compiled_by_a_policy_it_computes_what_transformers_computes_with_those_weights(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "vocab_size": 131, "head_dim": 32}
    hf = save_random(tmp_path / "model", "qwen3", gain=1.0, tie_word_embeddings=False, **sizes)
    file, artifact = tmp_path / "policy.toml", tmp_path / "a"
    file.write_text(POLICY + '"embed" = "keep"\n"head" = "keep"\n')
    limits = Limits(rows=64, slots=1, context=128, outputs=64, kv_dtype="f32")
    driver.compile_model(driver.Request(tmp_path / "model", artifact, "auto", limits, (2,), str(file)))
    tokens = np.random.default_rng(3).integers(0, 131, 60).tolist()
    with load(artifact) as model:
        got = all_logits(model, tokens, 64)
    policy = Policy("nvfp4", {"0.*": "int8", "*.down": "mxfp4", "*.o": "keep", "*.v": "fp8"})
    for i, layer in enumerate(hf.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                scheme = policy.scheme(f"{i}.{name.rpartition('.')[2].removesuffix('_proj')}")
                if scheme:
                    fmt = FORMATS[SCHEMES[scheme]]
                    rounded = decode(fmt, quantize(fmt, module.weight.numpy()), module.in_features)
                    module.weight.copy_(torch.from_numpy(rounded))
                if scheme and not fmt.dense:
                    module.register_forward_pre_hook(lambda _, args: (to_int8(args[0]),))
    expected = hf(torch.tensor([tokens])).logits[0].numpy()
    assert np.sort(relative_errors(got, expected))[len(tokens) // 3] <= 1e-5


def test_a_pattern_that_names_nothing_is_refused(tmp_path):
    save_random(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "p.toml").write_text('[tensors]\n"*.dwn" = "int8"\n')
    request = driver.Request(tmp_path / "model", tmp_path / "a", quant=str(tmp_path / "p.toml"), fit_context=True)
    with pytest.raises(CompileError, match=r"pattern `\*.dwn` names no matrix"):
        driver.compile_model(request)
