"""Quantised Hugging Face checkpoints: the tensors of each matrix become one `NAME.weight` in a format of ours.

What the tensors are decides (`LAYOUTS`); config.json is asked only for what they do not say, and what in it would
change the maths is refused by name. Nothing of a matrix is read here but small tensors that its layout depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import numpy as np

from .checkpoint import TensorInfo
from .quant_bnb import nf4
from .quant_float import fp4, fp8
from .quant_int import awq, gptq, int8, packed_int
from .quant_module import Made, Module, Settings, misfit

Read = Callable[[str], np.ndarray]
LAYOUTS: tuple[Callable[[Module], Made | str | None], ...] = (nf4, packed_int, gptq, awq, fp4, fp8, int8)
METHODS = ("compressed-tensors", "modelopt", "fp8", "gptq", "awq", "bitsandbytes")
LEAVES = ("weight", "weight_packed", "qweight")  # that hold codes
QUANTISED = ("U8", "I8", "I32", "F8_E4M3", "F4")
ACTIVATIONS = frozenset(("input_scale", "input_global_scale", "input_zero_point", "activation_scale"))
CACHE = ("k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point")
OUTPUTS = ("*k_proj.output_scale", "*v_proj.output_scale")  # the cache's, as Quark spells them
WHY_ACTIVATIONS = "activations are rounded to eight bits by blocks, not by a scale of the checkpoint"
WHY_CACHE = "describes a cache of eight bits; keys and values are stored as bf16"
REFUSED = {
    "pre_quant_scale": "scales of activations before a matrix are not supported",
    "svdquant_lora_a": "low-rank parts beside a matrix are not supported",
    "svdquant_lora_b": "low-rank parts beside a matrix are not supported",
}


@dataclass
class Quantised:
    """Tensors as the family texts name them, how to read them, what is left out and why, and all reasons to refuse.

    orders: by tensor, the column of x that each of its columns is multiplied with, where they are not the same.
    """

    tensors: dict[str, TensorInfo]
    read: Read
    ignored: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    orders: dict[str, np.ndarray] = field(default_factory=dict)


def quantisation(config: Mapping[str, Any], beside: Mapping[str, Any]) -> Settings | None:
    """The settings in config.json (also as compressed-tensors once named them), else of hf_quant_config.json."""
    fields = config.get("quantization_config") or config.get("compression_config")
    if isinstance(fields, dict):
        return Settings(str(fields.get("quant_method", "compressed-tensors")), fields)
    inner = beside.get("quantization")
    return Settings("modelopt", inner) if isinstance(inner, dict) else None


def setting_problems(settings: Settings) -> list[str]:
    """What the configuration asks for that no tensor shows and nothing here does."""
    fields, reasons = settings.fields, []
    if settings.method not in METHODS:
        return [f"config field `quant_method`: expected one of {', '.join(METHODS)}, got `{settings.method}`"]
    transforms = fields.get("transform_config")
    if transforms and (not isinstance(transforms, dict) or transforms.get("config_groups", transforms)):
        reasons.append("config field `transform_config`: online (Hadamard) transforms are not supported")
    sparsity = fields.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") not in ("dense", None):
        reasons.append(f"config field `sparsity_config`: expected dense weights, got `{sparsity['format']}`")
    if fields.get("dynamic"):
        reasons.append("config field `dynamic`: settings of single modules are not supported")
    if str(fields.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        reasons.append(f"config field `fmt`: expected e4m3, got `{fields['fmt']}`")
    return reasons


def quantised_tensors(tensors: Mapping[str, TensorInfo], read: Read, settings: Settings) -> Quantised:
    """Every module's tensors put together. `tensors` have their dtype on disk as format; `read` gives that type."""
    found = Quantised({}, read, reasons=setting_problems(settings))
    loads: dict[str, Callable[[], np.ndarray]] = {}
    taken: set[str] = set()
    for base, leaves in _modules(tensors).items():
        module = Module(base, leaves, read, settings)
        made = next((m for m in (layout(module) for layout in LAYOUTS) if m is not None), None)
        if isinstance(made, Made):
            made = misfit(module, made) or made
        if isinstance(made, str):
            found.reasons.append(made)
            taken |= {t.name for t in leaves.values()}
        elif made is not None:
            name = f"{base}.weight"
            found.tensors[name], loads[name] = TensorInfo(name, made.format, made.shape), made.load
            taken |= {leaves[leaf].name for leaf in made.used}
            if made.order is not None:
                found.orders[name] = made.order
    if not loads and not found.reasons:
        found.reasons.append(f"config field `quantization_config`: says `{settings.method}`, but no tensor is")
    for name, info in tensors.items():
        if name not in taken:
            _rest(name, info, found)
    found.read = lambda name: loads[name]() if name in loads else read(name)
    return found


def _modules(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """By module, the tensors of those that hold codes: leaf to tensor, `weight.absmax` being a leaf of two parts."""
    split = {name: name.rpartition(".") for name in tensors}
    bases = {
        base for name, (base, _, leaf) in split.items() if leaf in LEAVES and tensors[name].format in QUANTISED
    }
    found: dict[str, dict[str, TensorInfo]] = {base: {} for base in sorted(bases)}
    for name, (base, _, leaf) in split.items():
        if base in found:
            found[base][leaf] = tensors[name]
        else:
            outer = next((base[: -len(s)] for s in (".weight", ".weight.quant_state") if base.endswith(s)), "")
            if outer in found:
                found[outer][name[len(outer) + 1 :]] = tensors[name]
    return found


def _rest(name: str, info: TensorInfo, found: Quantised) -> None:
    """A tensor that no matrix is made of: another weight, scales that say nothing to us, or a reason to refuse."""
    leaf = name.rpartition(".")[2]
    if leaf in REFUSED:
        found.reasons.append(f"tensor `{name}`: {REFUSED[leaf]}")
    elif leaf in ACTIVATIONS:
        found.ignored[name] = WHY_ACTIVATIONS
    elif leaf in CACHE or any(fnmatch(name, pattern) for pattern in OUTPUTS):
        found.ignored[name] = WHY_CACHE
    else:
        found.tensors[name] = info
