"""GGUF keys -> the canonical hyper-parameters of checkpoint.py.

Source: ggml's `docs/gguf.md` for the keys, llama.cpp's `llama-model.cpp` for what is implied when a key is
absent (Gemma's window pattern, its local RoPE base, the 27B query scale). Every `<arch>.*` key must be known:
one that changes the maths to something we do not implement is refused by name, and so is an unknown one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..ir.errors import LoadError, nearest
from .checkpoint import TensorInfo
from .gguf_experts import gguf_experts
from .hf_experts import FAMILIES as EXPERTS
from .rope import scaling_problems

FAMILIES = {
    # general.architecture: family; a llama with experts is a Mixtral
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3", "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss",
}  # fmt: skip
HARMLESS = frozenset(
    {"tensor_data_layout", "rope.scaling.finetuned", "attention.causal", "expert_used_count"}
)
FIXED: dict[str, tuple[object, ...]] = {
    # keys whose other values change the maths to something not implemented
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0,),
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "use_parallel_residual": (False,),
}
# llama.cpp stops at these whatever `eos_token_id` says (llama-vocab.cpp, the end-of-generation set)
STOP_TEXTS = frozenset(
    {
        b"<|eot_id|>",
        b"<|eom_id|>",
        b"<|im_end|>",
        b"<end_of_turn>",
        b"<|endoftext|>",
        b"<|end_of_text|>",
        b"</s>",
    }
)
CONTROL = 3
GEMMA_27B_LAYERS = 62
MAX_LAYERS, MAX_HEAD_DIM = 4096, 4096  # far above any model: damage must not become a long loop

Tensors = Mapping[str, TensorInfo]


class Keys:
    """The `<arch>.*` keys: typed access that collects every complaint, and what was never asked for."""

    def __init__(self, keys: Mapping[str, Any], name: str) -> None:
        self.prefix = name + "."
        self.values = {k.removeprefix(self.prefix): v for k, v in keys.items() if k.startswith(self.prefix)}
        self.asked: set[str] = set()
        self.reasons: list[str] = []

    def has(self, name: str) -> bool:
        return name in self.values

    def raw(self, name: str) -> Any:
        self.asked.add(name)
        value = self.values.get(name)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            return value[0].item()  # one value per layer, all alike
        return value

    def integer(self, name: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= most:
            self.complain(name, f"an integer of 1 to {most}", value)
            return 1
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not least < value < 1e12:
            self.complain(name, f"a number above {least:g}", value)
            return 1.0
        return float(value)

    def complain(self, name: str, expected: str, value: object) -> None:
        got = f"`{value}`"
        if value is None or isinstance(value, np.ndarray | list):
            got = "no such key" if value is None else f"an array of {len(value)}"
        self.reasons.append(f"key `{self.prefix}{name}`: expected {expected}, got {got}")


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray | list)


def gguf_hyper(
    keys: Mapping[str, Any],
    tensors: Tensors,
    read: Callable[[str], np.ndarray],
    place: str,
    ignore: frozenset[str],
) -> tuple[str, dict[str, Any]]:
    """Family and canonical hyper-parameters of a parsed header, or one LoadError with all reasons."""
    name = keys.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise LoadError(
            f"`general.architecture`: expected one of {', '.join(FAMILIES)}, got `{name}`",
            place=place,
            hint=nearest(str(name), FAMILIES),
        )
    arch, family = Keys(keys, name), FAMILIES[name]
    if name == "llama" and arch.raw("expert_count"):
        family = "mixtral"
    hyper = _sizes(arch, family, tensors) | gguf_experts(arch, family)
    hyper |= _attention(arch, family, tensors, hyper)
    hyper["rope"] = _rope(arch, tensors, read, hyper)
    hyper |= _token_ids(arch, keys)
    _refuse_unknown(arch, ignore)
    if arch.reasons:
        raise LoadError(
            arch.reasons, place=place, hint="pass over a key that cannot matter with `--ignore-config KEY`"
        )
    return family, hyper


def _sizes(arch: Keys, family: str, tensors: Tensors) -> dict[str, Any]:
    layers, hidden = arch.integer("block_count", most=MAX_LAYERS), arch.integer("embedding_length")
    embed = tensors.get("token_embd.weight")
    vocab = embed.shape[0] if embed is not None else 0
    if embed is None or len(embed.shape) != 2 or embed.shape[1] != hidden:
        got = list(embed.shape) if embed else "no such tensor"
        arch.reasons.append(f"tensor `token_embd.weight`: expected [vocab, {hidden}], got {got}")
    if arch.integer("vocab_size", vocab or 1) != vocab and vocab:
        arch.complain("vocab_size", f"the {vocab} rows of `token_embd.weight`", arch.values["vocab_size"])
    return {
        "layers": layers,
        "hidden": hidden,
        "ffn": arch.integer("feed_forward_length", 1 if family in EXPERTS else None),
        "vocab": vocab,
        "eps": arch.number("attention.layer_norm_rms_epsilon"),
        "context": arch.integer("context_length"),
        "tied": "output.weight" not in tensors,
        "norm_plus_one": False,  # the converter has added the one
        "qk_permuted": family in ("llama", "mixtral"),
        "activation": "gelu_tanh" if family == "gemma3" else "silu",
        "embed_scale": math.sqrt(hidden) if family == "gemma3" else 1.0,
        "logit_softcap": arch.number("final_logit_softcapping", 0.0, -1.0),
        "attn_softcap": arch.number("attn_logit_softcapping", 0.0, -1.0),
    }


def _attention(arch: Keys, family: str, tensors: Tensors, sizes: Mapping[str, Any]) -> dict[str, Any]:
    heads = arch.integer("attention.head_count")
    head_dim = arch.integer("rope.dimension_count", sizes["hidden"] // heads or 1)
    head_dim = arch.integer("attention.key_length", head_dim, MAX_HEAD_DIM)
    for name in ("attention.value_length", "rope.dimension_count"):
        if arch.integer(name, head_dim) != head_dim:
            arch.complain(name, f"the head size {head_dim}", arch.values[name])
    kv_heads = arch.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        arch.complain("attention.head_count_kv", f"a divisor of {heads} heads", kv_heads)
    if head_dim % 2:
        arch.complain("attention.key_length", "an even head size", head_dim)
    large_gemma = family == "gemma3" and sizes["layers"] == GEMMA_27B_LAYERS
    window, kinds = _window(arch, family, sizes["layers"])
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "query_scale": (sizes["hidden"] / heads if large_gemma else head_dim) ** -0.5,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "qk_norm": family in ("qwen3", "qwen3_moe", "gemma3"),
        "window": window,
        "layer_kinds": kinds,
    }


def _window(arch: Keys, family: str, layers: int) -> tuple[int, tuple[str, ...]]:
    """Sliding window and the kind of each layer; a pattern p means p-1 local layers, then a global one."""
    window, pattern = arch.raw("attention.sliding_window"), arch.raw("attention.sliding_window_pattern")
    if not window and pattern is None:
        return 0, ("global",) * layers
    if family == "gpt_oss":
        return arch.integer("attention.sliding_window"), tuple("global" if i % 2 else "local" for i in range(layers))
    if family != "gemma3":
        arch.complain("attention.sliding_window", f"no window in `{family}`", window)
        return 0, ("global",) * layers
    if isinstance(pattern, bool):
        pattern = np.array([pattern] * layers)
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != bool or len(pattern) != layers:
            arch.complain("attention.sliding_window_pattern", f"{layers} booleans", pattern)
        kinds = tuple("local" if flag else "global" for flag in pattern)
    else:
        period = arch.integer("attention.sliding_window_pattern", 6)
        kinds = tuple("local" if (i + 1) % period else "global" for i in range(layers))
    return arch.integer("attention.sliding_window"), kinds


def _rope(
    arch: Keys, tensors: Tensors, read: Callable[[str], np.ndarray], hyper: Mapping[str, Any]
) -> dict[str, Any]:
    gemma = arch.prefix == "gemma3."
    theta = arch.number("rope.freq_base", 1e6 if gemma else 1e4, 1.0)
    scaling = _scaling(arch)
    info = tensors.get("rope_freqs.weight")
    if info is not None:
        if info.format != "f32" or info.shape != (hyper["head_dim"] // 2,):
            arch.reasons.append(
                f"tensor `rope_freqs.weight`: expected f32 [{hyper['head_dim'] // 2}], got {info}"
            )
        elif scaling["rope_type"] != "default":
            arch.complain("rope.scaling.type", "no scaling beside `rope_freqs.weight`", scaling["rope_type"])
        else:
            scaling = {"rope_type": "factors", "factors": tuple(read("rope_freqs.weight").tolist())}
    local_theta = arch.number("rope.freq_base_swa", 1e4 if gemma else theta, 1.0)
    local_scaling = {"rope_type": "default"} if gemma else scaling
    return {"theta": theta, "scaling": scaling, "local_theta": local_theta, "local_scaling": local_scaling}


def _scaling(arch: Keys) -> dict[str, Any]:
    kind = arch.raw("rope.scaling.type") or ("linear" if arch.has("rope.scale_linear") else "none")
    factor = arch.number("rope.scaling.factor", arch.number("rope.scale_linear", 1.0))
    original = arch.integer("rope.scaling.original_context_length", 1)
    magnitude = arch.number("rope.scaling.attn_factor", arch.number("rope.scaling.yarn_attn_factor", 1.0))
    betas = {
        f"beta_{b}": arch.number(f"rope.scaling.yarn_beta_{b}", d) for b, d in (("fast", 32.0), ("slow", 1.0))
    }
    scaling: dict[str, Any]
    if kind == "none" or (kind == "linear" and factor == 1.0):
        scaling = {"rope_type": "default"}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, **betas}
        if arch.has("rope.scaling.original_context_length"):
            scaling["original_max_position_embeddings"] = original
        if arch.prefix == "gpt-oss.":
            scaling["truncate"] = False  # as the model was trained; llama.cpp rounds the ramp's ends
        if magnitude != 1.0:
            scaling["attention_factor"] = magnitude * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    else:
        scaling = {"rope_type": kind, "factor": factor}
    arch.reasons += scaling_problems(scaling)
    return scaling


def _token_ids(arch: Keys, keys: Mapping[str, Any]) -> dict[str, Any]:
    def token(name: str) -> int:
        value = keys.get(f"tokenizer.ggml.{name}_token_id", -1)
        if type(value) is not int or not -1 <= value < 1 << 32:
            arch.reasons.append(f"key `tokenizer.ggml.{name}_token_id`: expected a token id, got `{value}`")
            return -1
        return -1 if value == (1 << 32) - 1 else value

    stops = stop_tokens(keys, [token(name) for name in ("eos", "eot", "eom")])
    return {"bos": token("bos"), "pad": token("padding"), "eos": stops}


def stop_tokens(keys: Mapping[str, Any], named: list[int]) -> tuple[int, ...]:
    """Ids that end a generation: the named ones, then control tokens with a well-known end-of-turn text."""
    found = [i for i in named if i >= 0]
    tokens, types = keys.get("tokenizer.ggml.tokens", []), keys.get("tokenizer.ggml.token_type", [])
    if isinstance(tokens, list) and isinstance(types, np.ndarray):
        found += [
            i for i, text in enumerate(tokens[: len(types)]) if text in STOP_TEXTS and types[i] == CONTROL
        ]
    return tuple(dict.fromkeys(found))


def _refuse_unknown(arch: Keys, ignore: frozenset[str]) -> None:
    for name, value in arch.values.items():
        if name in ignore or arch.prefix + name in ignore:
            continue
        if name in FIXED and name not in arch.asked:
            if _is_array(value) or value not in FIXED[name]:
                arch.complain(name, f"`{FIXED[name][0]}` (nothing else is implemented)", value)
        elif name not in HARMLESS and name not in arch.asked:
            arch.reasons.append(f"unknown key `{arch.prefix}{name}`: it may change what the model computes")
