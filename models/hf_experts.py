"""What config.json says about a mixture of experts, and the gpt-oss way of storing one.

Source: `configuration_*.py` and `modeling_*.py` of Hugging Face transformers for the fields and what they mean;
gpt-oss's own checkpoints for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .checkpoint import TensorInfo
from .hf_fields import Fields

FAMILIES = {"qwen2_moe": "qwen2_moe", "qwen3_moe": "qwen3_moe", "mixtral": "mixtral", "gpt_oss": "gpt_oss"}
NONE: dict[str, Any] = {
    "experts": 0, "experts_used": 0, "moe_ffn": 0, "shared_ffn": 0, "norm_topk": 0, "swiglu_limit": 0.0,
    "swiglu_alpha": 0.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    # what transformers takes when config.json is silent
    "qwen2_moe": {
        "rope_theta": 1e4, "num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "qkv_bias": True,
    },
    "qwen3_moe": {
        "rope_theta": 1e4, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 4096, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "mixtral": {"rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        "rope_theta": 1.5e5, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_local_experts": 128,
        "num_experts_per_tok": 4, "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "attention_bias": True,
    },
}  # fmt: skip


def hf_experts(fields: Fields, family: str) -> dict[str, Any]:
    """Hyper-parameters of the experts; those of NONE for a family without."""
    if family not in FAMILIES:
        return NONE
    config = fields.config
    both = [name for name in ("num_experts", "num_local_experts") if name in config]  # transformers 5 renames it
    name = both[0] if both else "num_local_experts" if family in ("mixtral", "gpt_oss") else "num_experts"
    experts, used = fields.integer(name, most=4096), fields.integer("num_experts_per_tok")
    if len({config[n] for n in both}) > 1:
        fields.complain("num_local_experts", f"the {experts} of `num_experts`", config["num_local_experts"])
    if used > experts:
        fields.complain("num_experts_per_tok", f"at most the {experts} experts", used)
    _check_every_layer(fields, family)
    qwen, oss = family.startswith("qwen"), family == "gpt_oss"
    return {
        "experts": experts,
        "experts_used": used,
        "moe_ffn": fields.integer("moe_intermediate_size" if qwen else "intermediate_size"),
        "shared_ffn": fields.integer("shared_expert_intermediate_size") if family == "qwen2_moe" else 0,
        "norm_topk": int(fields.flag("norm_topk_prob")) if qwen else 1,
        "swiglu_limit": fields.number("swiglu_limit") if oss else 0.0,
        "swiglu_alpha": fields.number("swiglu_alpha") if oss else 0.0,
    }


def _check_every_layer(fields: Fields, family: str) -> None:
    """Layers without experts among those with are not implemented; nor are other ways of storing gpt-oss."""
    if fields.raw("decoder_sparse_step") not in (None, 1):
        fields.complain("decoder_sparse_step", "1 (experts in every layer)", fields.raw("decoder_sparse_step"))
    if fields.raw("mlp_only_layers") not in (None, []):
        fields.complain("mlp_only_layers", "[] (experts in every layer)", fields.raw("mlp_only_layers"))
    if family == "qwen2_moe" and not fields.flag("qkv_bias"):
        fields.complain("qkv_bias", "true", False)
    if family == "gpt_oss":
        quant = fields.raw("quantization_config")
        if quant is not None and (not isinstance(quant, dict) or quant.get("quant_method") != "mxfp4"):
            fields.complain("quantization_config", "null or the `quant_method` mxfp4", quant)
        if not fields.flag("attention_bias"):
            fields.complain("attention_bias", "true", False)
        if fields.raw("experts_per_token") not in (None, fields.raw("num_experts_per_tok")):
            fields.complain("experts_per_token", "the value of `num_experts_per_tok`", fields.raw("experts_per_token"))


Read = Callable[[str], np.ndarray]
Parts = Mapping[str, Callable[[], np.ndarray]]


def gpt_oss_tensors(tensors: Mapping[str, TensorInfo], read: Read) -> tuple[dict[str, TensorInfo], Read]:
    """gpt-oss's tensors as its family text names them: gate and up apart, matrices [experts, out, in].

    A checkpoint stores `gate_up_proj` [experts, in, 2 out] with gate and up interleaved; or, in MXFP4, `_blocks`
    [experts, rows, in / 32, 16] and `_scales` [experts, rows, in / 32], element 2b in the low nibble of byte b.
    """
    found: dict[str, TensorInfo] = {}
    parts: dict[str, Callable[[], np.ndarray]] = {}
    for name, info in tensors.items():
        base = name.removesuffix("_blocks")
        if ".experts." not in name or len(info.shape) not in (2, 3, 4) or name.endswith("_scales"):
            if not (name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in tensors):
                found[name] = info
            continue
        for part, rows in _parts(base).items():
            made, load = _part(part, rows, info, tensors, read)
            found[part], parts[part] = made, load
    return found, lambda name: parts[name]() if name in parts else read(name)


def _parts(name: str) -> dict[str, slice]:
    """The tensors of the text that one of the checkpoint holds, and which of its rows."""
    if "gate_up_proj" not in name:
        return {name: slice(None)}
    return {name.replace("gate_up_proj", f"{part}_proj"): slice(i, None, 2) for i, part in enumerate(("gate", "up"))}


def _part(
    name: str, rows: slice, info: TensorInfo, tensors: Mapping[str, TensorInfo], read: Read
) -> tuple[TensorInfo, Callable[[], np.ndarray]]:
    experts, *shape = info.shape
    if len(shape) == 1:  # a bias
        made = replace(info, name=name, shape=(experts, len(range(shape[0])[rows])))
        return made, lambda: np.ascontiguousarray(read(info.name)[:, rows])
    if len(shape) == 2:  # [in, out]
        made = replace(info, name=name, shape=(experts, len(range(shape[1])[rows]), shape[0]))
        return made, lambda: np.ascontiguousarray(read(info.name).swapaxes(1, 2)[:, rows])
    scales = tensors.get(info.name.removesuffix("_blocks") + "_scales")
    fine = scales is not None and (scales.format, info.format) == ("U8", "U8") and scales.shape == info.shape[:3]
    n, k = len(range(shape[0])[rows]), shape[1] * 2 * shape[2]
    made = TensorInfo(name, "mxfp4" if fine and shape[2] == 16 else f"{info.format} blocks", (experts, n, k))
    scale_name = scales.name if scales else ""
    return made, lambda: _records(read(info.name)[:, rows], read(scale_name)[:, rows])


def _records(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8 [experts, rows, blocks * 17] as GGUF stores MXFP4: a scale, then elements i and i + 16 in a byte."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:3], 32)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], packed], axis=-1).reshape(*blocks.shape[:2], -1)
