"""Mixtures of experts from other sources than plain Hugging Face tensors, and what is refused of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from moe_checkpoints import ROUTERS, as_gguf, other_router, to_mxfp4

from onelaunch.compiler.check.reference_weights import ReferenceWeights
from onelaunch.compiler.check.verify import verify_artifact
from onelaunch.compiler.driver import Request, compile_imported
from onelaunch.compiler.weights import pack_one, packed_weights
from onelaunch.ir.errors import LoadError
from onelaunch.ir.limits import Limits
from onelaunch.ir.reference import ReferenceModel, RowBatch
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.models.random import random_checkpoint
from onelaunch.passes import GRAPH_PASSES, Options
from onelaunch.runtime import load
from onelaunch.tests.checkpoints import edit_config, save_random
from onelaunch.tests.compiled import all_logits, relative_errors
from onelaunch.tests.test_families import CASES, ERROR, LIMITS

TOKENS = np.random.default_rng(1).integers(0, 48, 90).tolist()
OSS = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_local_experts": 8,
       "num_experts_per_tok": 4, "sliding_window": 33}  # fmt: skip


def logits_of(path) -> np.ndarray:
    """By the reference executor."""
    imported = import_checkpoint(open_checkpoint(path))
    model = ReferenceModel(imported.program, ReferenceWeights(imported, imported.program), 1, 128)
    rows = [(token, 0, i) for i, token in enumerate(TOKENS)]
    return model.step(RowBatch.of(rows, range(len(rows)))).logits.numpy()


@torch.no_grad()
def expected_of(hf) -> np.ndarray:
    return hf(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("case", ["qwen3_moe", "qwen2_moe", "mixtral, all experts", "gpt_oss"])
def test_a_gguf_is_the_model_it_was_made_of(case, compiled, tmp_path):
    hf = save_random(tmp_path, *CASES[case][:1], **CASES[case][1])
    path = as_gguf(tmp_path, tmp_path / "model.gguf")
    with load(compiled(path, limits=LIMITS), threads=2) as model:
        assert relative_errors(all_logits(model, TOKENS, 32), expected_of(hf)).max() <= ERROR


@pytest.fixture(scope="module")
def oss(tmp_path_factory):
    """gpt-oss with experts in MXFP4, from both kinds of file, and what transformers makes of the same numbers."""
    folder = tmp_path_factory.mktemp("oss")
    hf = save_random(folder, "gpt_oss", **OSS)
    path = as_gguf(folder, folder / "model.gguf", "mxfp4")
    to_mxfp4(folder, hf)
    return folder, path, hf


def test_mxfp4_means_the_same_in_both_kinds_of_file(oss):
    folder, path, hf = oss
    for source in (folder, path):
        assert relative_errors(logits_of(source), expected_of(hf)).max() <= 1e-4


def test_mxfp4_of_both_kinds_of_file_packs_to_the_same_bytes(oss):
    packed = []
    for source in oss[:2]:
        imported = import_checkpoint(open_checkpoint(source))
        program = imported.program
        for _, run in GRAPH_PASSES:
            program = program.map(lambda graph, run=run: run(graph, Options()))
        weights = [w for w in packed_weights(program) if w.experts > 1]
        assert {w.type.dtype for w in weights} == {"mxfp4"}
        packed.append([pack_one(w, imported) for w in weights])
    assert all(np.array_equal(a, b) for a, b in zip(*packed, strict=True))


def test_compiled_mxfp4_computes_what_its_phases_mean(oss, compiled):
    folder = oss[0]
    artifact = compiled(folder, limits=LIMITS)
    checks = verify_artifact(artifact, folder, "", 4, 2, True, lambda text: None).checks
    assert {c.name: c.passed for c in checks if c.name in ("weights", "phases")} == {"weights": True, "phases": True}


@pytest.mark.parametrize("router", ROUTERS)
def test_other_routers_and_a_shared_expert_without_a_gate(router, tmp_path):
    """As DeepSeek V3's and V2's; against the reference executor, as no family of ours has them yet."""
    family = other_router(router)
    checkpoint = random_checkpoint(family, {"experts": 12, "experts_used": 3, "hidden": 96, "qk_norm": False})
    imported = import_checkpoint(checkpoint, family)
    request = Request(tmp_path, tmp_path / "made", limits=Limits(**LIMITS), workers=(2,))
    model = ReferenceModel(imported.program, ReferenceWeights(imported, imported.program), 1, 128)
    rows = [(token, 0, i) for i, token in enumerate(TOKENS)]
    expected = model.step(RowBatch.of(rows, range(len(rows)))).logits.numpy()
    compile_imported(imported, request)
    with load(tmp_path / "made") as opened:
        assert relative_errors(all_logits(opened, TOKENS, 32), expected).max() <= ERROR


# ---- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "`decoder_sparse_step`: expected 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"`mlp_only_layers`: expected \[\]"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "`num_experts_per_tok`: expected at most the 4 experts"),
        ("qwen3_moe", {"num_experts": 5}, "`num_local_experts`: expected the 5 of `num_experts`"),
        ("qwen2_moe", {"qkv_bias": False}, "`qkv_bias`: expected true"),
        ("mixtral", {"num_local_experts": 0}, "`num_local_experts`: expected an integer of 1"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "`quant_method` mxfp4"),
        ("gpt_oss", {"attention_bias": False}, "`attention_bias`: expected true"),
        ("gpt_oss", {"swiglu_limit": -1.0}, "`swiglu_limit`: expected a positive number"),
        ("gpt_oss", {"experts_per_token": 3}, "`experts_per_token`: expected the value of"),
        ("llama", {"num_local_experts": 4}, "`num_local_experts`: expected `0`"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(model_type, changes, reason, tmp_path):
    experts = {"num_experts": 4} if model_type.startswith("qwen") else {"num_local_experts": 4}
    extra = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    save_random(tmp_path, model_type, num_hidden_layers=1, **({} if model_type == "llama" else experts | extra))
    edit_config(tmp_path, remove=("moe_intermediate_size",) if model_type in ("mixtral", "gpt_oss") else ())
    edit_config(tmp_path, remove=("shared_expert_intermediate_size",) if model_type != "qwen2_moe" else (), **changes)
    with pytest.raises(LoadError, match=reason):
        open_checkpoint(tmp_path)


def small_moe(folder):
    return save_random(
        folder, "qwen3_moe", num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )


def test_experts_that_are_missing_are_named(tmp_path):
    small_moe(tmp_path)
    edit_config(tmp_path, num_local_experts=5)
    with pytest.raises(LoadError, match=r"missing tensor `model.layers.0.mlp.experts.4.gate_proj.weight`"):
        import_checkpoint(open_checkpoint(tmp_path))


def test_experts_that_are_left_over_are_named(tmp_path):
    small_moe(tmp_path)
    edit_config(tmp_path, num_local_experts=3)
    with pytest.raises(LoadError, match=r"`model.layers.0.mlp.experts.3.down_proj.weight` is used by no weight"):
        import_checkpoint(open_checkpoint(tmp_path))


def test_gpt_oss_blocks_without_their_scales_are_named(oss, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(oss[0] / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((oss[0] / "config.json").read_text())))
    with pytest.raises(LoadError, match=r"`model.layers.0.mlp.experts.down_proj`: format `U8 blocks` is not supported"):
        import_checkpoint(open_checkpoint(tmp_path))
