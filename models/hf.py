"""Hugging Face checkpoints: a directory of config.json and (sharded) safetensors.

What config.json means is in hf_config.py. Pickled weights are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from ..ir.errors import LoadError
from .checkpoint import FORMATS, Checkpoint, TensorInfo, TokenizerFiles
from .hf_config import hf_hyper
from .hf_experts import gpt_oss_tensors
from .json_file import read_json
from .safetensors import Slice, read_slices
from .tokenizer_files import convert_hf_tokenizer

BYTES = np.dtype(np.uint8)  # of formats that a family's own reader puts together
DENSE: dict[str, tuple[str, np.dtype]] = {
    "F32": ("f32", np.dtype(np.float32)),
    "F16": ("f16", np.dtype(np.float16)),
    "BF16": ("bf16", np.dtype(ml_dtypes.bfloat16)),
}
INDEX = "model.safetensors.index.json"


def open_hf(directory: Path, ignore: frozenset[str] = frozenset()) -> Checkpoint:
    """Open a directory. `ignore`: config fields to pass over although we do not know them."""
    family, hyper = read_hf_config(directory, ignore)
    slices = _all_slices(directory)
    tensors = {n: TensorInfo(n, DENSE.get(s.dtype, (s.dtype,))[0], s.shape) for n, s in slices.items()}

    def read(name: str) -> np.ndarray:
        if name not in slices:
            raise LoadError(f"no tensor `{name}` in the checkpoint", place=str(directory))
        return _map_tensor(name, slices[name])

    tensors, reading = gpt_oss_tensors(tensors, read) if family == "gpt_oss" else (tensors, read)
    problems = tuple(
        f"tensor `{t.name}`: dtype `{t.format}` is not supported"
        for t in tensors.values()
        if t.format not in FORMATS
    )
    files = tuple(sorted({s.file for s in slices.values()}))
    tokenizer = tokenizer_of(directory, hyper)
    return Checkpoint(directory, "hf", family, hyper, tensors, reading, tokenizer, problems, files)


def read_hf_config(directory: Path, ignore: frozenset[str]) -> tuple[str, dict[str, Any]]:
    """Family and canonical hyper-parameters of a directory."""
    generation = directory / "generation_config.json"
    settings = read_json(generation) if generation.is_file() else {}
    return hf_hyper(read_json(directory / "config.json"), settings, str(directory), ignore)


def tokenizer_of(directory: Path, hyper: Mapping[str, Any]) -> Callable[[], TokenizerFiles] | None:
    """What converts the directory's tokenizer; None if it has none."""
    if not any((directory / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return lambda: convert_hf_tokenizer(directory, hyper["eos"])


def _map_tensor(name: str, part: Slice) -> np.ndarray:
    if part.dtype not in (*DENSE, "U8"):
        raise LoadError(f"tensor `{name}`: dtype `{part.dtype}` is not supported", place=str(part.file))
    return part.map().view(BYTES if part.dtype == "U8" else DENSE[part.dtype][1]).reshape(part.shape)


def _all_slices(directory: Path) -> dict[str, Slice]:
    index = directory / INDEX
    if index.is_file():
        return _sharded(directory, read_json(index, 1 << 28))
    files = sorted(directory.glob("*.safetensors"))
    if (directory / "model.safetensors").is_file():
        files = [directory / "model.safetensors"]
    if len(files) == 1:
        return read_slices(files[0])
    if files:
        names = ", ".join(f"`{f.name}`" for f in files)
        raise LoadError(f"expected {INDEX} beside several shards, got only {names}", place=str(directory))
    pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pth"))
    raise LoadError(
        "expected *.safetensors, got " + ("pickled weights, which can run code" if pickled else "none"),
        place=str(directory),
        hint="save the model again with `model.save_pretrained(..., safe_serialization=True)`",
    )


def _sharded(directory: Path, index: dict[str, Any]) -> dict[str, Slice]:
    """The tensors of all shards: each shard must hold what the index says, and no name may be in two."""
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(_is_plain(f) for f in weight_map.values())
        or not weight_map
    ):
        raise LoadError(
            "`weight_map`: expected tensor names with plain file names", place=str(directory / INDEX)
        )
    names = sorted(set(weight_map.values()))
    reasons = [f"missing shard `{name}`" for name in names if not (directory / name).is_file()]
    slices: dict[str, Slice] = {}
    for name in names if not reasons else []:
        try:
            shard = read_slices(directory / name)
        except LoadError as error:
            reasons += [f"shard `{name}`: {reason}" for reason in error.reasons]
            continue
        reasons += [f"tensor `{t}` is in `{name}` and `{slices[t].file.name}`" for t in shard if t in slices]
        promised = [tensor for tensor, file in weight_map.items() if file == name]
        reasons += [f"tensor `{t}`: not in shard `{name}`" for t in promised if t not in shard]
        slices |= shard
    if reasons:
        raise LoadError(reasons, place=str(directory), hint="fetch the checkpoint again")
    return slices


def _is_plain(name: object) -> bool:
    """A file name with no directory in it, so that an index cannot reach outside its own folder."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
        and "\0" not in name
    )
