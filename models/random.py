"""A checkpoint of random weights for any model text: to try a family, a pass or an example without a download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import LoadError
from ..ir.model_text import ModelText, parse_model
from .checkpoint import Checkpoint, TensorInfo
from .shapes import tensor_shapes

HYPER: dict[str, Any] = {
    "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocab": 256, "context": 512,
    "eps": 1e-5, "tied": True, "qkv_bias": False, "o_bias": False, "qk_norm": False, "norm_plus_one": False,
    "qk_permuted": False, "activation": "silu", "embed_scale": 1.0, "query_scale": 0.25, "logit_softcap": 0.0,
    "attn_softcap": 0.0, "window": 0, "layer_kinds": ("global", "global"), "bos": -1, "pad": -1, "eos": (),
    "experts": 8, "experts_used": 2, "moe_ffn": 32, "shared_ffn": 64, "norm_topk": 1, "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "rope": {"theta": 10000.0, "scaling": {"rope_type": "default"}, "local_theta": 10000.0,
             "local_scaling": {"rope_type": "default"}},
}  # fmt: skip


def random_checkpoint(text: ModelText | str, hyper: Mapping[str, Any] | None = None, seed: int = 0) -> Checkpoint:
    """Float32 tensors for every weight of `text`, scaled so that activations stay near one.

    `hyper` replaces names of HYPER; `layer_kinds` and `query_scale` follow from `layers` and `head_dim` if not given.
    The tensors have their Hugging Face names, and there is no tokenizer.
    """
    model = parse_model(text) if isinstance(text, str) else text
    given = dict(hyper or {})
    full = {**HYPER, **given}
    full["query_scale"] = given.get("query_scale", full["head_dim"] ** -0.5)
    full["layer_kinds"] = given.get("layer_kinds", ("global",) * full["layers"])
    shapes = tensor_shapes(model, full)

    def read(name: str) -> np.ndarray:
        if name not in shapes:
            raise LoadError(f"no tensor `{name}` in the checkpoint", place="random weights")
        return _values(list(shapes).index(name), shapes[name], seed)

    tensors = {name: TensorInfo(name, "f32", shape) for name, shape in shapes.items()}
    return Checkpoint(Path(f"random-{model.name}"), "hf", model.name, full, tensors, read)


def _values(index: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    x = np.random.default_rng([seed, index]).standard_normal(shape, np.float32)
    return x * np.float32(shape[-1] ** -0.5) if len(shape) > 1 else 1 + np.float32(0.1) * x
