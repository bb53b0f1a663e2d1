"""What a checkpoint would hold, from its family's text alone: tensor names and shapes, no data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import LoadError
from ..ir.model_text import ModelText, WeightText
from .checkpoint import Checkpoint, TensorInfo
from .hf import read_hf_config, tokenizer_of
from .importer import complete, family_text
from .instantiate import evaluate_number

FORMAT = "bf16"  # of matrices: how models are published


def open_shapes(directory: Path, ignore: frozenset[str] = frozenset()) -> Checkpoint:
    """A Hugging Face directory without weights: every tensor its config asks for, as bf16; `read` is a LoadError."""
    family, hyper = read_hf_config(directory, ignore)
    shapes = tensor_shapes(family_text(family), hyper)

    def read(name: str) -> np.ndarray:
        raise LoadError(
            f"tensor `{name}`: expected *.safetensors, got none",
            place=str(directory),
            hint="this directory has a configuration but no weights: `--no-weights` compiles it",
        )

    tensors = {name: TensorInfo(name, FORMAT, shape) for name, shape in shapes.items()}
    return Checkpoint(directory, "hf", family, hyper, tensors, read, tokenizer_of(directory, hyper))


def tensor_shapes(text: ModelText, hyper: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape by Hugging Face name of every tensor that a checkpoint of `text` with these hyper-parameters holds."""
    full, _ = complete(dict(hyper))
    shapes: dict[str, tuple[int, ...]] = {}
    for owner, weights in text.weights:
        for layer in range(full["layers"]) if owner else (-1,):
            shapes |= _places(weights, layer, full)
    return shapes


def _places(weights: tuple[WeightText, ...], layer: int, hyper: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape of what a checkpoint must hold."""
    found: dict[str, tuple[int, ...]] = {}
    for w in weights:
        if w.constant or (w.otherwise and hyper["tied"]):
            continue
        name = dict(w.places).get("hf", w.name).replace("{i}", str(layer))
        shape = tuple(int(evaluate_number(s, hyper)) for s in w.shape)
        if "{e}" in name:  # a tensor per expert
            found |= {name.replace("{e}", str(e)): shape[1:] for e in range(shape[0])}
        else:
            found[name] = shape
    return found
