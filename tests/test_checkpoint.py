"""Hugging Face checkpoints: what the reader gives, and what it refuses by name."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import edit_config, save_gguf, save_hf
from safetensors.numpy import save_file

from onelaunch.ir.errors import LoadError
from onelaunch.models.open import open_checkpoint

FAMILIES = {
    "llama": ("Llama", "llama"),
    "mistral": ("Mistral", "llama"),
    "qwen2": ("Qwen2", "qwen2"),
    "qwen3": ("Qwen3", "qwen3"),
    "gemma3_text": ("Gemma3", "gemma3"),
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hf_tensors_are_what_transformers_saved(tmp_path, model_type, dtype):
    model = save_hf(tmp_path, model_type, dtype, shard="40KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source == "hf"
    assert checkpoint.family == FAMILIES[model_type][1]
    assert len(checkpoint.files) > 1
    state = model.state_dict()
    assert set(state) - set(checkpoint.tensors) <= {"lm_head.weight"}
    for name, info in checkpoint.tensors.items():
        array = checkpoint.read(name)
        assert not array.flags.writeable
        assert array.shape == info.shape
        np.testing.assert_array_equal(array.astype(np.float32), state[name].float().numpy())
    assert checkpoint.read("model.norm.weight").dtype == {
        torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32
    }[dtype]  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hf_hyper_names_are_canonical(tmp_path, model_type):
    save_hf(tmp_path, model_type)
    hyper = open_checkpoint(tmp_path).hyper
    gemma = model_type == "gemma3_text"
    expected = {
        "layers": 7, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 64, "vocab": 48,
        "context": 512, "eps": 1e-6, "tied": gemma, "norm_plus_one": gemma, "qk_permuted": False,
        "qk_norm": model_type in ("qwen3", "gemma3_text"), "qkv_bias": model_type == "qwen2", "o_bias": False,
        "activation": "gelu_tanh" if gemma else "silu", "embed_scale": 32**0.5 if gemma else 1.0,
        "query_scale": 256**-0.5 if gemma else 16**-0.5, "logit_softcap": 0.0, "attn_softcap": 0.0,
    }  # fmt: skip
    assert {name: hyper[name] for name in expected} == expected
    assert hyper["rope"]["theta"] == (1e6 if gemma else 1e4)
    assert hyper["rope"]["local_theta"] == 1e4
    assert hyper["rope"]["scaling"] == hyper["rope"]["local_scaling"] == {"rope_type": "default"}
    local = {"gemma3_text": "LLLLLGL", "mistral": "LLLLLLL"}.get(model_type, "GGGGGGG")
    assert "".join(kind[0].upper() for kind in hyper["layer_kinds"]) == local
    assert hyper["window"] == (4096 if "L" in local else 0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_spellings_of_a_config_give_the_same_hyper(tmp_path, model_type):
    save_hf(tmp_path, model_type, eos_token_id=[1, 5])
    modern = open_checkpoint(tmp_path).hyper
    gemma = model_type == "gemma3_text"
    old = (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
        if gemma
        else {"rope_theta": 1e4}
    )
    removed = ("rope_parameters", "dtype", "layer_types", "_sliding_window_pattern")
    edit_config(tmp_path, removed, torch_dtype="bfloat16", rope_scaling=None, **old)
    assert open_checkpoint(tmp_path).hyper == modern


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_read_in_both_spellings(tmp_path, spelling):
    save_hf(tmp_path)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 128
    edit_config(tmp_path, ("rope_parameters",), rope_theta=5e5, **{spelling: scaling})
    rope = open_checkpoint(tmp_path).hyper["rope"]
    assert rope["theta"] == 5e5
    assert rope["scaling"] == scaling


def test_gemma_scaling_reaches_global_layers_only(tmp_path):
    save_hf(tmp_path, "gemma3_text")
    edit_config(tmp_path, ("rope_parameters",), rope_scaling={"rope_type": "linear", "factor": 8.0})
    rope = open_checkpoint(tmp_path).hyper["rope"]
    assert rope["scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert rope["local_scaling"] == {"rope_type": "default"}


def test_qwen_window_starts_at_its_layer(tmp_path):
    save_hf(tmp_path, "qwen2")
    edit_config(tmp_path, ("layer_types",), use_sliding_window=True, sliding_window=64, max_window_layers=5)
    hyper = open_checkpoint(tmp_path).hyper
    assert hyper["layer_kinds"] == ("global",) * 5 + ("local",) * 2
    assert hyper["window"] == 64


def test_generation_config_adds_stop_tokens(tmp_path):
    save_hf(tmp_path, eos_token_id=1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert open_checkpoint(tmp_path).hyper["eos"] == (1, 7)


REFUSED = [
    ({"mlp_bias": True}, "`mlp_bias`"),
    ({"hidden_act": "relu"}, "`hidden_act`"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "`dynamic`"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}, "rope_parameters": None}, "`longrope`"),
    ({"final_logit_softcapping": 30.0}, "`final_logit_softcapping`"),
    ({"num_experts": 8}, "`num_experts`"),
    ({"num_local_experts": 8}, "`num_local_experts`"),
    ({"quantization_config": {"quant_method": "awq"}}, "`quantization_config`"),
    ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor`"),
    ({"num_key_value_heads": 3}, "`num_key_value_heads`"),
    ({"num_hidden_layers": 0}, "`num_hidden_layers`"),
    ({"hidden_size": "32"}, "`hidden_size`"),
    ({"rms_norm_eps": float("nan")}, "`rms_norm_eps`"),
    ({"torch_dtype": "float8_e4m3fn", "dtype": None}, "`dtype`"),
    ({"eos_token_id": "x"}, "`eos_token_id`"),
    ({"tie_word_embeddings": "no"}, "`tie_word_embeddings`"),
    ({"mystery": 3}, "unknown config field `mystery`"),
    ({"model_type": "mamba"}, "got `mamba`"),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": None, "max_window_layers": 1,
      "layer_types": ["sliding_attention"] * 7}, "`sliding_window`"),
    ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 7}, "`layer_types`"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_config_fields_we_do_not_implement_are_refused_by_name(tmp_path, changes, reason):
    save_hf(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(LoadError) as caught:
        open_checkpoint(tmp_path, ignore=frozenset({"mlp_bias", "num_experts"}))
    assert reason in str(caught.value)


def test_all_reasons_come_at_once_and_ignore_lets_unknown_fields_pass(tmp_path):
    save_hf(tmp_path)
    edit_config(tmp_path, mlp_bias=True, mystery=3, hidden_act="relu", riddle=None)
    with pytest.raises(LoadError) as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.reasons) == 4
    assert "--ignore-config" in caught.value.hint
    edit_config(tmp_path, mlp_bias=False, hidden_act="silu")
    assert open_checkpoint(tmp_path, ignore=frozenset({"mystery", "riddle"})).family == "llama"


def test_gemma3_with_images_is_refused_and_plain_is_read(tmp_path):
    save_hf(tmp_path, "gemma3_text")
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "architectures": ["Gemma3ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert open_checkpoint(tmp_path).family == "gemma3"
    (tmp_path / "config.json").write_text(json.dumps(whole | {"vision_config": {}}))
    with pytest.raises(LoadError, match="images"):
        open_checkpoint(tmp_path)


def test_unknown_dtype_is_a_problem_not_a_crash(tmp_path):
    save_hf(tmp_path)
    tensors = {"model.extra": np.zeros((2, 2), np.int64), "model.plain": np.ones((2, 2), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.problems == ("tensor `model.extra`: dtype `I64` is not supported",)
    assert checkpoint.tensors["model.extra"].format == "I64"
    for name, reason in (("model.extra", "`I64` is not supported"), ("model.none", "no tensor `model.none`")):
        with pytest.raises(LoadError, match=reason):
            checkpoint.read(name)


def test_places_that_are_not_checkpoints_are_told_apart(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    for place, reason in (
        (tmp_path, "got neither"),
        (tmp_path / "no", "does not exist"),
        (tmp_path / "readme.txt", "magic"),
    ):
        with pytest.raises(LoadError, match=reason):
            open_checkpoint(place)
    save_gguf(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).source == "gguf"
    save_gguf(tmp_path / "b.gguf")
    with pytest.raises(LoadError, match=r"got 2: `a.gguf`, `b.gguf`"):
        open_checkpoint(tmp_path)
    save_hf(tmp_path)
    assert open_checkpoint(tmp_path).source == open_checkpoint(tmp_path / "model.safetensors").source == "hf"
    (tmp_path / "a.gguf").unlink()
    (tmp_path / "b.gguf").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="pickled"):
        open_checkpoint(tmp_path)
