"""Quantised Hugging Face checkpoints: every layout is what its description says, and what is not done is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import edit_config, save_random
from quantised import LAYOUTS, ORDERED, SIZES, change_tensors, ct, nf4, put_quantised, save_quantised
from test_quant import to_int8

from onelaunch.ir.errors import LoadError
from onelaunch.ir.formats import FORMATS, decode
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.runtime import load
from onelaunch.tests.compiled import all_logits, relative_errors

EVERY = LAYOUTS | ORDERED
UNSCALED = ("mxfp4", "mxfp8", "nf4 nested")  # layouts whose scales no power of two was put to


@pytest.mark.parametrize("name", EVERY)
def test_matrices_mean_what_their_layout_says(tmp_path, name):
    meaning = save_quantised(tmp_path, EVERY[name])
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.problems
    for tensor, expected in meaning.items():
        info = checkpoint.tensors[tensor]
        assert info.shape == expected.shape
        found = decode(FORMATS[info.format], checkpoint.read(tensor), info.shape[1])
        order = checkpoint.orders.get(tensor)
        expected = expected if order is None else expected[:, order]
        if name in UNSCALED:
            expected = expected * np.float32(2.0 ** np.round(np.log2(found.std() / expected.std())))
        if EVERY[name].exact:
            assert np.array_equal(found, expected)
        else:  # one rounding more or less
            np.testing.assert_allclose(found, expected, rtol=2.0**-22, atol=0)
    assert (name in ORDERED) == (len(checkpoint.orders) > 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_a_weight_or_ignored_with_a_reason(tmp_path, name):
    save_quantised(tmp_path, LAYOUTS[name])
    ignored = import_checkpoint(open_checkpoint(tmp_path)).ignored
    assert all("activations" in reason for reason in ignored.values())
    assert len(ignored) == (7 if name.startswith("nvfp4") else 0)


CACHE_SCALES = ["self_attn.k_scale", "self_attn.v_scale", "self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale",
                "self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale", "self_attn.kv_scale",
                "self_attn.attn.v_scale"]  # fmt: skip


def test_scales_of_an_fp8_cache_are_ignored_by_name_in_every_spelling(tmp_path):
    save_quantised(tmp_path, LAYOUTS["fp8 tensor"])
    names = [f"model.layers.0.{name}" for name in CACHE_SCALES]
    change_tensors(tmp_path, lambda tensors: tensors.update({n: torch.tensor([0.5, 0.25]) for n in names}))
    ignored = import_checkpoint(open_checkpoint(tmp_path)).ignored
    assert set(ignored) == set(names)
    assert all("cache" in reason for reason in ignored.values())


def drop(suffix: str):
    def change(tensors):
        for name in [n for n in tensors if n.endswith(suffix)]:
            del tensors[name]

    return change


def put(leaf: str, make, base: str = "model.layers.0.self_attn.q_proj."):
    def change(tensors):
        tensors[base + leaf] = make(tensors.get(base + leaf))

    return change


DAMAGED = {
    "scale of the whole matrix missing": ("nvfp4", drop("weight_global_scale"), "expected one F32 scale of the whole"),
    "a scale per part of a fused one": ("nvfp4", put("weight_global_scale", lambda t: t.repeat(3)), r"got \[\[3\]\]"),
    "no scale": ("fp8 tensor", drop("weight_scale"), "expected one scale of a matrix in F8_E4M3, got none"),
    "blocks of other sizes": ("fp8 blocks", put("weight_scale_inv", lambda t: t.repeat(2, 1)), "scales of blocks"),
    "zero points with 8 bits": (
        "w8a8", put("weight_zero_point", lambda t: torch.ones(128, 1, dtype=torch.int8)), "zero points with codes of 8",
    ),
    "activations": ("nvfp4 modelopt", put("pre_quant_scale", lambda t: torch.ones(128)), "`.*pre_quant_scale`"),
    "low-rank parts": ("nvfp4 modelopt", put("svdquant_lora_a", lambda t: torch.ones(4, 128)), "low-rank parts"),
    "another table of nf4": ("nf4", put("weight.quant_map", lambda t: t.flip(0)), "expected the table of nf4"),
    "a scale in float32": ("int4 groups", put("weight_scale", lambda t: t.float()), "expected scales in F16 or BF16"),
    "zeros of another matrix": ("awq", put("qzeros", lambda t: t[:1]), "expected scales and qzeros that fit"),
    "a tensor of codes nothing uses": (
        "w8a8", put("codes", lambda t: torch.ones(4, dtype=torch.int8)), "`.*q_proj.codes` is used by no weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, what):
    name, change, reason = DAMAGED[what]
    save_quantised(tmp_path, LAYOUTS[name])
    change_tensors(tmp_path, change)
    with pytest.raises(LoadError, match=reason):
        import_checkpoint(open_checkpoint(tmp_path))


REFUSED = {
    "hadamard": ("int4 groups", {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "Hadamard"),
    "sparse": ("int4 groups", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "`sparsity_config`"),
    "method": ("int4 groups", {"quant_method": "exl3"}, "`quant_method`: expected one of .*, got `exl3`"),
    "amd": ("fp8 blocks", {"fmt": "e4m3fnuz"}, "`fmt`: expected e4m3"),
    "no block size": ("fp8 blocks", {"weight_block_size": None}, "expected `weight_block_size`"),
    "three bits": ("int4 groups", ct("pack-quantized", num_bits=3), "expected codes of 4 or 8 bits, got 3"),
    "mxfp4 of old": ("mxfp4", {"version": "0.12.2"}, "two lower than the standard"),
    "gptq bits": ("gptq v1", {"bits": 3}, "expected GPTQ of 4 bits"),
    "gptq planes": ("gptq v1", {"checkpoint_format": "gptq_p"}, "in gptq_p"),
    "gptq by module": ("gptq v1", {"dynamic": {"+:.*": {"bits": 8}}}, "`dynamic`"),
    "awq gemv": ("awq", {"version": "gemv"}, "in gemv"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_change_the_maths_are_refused_by_name(tmp_path, what):
    name, change, reason = REFUSED[what]
    save_quantised(tmp_path, LAYOUTS[name])
    edit_config(tmp_path, quantization_config=LAYOUTS[name].config | change)
    with pytest.raises(LoadError, match=reason):
        open_checkpoint(tmp_path)


def test_all_reasons_are_given_at_once(tmp_path):
    config = LAYOUTS["fp8 blocks"].config | {"transform_config": {"x": 1}}
    save_quantised(tmp_path, LAYOUTS["fp8 blocks"])
    edit_config(tmp_path, mlp_bias=True, quantization_config=config)
    change_tensors(tmp_path, drop("down_proj.weight_scale_inv"))
    with pytest.raises(LoadError) as caught:
        open_checkpoint(tmp_path)
    for word in ("mlp_bias", "Hadamard", "down_proj"):
        assert any(word in reason for reason in caught.value.reasons)


def test_fp4_of_bitsandbytes_is_refused_by_name(tmp_path):
    layout = LAYOUTS["nf4"]
    save_quantised(tmp_path, type(layout)(nf4(nested=False, kind="fp4"), layout.config))
    with pytest.raises(LoadError, match="of type nf4, got `fp4`"):
        open_checkpoint(tmp_path)


def test_settings_may_be_in_a_file_of_their_own(tmp_path):
    save_quantised(tmp_path, LAYOUTS["nvfp4 modelopt"])
    edit_config(tmp_path, remove=("quantization_config",))
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {}, "quantization": {"quant_algo": "NVFP4"}}')
    assert open_checkpoint(tmp_path).tensors["model.layers.0.mlp.up_proj.weight"].format == "nvfp4"


def test_keys_and_values_in_different_orders_are_refused_by_name(tmp_path):
    save_quantised(tmp_path, ORDERED["gptq act-order"])
    change_tensors(tmp_path, put("g_idx", lambda t: t.flip(0), "model.layers.0.self_attn.v_proj."))
    with pytest.raises(LoadError, match="weights `k` and `v`: expected columns in one order"):
        import_checkpoint(open_checkpoint(tmp_path))


# ---- compiled -----------------------------------------------------------------------------------

LIMITS = {"rows": 64, "slots": 1, "context": 128, "outputs": 64, "kv_dtype": "f32"}
MIXED = {"o": "nvfp4 modelopt", "gate": "fp8 blocks", "up": "fp8 blocks", "down": "nf4"}  # all else GPTQ's act-order


@torch.no_grad()
def test_compiled_it_computes_what_transformers_computes_with_these_weights(compiled, tmp_path):
    """Tensors say what they are: one checkpoint may hold several layouts, with the settings that any of them needs."""
    hf = save_random(tmp_path, "llama", gain=1.0, vocab_size=259, **SIZES)
    layouts = {name: LAYOUTS[layout] for name, layout in MIXED.items()}
    meaning = put_quantised(tmp_path, ORDERED["gptq act-order"], others=layouts)
    edit_config(tmp_path, quantization_config=LAYOUTS["fp8 blocks"].config | ORDERED["gptq act-order"].config)
    checkpoint = open_checkpoint(tmp_path)
    for tensor, weight in meaning.items():
        module, format = hf.get_submodule(tensor.removesuffix(".weight")), checkpoint.tensors[tensor].format
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        if FORMATS[format].panel == "q8":
            order = checkpoint.orders.get(tensor, np.arange(module.in_features))
            module.register_forward_pre_hook(lambda _, args, o=order: (to_int8(args[0][..., o])[..., np.argsort(o)],))
    tokens = np.random.default_rng(3).integers(0, 259, 60).tolist()
    with load(compiled(tmp_path, limits=LIMITS)) as model:
        got = all_logits(model, tokens, LIMITS["rows"])
    expected = hf(torch.tensor([tokens])).logits[0].numpy()
    # Of the best third of rows: in the others a value fell to the other side of a rounding (test_quant.py).
    assert np.sort(relative_errors(got, expected))[len(tokens) // 3] <= 1e-5
