"""Mixtures of experts as GGUF and in MXFP4, made from a random checkpoint of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from onelaunch.ir.formats import FORMATS, decode
from onelaunch.ir.model_text import ModelText, parse_model
from onelaunch.models.importer import FAMILIES, Imported, family_text, import_checkpoint
from onelaunch.models.instantiate import evaluate_number
from onelaunch.models.open import open_checkpoint

ARCHS = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "mixtral": "llama", "gpt_oss": "gpt-oss"}
MXFP4 = gguf.GGMLQuantizationType.MXFP4


def stacked(imported: Imported, key: str) -> np.ndarray:
    """A weight in float32, in its own shape."""
    source = imported.sources[key]
    parts = [np.asarray(imported.checkpoint.read(name), np.float32) for name in source.tensors]
    return np.stack(parts) if len(parts) > 1 else parts[0]


def as_gguf(folder: Path, path: Path, experts: str = "f32") -> Path:
    """A GGUF of a Hugging Face directory; `experts`: the format of the matrices of experts, f32 or mxfp4."""
    imported = import_checkpoint(open_checkpoint(folder))
    hyper, family = imported.checkpoint.hyper, imported.checkpoint.family
    writer = gguf.GGUFWriter(path, ARCHS[family])
    _write_keys(writer, hyper, family)
    for owner, weights in family_text(family).weights:
        for layer in range(hyper["layers"]) if owner else (-1,):
            for w in weights:
                if w.constant or (w.otherwise and hyper["tied"]):
                    continue
                x = stacked(imported, w.name if layer < 0 else f"{layer}.{w.name}")
                for change, amount in w.changes:
                    x = permuted(x, int(evaluate_number(amount, hyper))) if change == "unpermute" else x
                name = dict(w.places)["gguf"].replace("{i}", str(layer))
                if experts == "mxfp4" and x.ndim == 3:
                    writer.add_tensor(name, gguf.quantize(x, MXFP4), raw_dtype=MXFP4)
                else:
                    writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order for adjacent-pair rotary embedding."""
    return x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def _write_keys(writer: gguf.GGUFWriter, hyper: dict[str, Any], family: str) -> None:
    writer.add_block_count(hyper["layers"])
    writer.add_context_length(hyper["context"])
    writer.add_embedding_length(hyper["hidden"])
    writer.add_feed_forward_length(hyper["moe_ffn"])
    writer.add_head_count(hyper["heads"])
    writer.add_head_count_kv(hyper["kv_heads"])
    writer.add_key_length(hyper["head_dim"])
    writer.add_value_length(hyper["head_dim"])
    writer.add_rope_dimension_count(hyper["head_dim"])
    writer.add_layer_norm_rms_eps(hyper["eps"])
    writer.add_rope_freq_base(hyper["rope"]["theta"])
    writer.add_expert_count(hyper["experts"])
    writer.add_expert_used_count(hyper["experts_used"])
    if family != "mixtral":
        writer.add_expert_feed_forward_length(hyper["moe_ffn"])
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(hyper["shared_ffn"])
    if family == "gpt_oss":
        scaling = hyper["rope"]["scaling"]
        writer.add_sliding_window(hyper["window"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def to_mxfp4(folder: Path, hf: torch.nn.Module) -> None:
    """Store a gpt-oss's experts in MXFP4, as its own checkpoints do, and give the model the numbers that are left."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, parameter in hf.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        rows = np.ascontiguousarray(tensors.pop(name).swapaxes(1, 2))  # [experts, out, in]
        records = gguf.quantize(rows, MXFP4).reshape(*rows.shape[:2], -1, 17)
        codes = np.concatenate([records[..., 1:] & 15, records[..., 1:] >> 4], axis=-1)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = np.ascontiguousarray(records[..., 0])
        flat = decode(FORMATS["mxfp4"], records.reshape(-1, rows.shape[2] // 32 * 17), rows.shape[2])
        parameter.data = torch.from_numpy(flat.reshape(rows.shape)).swapaxes(1, 2).contiguous()
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))


ROUTERS = {
    "sigmoid, bias, groups, scaled": """
  s = sigmoid(linear(h, w.router))
  c = group_limit(add(s, w.router_bias), groups=4, keep=2, best=2)
  gates = scale(normalize(top_k(s, c, k=experts_used), eps=1e-20), by=2.5)""",
    "softmax, best of each group, not normalised": """
  s = softmax(linear(h, w.router))
  c = group_limit(s, groups=3, keep=2, best=1)
  gates = scale(top_k(s, c, k=experts_used), by=16)""",
}


def other_router(router: str) -> ModelText:
    """Qwen2's mixture of experts with one of ROUTERS and a shared expert without a gate."""
    text = (FAMILIES / "qwen2_moe.ol").read_text()
    start, end = text.index("  p = softmax"), text.index("  f = mul(")
    text = text[:start] + ROUTERS[router].lstrip("\n") + "\n" + text[end:]
    text = text.replace("mul(s, sigmoid(linear(h, w.shared_router)))", "s")
    lines = [line for line in text.splitlines() if not line.startswith("  shared_router:")]
    bias = '  router_bias: [experts] = hf "model.layers.{i}.mlp.gate.bias"'
    at = next(i for i, line in enumerate(lines) if line.startswith("  router:"))
    return parse_model("\n".join([*lines[:at], bias, *lines[at:]] if "bias" in router else lines))
