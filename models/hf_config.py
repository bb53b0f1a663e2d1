"""config.json -> the canonical hyper-parameters of checkpoint.py.

Source: the `configuration_*.py` of Hugging Face transformers, v4 spelling (`rope_theta`, `rope_scaling`,
`torch_dtype`) and v5 spelling (`rope_parameters`, `dtype`, `layer_types`). Every field must be known: read
here, in HARMLESS (does not change what the model computes), or in FIXED with the one value we implement.
Anything else is refused by name, all at once; `ignore` passes over unknown fields, never over known ones with
a wrong value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..ir.errors import LoadError, nearest
from . import hf_experts
from .hf_fields import DEFAULTS, Fields, hf_rope

FAMILIES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3",
    **hf_experts.FAMILIES,
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
BIASED = ("llama", "qwen3", "qwen3_moe", "gpt_oss", "gemma3_text")  # `attention_bias` is a field of theirs
DTYPES = ("bfloat16", "float16", "float32", None)
KINDS = {"full_attention": "global", "sliding_attention": "local"}
MAX_LAYERS, MAX_HEAD_DIM = 4096, 4096  # far above any model: damage must not become a long loop

HARMLESS = frozenset(
    """_name_or_path architectures model_type attention_dropout use_cache initializer_range
    transformers_version pretraining_tp chunk_size_feed_forward id2label label2id output_attentions
    output_hidden_states problem_type return_dict return_dict_in_generate torchscript finetuning_task
    task_specific_params tokenizer_class prefix decoder_start_token_id sep_token_id cls_token_id
    mask_token_id unk_token_id forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty bad_words_ids temperature top_k top_p
    typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_beams num_beam_groups diversity_penalty num_return_sequences max_length min_length
    max_new_tokens do_sample early_stopping output_scores remove_invalid_values hidden_dropout
    hidden_dropout_prob resid_pdrop embd_pdrop resid_dropout embedding_dropout tf_legacy_loss
    use_bfloat16 cache_implementation _attn_implementation _attn_implementation_autoset
    attn_implementation _flash_attn_2_enabled unsloth_version unsloth_fixed transformers.js_config
    is_llama_config _sliding_window_pattern tie_encoder_decoder base_model_tp_plan router_aux_loss_coef
    router_jitter_noise output_router_logits initial_context_length""".split()  # noqa: SIM905
)
FIXED: dict[str, tuple[object, ...]] = {
    # fields whose other values change the maths to something not implemented
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "mlp_bias": (False, None),
    "n_routed_experts": (0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "compression_config": (None,),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
}


def hf_hyper(
    config: Mapping[str, Any], generation: Mapping[str, Any], place: str, ignore: frozenset[str]
) -> tuple[str, dict[str, Any]]:
    """Family and canonical hyper-parameters, or one LoadError with all reasons."""
    if config.get("model_type") == "gemma3":
        config = _gemma3_text(config, place)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise LoadError(
            f"config field `model_type`: expected one of {', '.join(FAMILIES)}, got `{model_type}`",
            place=place,
            hint=nearest(str(model_type), FAMILIES),
        )
    family, fields = FAMILIES[model_type], Fields(config, (DEFAULTS | hf_experts.DEFAULTS)[model_type])
    hyper = _sizes(fields, family) | hf_experts.hf_experts(fields, family)
    hyper |= _attention(fields, family, model_type, hyper)
    hyper["window"], hyper["layer_kinds"] = _layer_kinds(fields, family, model_type, hyper["layers"])
    hyper["rope"] = hf_rope(fields, family)
    hyper |= _token_ids(fields, generation)
    _check_rest(fields, ignore)
    if fields.reasons:
        hint = "pass over an unknown field that cannot matter with `--ignore-config FIELD`"
        raise LoadError(fields.reasons, place=place, hint=hint)
    return family, hyper


def _gemma3_text(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The text half of a `gemma3` config, if there is no other half."""
    text = config.get("text_config")
    if not isinstance(text, dict) or config.get("vision_config") is not None:
        raise LoadError(
            "config field `vision_config`: expected a text model, got gemma3 with images",
            place=place,
            hint="export the language model alone (`model_type` gemma3_text)",
        )
    outer = {k: v for k, v in config.items() if k not in ("text_config", "vision_config", "model_type")}
    return {**outer, **text, "model_type": "gemma3_text"}


def _sizes(fields: Fields, family: str) -> dict[str, Any]:
    gemma = family == "gemma3"
    hidden = fields.integer("hidden_size")
    activation = fields.raw("hidden_activation" if gemma else "hidden_act")
    if activation not in ACTIVATIONS:
        name = "hidden_activation" if gemma else "hidden_act"
        fields.complain(name, f"one of {', '.join(ACTIVATIONS)}", activation)
    if gemma and "hidden_act" in fields.config and ACTIVATIONS.get(fields.raw("hidden_act")) != "gelu_tanh":
        fields.complain("hidden_act", "gelu_pytorch_tanh", fields.raw("hidden_act"))
    dtype = fields.raw("dtype") or fields.raw("torch_dtype")
    if dtype not in DTYPES:
        fields.complain("dtype", "bfloat16, float16 or float32", dtype)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.raw(name) is not None:
            fields.complain(name, "null (soft-caps are not implemented for this family)", fields.raw(name))
    return {
        "layers": fields.integer("num_hidden_layers", most=MAX_LAYERS),
        "hidden": hidden,
        "ffn": fields.integer("intermediate_size"),
        "vocab": fields.integer("vocab_size"),
        "eps": fields.number("rms_norm_eps", 1e-6),
        "context": fields.integer("max_position_embeddings"),
        "tied": fields.flag("tie_word_embeddings"),
        "norm_plus_one": gemma,
        "qk_permuted": False,
        "activation": ACTIVATIONS.get(str(activation), "silu"),
        "embed_scale": math.sqrt(hidden) if gemma else 1.0,
        "logit_softcap": 0.0,
        "attn_softcap": 0.0,
    }


def _attention(fields: Fields, family: str, model_type: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.integer("head_dim", sizes["hidden"] // heads or 1, MAX_HEAD_DIM)
    if heads % kv_heads:
        fields.complain("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
    if head_dim % 2:
        fields.complain("head_dim", "an even number", head_dim)
    scalar = fields.number("query_pre_attn_scalar") if family == "gemma3" else head_dim
    bias = fields.flag("attention_bias") if model_type in BIASED else False
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "query_scale": float(scalar) ** -0.5,
        "qkv_bias": bias or family in ("qwen2", "qwen2_moe"),  # qwen2's own code has no switch for it
        "o_bias": bias,
        "qk_norm": family in ("qwen3", "qwen3_moe", "gemma3"),
    }


def _layer_kinds(fields: Fields, family: str, model_type: str, layers: int) -> tuple[int, tuple[str, ...]]:
    given, window = fields.raw("layer_types"), fields.raw("sliding_window")
    if family in ("qwen2", "qwen3", "qwen2_moe"):
        first_local = (
            fields.integer("max_window_layers", layers) if fields.config.get("max_window_layers") != 0 else 0
        )
        if not fields.flag("use_sliding_window"):
            window = None
        kinds = ["local" if window is not None and i >= first_local else "global" for i in range(layers)]
    elif family == "gemma3":
        period = fields.integer("sliding_window_pattern", 6)
        kinds = ["local" if (i + 1) % period else "global" for i in range(layers)]
    elif family == "gpt_oss":
        kinds = ["global" if i % 2 else "local" for i in range(layers)]
    elif family == "qwen3_moe":
        window = window if fields.flag("use_sliding_window") else None
        kinds = ["local" if window is not None else "global"] * layers
    else:
        kinds = ["local" if model_type in ("mistral", "mixtral") and window is not None else "global"] * layers
    if given is not None:
        if (
            not isinstance(given, list)
            or len(given) != layers
            or not all(k in KINDS for k in map(str, given))
        ):
            fields.complain("layer_types", f"{layers} of {', '.join(KINDS)}", given)
            return 0, ("global",) * layers
        kinds = [KINDS[str(k)] for k in given]
    if "local" not in kinds:
        return 0, tuple(kinds)
    if window is None:
        fields.complain("sliding_window", "a positive integer for the local layers", window)
        return 0, tuple(kinds)
    return fields.integer("sliding_window"), tuple(kinds)


def _token_ids(fields: Fields, generation: Mapping[str, Any]) -> dict[str, Any]:
    def ids(value: object, name: str) -> list[int]:
        values: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int and -1 <= v < 1 << 31 for v in values):
            fields.complain(name, "a token id", value)
            return []
        return [v for v in values if v >= 0]

    first = {n: ids(fields.raw(f"{n}_token_id"), f"{n}_token_id") for n in ("bos", "eos", "pad")}
    stops = dict.fromkeys(first["eos"] + ids(generation.get("eos_token_id"), "eos_token_id"))
    return {"bos": (first["bos"] or [-1])[0], "pad": (first["pad"] or [-1])[0], "eos": tuple(stops)}


def _check_rest(fields: Fields, ignore: frozenset[str]) -> None:
    for name, value in fields.config.items():
        if name in FIXED and name not in fields.asked:
            if not any(value == allowed for allowed in FIXED[name]):
                fields.complain(name, f"`{FIXED[name][0]}` (nothing else is implemented)", _short(value))
        elif name not in HARMLESS and name not in fields.asked and name not in ignore:
            hint = nearest(name, fields.asked | HARMLESS)
            reason = (
                f"unknown config field `{name}` = `{_short(value)}`: it may change what the model computes"
            )
            fields.reasons.append(reason + (f" ({hint})" if hint else ""))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
