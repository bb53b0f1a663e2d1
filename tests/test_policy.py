"""`--quant` with a policy file: which matrix gets what, and what is refused."""

from __future__ import annotations

import pytest
from checkpoints import save_random
from tiny import tiny

from onelaunch.compiler import driver
from onelaunch.compiler.lowering import Dump
from onelaunch.ir.errors import CompileError
from onelaunch.ir.text import parse_program
from onelaunch.passes.policy import Policy, parse_policy, schemes, split_kinds

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


def test_a_policy_file_gives_each_layers_matrices_their_formats(tmp_path):
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    save_random(tmp_path / "model", "qwen3", tie_word_embeddings=False, **sizes)
    (tmp_path / "p.toml").write_text(POLICY)
    request = driver.Request(tmp_path / "model", tmp_path / "a", quant=str(tmp_path / "p.toml"), fit_context=True)
    dump = Dump(stop_after="quantize")
    assert driver.compile_model(request, dump) is None
    program = parse_program(next(text for name, text in dump.texts.items() if "quantize" in name))
    found = {f"{i}.{w.name[2:]}": w.tensor.dtype for g, i in program.sections() for w in g.weights}
    wanted = {"0.q": "q8_0", "0.down": "q8_0", "1.q": "nvfp4", "1.down": "mxfp4", "2.v": "fp8", "2.o": "f32"}
    assert wanted.items() <= found.items()
    assert found["-1.embed"] == "nvfp4"
    assert len(program.kinds) == 2


def test_a_pattern_that_names_nothing_is_refused(tmp_path):
    save_random(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "p.toml").write_text('[tensors]\n"*.dwn" = "int8"\n')
    request = driver.Request(tmp_path / "model", tmp_path / "a", quant=str(tmp_path / "p.toml"), fit_context=True)
    with pytest.raises(CompileError, match=r"pattern `\*.dwn` names no matrix"):
        driver.compile_model(request)
