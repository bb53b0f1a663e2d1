"""What a GGUF's keys say about a mixture of experts.

Source: llama.cpp's `llama-model.cpp`, also for what it does without a key: whether gates are normalised, gpt-oss's
activation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hf_experts import FAMILIES as EXPERTS
from .hf_experts import NONE

if TYPE_CHECKING:
    from .gguf_hyper import Keys


def gguf_experts(arch: Keys, family: str) -> dict[str, Any]:
    """Hyper-parameters of the experts; those of NONE for a family without."""
    if family not in EXPERTS:
        return NONE
    experts, used = arch.integer("expert_count", most=4096), arch.integer("expert_used_count")
    if used > experts:
        arch.complain("expert_used_count", f"at most the {experts} experts", used)
    shared = family == "qwen2_moe"
    whole = arch.integer("feed_forward_length", 1)
    return {
        "experts": experts,
        "experts_used": used,
        "moe_ffn": whole if family == "mixtral" else arch.integer("expert_feed_forward_length"),
        "shared_ffn": arch.integer("expert_shared_feed_forward_length") if shared else 0,
        "norm_topk": int(not shared),  # llama.cpp: for these architectures, whatever the model was trained with
        "swiglu_limit": 7.0 if family == "gpt_oss" else 0.0,
        "swiglu_alpha": 1.702 if family == "gpt_oss" else 0.0,
    }
