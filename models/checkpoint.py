"""The neutral view of a checkpoint that both readers (Hugging Face, GGUF) give.

A `Checkpoint` is canonical hyper-parameters, the tensor list, a `read` that maps one tensor's bytes, and the
tokenizer; `open.py` makes one of what is on disk. Nothing is decoded and no weight is touched until `read`;
every kind of damage is one `LoadError` that names all reasons it could find.

Canonical `hyper` names (both readers fill every one):

    layers hidden heads kv_heads head_dim ffn vocab context    int
    eps                                                        float
    tied qkv_bias o_bias qk_norm norm_plus_one qk_permuted     bool
    activation                     "silu" | "gelu_tanh"
    embed_scale query_scale        float
    logit_softcap attn_softcap     float, 0.0 = none
    experts experts_used moe_ffn shared_ffn    int, 0 = none: experts, those a row uses, inner sizes
    norm_topk                      int, 1: the gates of a row sum to one
    swiglu_limit swiglu_alpha      float, of gpt-oss's activation
    window                         int, 0 = none; a row of a local layer sees its last `window` positions
    layer_kinds                    tuple of "global" | "local", one per layer
    rope                           {"theta", "scaling", "local_theta", "local_scaling"}, see models/rope.py
    bos pad                        int, -1 = none
    eos                            tuple of int

`norm_plus_one`: a norm multiplies by 1 + w. `qk_permuted`: rows of q and k (and their biases) are stored for
adjacent-pair RoPE, row h*d + 2i + s of the file is row h*d + s*d/2 + i of the half-split convention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.formats import FORMATS as FORMATS


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: `shape` in numpy order ([N out, K in]), `format` in FORMATS or the name on disk."""

    name: str
    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TokenizerFiles:
    """What the artifact stores of a tokenizer: file name -> contents (runtime/tokenizer.py reads them)."""

    files: Mapping[str, bytes]

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (directory / name).write_bytes(data)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, opened but not read.

    `read(name)` maps the raw data, read-only: uint8 [N, row bytes] for block formats, else the logical shape
    in float32, float16 or ml_dtypes.bfloat16; LoadError if the tensor is missing or its format unknown.
    `tokenizer()` converts the tokenizer (seconds for large vocabularies); None when the checkpoint has none.
    `ignored`: tensors on disk that are left out, and why. `orders`: of a matrix whose columns are stored in another
    order than its input's, the place in the input of each.
    `problems` names the tensors whose format is not in FORMATS; an importer that needs one must stop.
    """

    path: Path
    source: str
    family: str
    hyper: dict[str, Any]
    tensors: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    tokenizer: Callable[[], TokenizerFiles] | None = None
    problems: tuple[str, ...] = ()
    files: tuple[Path, ...] = field(default=())
    ignored: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, np.ndarray] = field(default_factory=dict)
