"""Reading config.json field by field: defaults, complaints, and the two spellings of RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rope import FIELDS, scaling_problems

LAYER_TYPES = {"full_attention", "sliding_attention"}
DEFAULTS: dict[str, dict[str, Any]] = {
    # what transformers takes when config.json is silent, for fields that old or sparse files leave out
    "llama": {"rope_theta": 1e4},
    "mistral": {"rope_theta": 1e4, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"rope_theta": 1e4, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "rope_theta": 1e4, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gemma3_text": {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "vocab_size": 262_208,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
}  # fmt: skip


class Fields:
    """Typed access to config.json that remembers what was asked for and collects every complaint."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.config, self.defaults = config, defaults
        self.asked: set[str] = set()
        self.reasons: list[str] = []

    def raw(self, name: str) -> Any:
        self.asked.add(name)
        return self.config[name] if name in self.config else self.defaults.get(name)

    def integer(self, name: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= most:
            self.complain(name, f"an integer of 1 to {most}", value)
            return 1
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if not _is_positive(value):
            self.complain(name, "a positive number", value)
            return 1.0
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw(name)
        if value not in (None, True, False):
            self.complain(name, "true or false", value)
        return bool(value)

    def complain(self, name: str, expected: str, value: object) -> None:
        got = "no such field" if name not in self.config else f"`{value}`"
        self.reasons.append(f"config field `{name}`: expected {expected}, got {got}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def hf_rope(fields: Fields, family: str) -> dict[str, Any]:
    """Theta and scaling of global and of local layers; v5 keeps both in `rope_parameters`."""
    modern = fields.raw("rope_parameters")
    theta, scaling = fields.raw("rope_theta"), fields.raw("rope_scaling")
    local_theta = fields.raw("rope_local_base_freq") if family == "gemma3" else None
    if modern is not None and not isinstance(modern, dict):
        fields.complain("rope_parameters", "an object", modern)
        modern = {}
    if modern and family == "gemma3" and set(modern) <= LAYER_TYPES:
        full, local = modern.get("full_attention"), modern.get("sliding_attention")
    else:
        full, local = {"rope_theta": theta, **(scaling or {}), **(modern or {})}, None
    full = _one_rope(
        fields, {"rope_theta": theta, **(full or {})}, "rope_parameters" if modern else "rope_scaling"
    )
    if family == "gemma3":
        local = _one_rope(fields, {"rope_theta": local_theta, **(local or {})}, "rope_parameters")
    else:
        local = full
    return {"theta": full[0], "scaling": full[1], "local_theta": local[0], "local_scaling": local[1]}


def _one_rope(fields: Fields, spec: Mapping[str, Any], name: str) -> tuple[float, dict[str, Any]]:
    spec = dict(spec)
    theta, rotary = spec.pop("rope_theta", None), spec.pop("partial_rotary_factor", None)
    if not _is_positive(theta) or theta <= 1:
        fields.complain("rope_theta", "a number above 1", theta)
        theta = 1e4
    if rotary not in (None, 1, 1.0):
        fields.complain("partial_rotary_factor", "1 (the whole head rotates)", rotary)
    old, new = spec.pop("type", None), spec.pop("rope_type", None)  # `type`: the spelling before 4.43
    kind = new or old or "default"
    required, optional = FIELDS.get(str(kind), (frozenset(), frozenset()))
    original = fields.raw("original_max_position_embeddings") or fields.raw("max_position_embeddings")
    if "original_max_position_embeddings" in required | optional:
        spec.setdefault("original_max_position_embeddings", original)
    elif spec.get("original_max_position_embeddings") is not None:
        spec.pop("original_max_position_embeddings")  # v5 writes it for every kind; only these read it
    if old is not None and new is not None and old != new:
        fields.complain(name, f"`type` and `rope_type` to agree on `{new}`", old)
    scaling = {"rope_type": kind, **{k: v for k, v in spec.items() if v is not None}}
    fields.reasons += [f"config field `{name}`: {reason}" for reason in scaling_problems(scaling)]
    return float(theta), scaling
