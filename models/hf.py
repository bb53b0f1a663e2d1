"""Hugging Face checkpoints: a directory of config.json and (sharded) safetensors.

What config.json means is in hf_config.py. Pickled weights are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from ..ir.errors import LoadError
from .checkpoint import FORMATS, Checkpoint, TensorInfo, TokenizerFiles
from .hf_config import hf_hyper
from .hf_experts import gpt_oss_tensors
from .hf_quant import Quantised, quantisation, quantised_tensors
from .json_file import read_json
from .safetensors import Slice, read_slices
from .tokenizer_files import convert_hf_tokenizer

BYTES = np.dtype(np.uint8)  # of formats that a family's own reader puts together
DENSE: dict[str, tuple[str, np.dtype]] = {
    "F32": ("f32", np.dtype(np.float32)),
    "F16": ("f16", np.dtype(np.float16)),
    "BF16": ("bf16", np.dtype(ml_dtypes.bfloat16)),
}
WHOLE: dict[str, np.dtype] = {
    **{n: dtype for n, (_, dtype) in DENSE.items()},
    "I8": np.dtype("i1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip
SETTINGS = ("quantization_config", "compression_config")
INDEX = "model.safetensors.index.json"


def open_hf(directory: Path, ignore: frozenset[str] = frozenset()) -> Checkpoint:
    """Open a directory. `ignore`: config fields to pass over although we do not know them."""
    config = read_json(directory / "config.json")
    settings = quantisation(config, _optional(directory / "hf_quant_config.json"))
    own = settings if config.get("model_type") != "gpt_oss" else None  # whose family reads its own way of storing
    try:
        family, hyper = read_hf_config(directory, ignore, {} if own is None else dict.fromkeys(SETTINGS))
        reasons: list[str] = []
    except LoadError as error:
        if own is None:
            raise
        family, hyper, reasons = "", {}, list(error.reasons)
    slices = _all_slices(directory)
    tensors = {n: TensorInfo(n, DENSE.get(s.dtype, (s.dtype,))[0], s.shape) for n, s in slices.items()}

    def read(name: str) -> np.ndarray:
        if name not in slices:
            raise LoadError(f"no tensor `{name}` in the checkpoint", place=str(directory))
        return _map_tensor(name, slices[name])

    quantised = Quantised(tensors, read)
    if own is not None:
        on_disk = {n: TensorInfo(n, s.dtype, s.shape) for n, s in slices.items()}
        quantised = quantised_tensors(on_disk, lambda n: _map_any(slices[n]), own)
        if reasons := reasons + quantised.reasons:
            raise LoadError(reasons, place=str(directory))
        named = {n: replace(t, format=DENSE.get(t.format, (t.format,))[0]) for n, t in quantised.tensors.items()}
        quantised = replace(quantised, tensors=named)
    found, reading = quantised.tensors, quantised.read
    found, reading = gpt_oss_tensors(found, reading) if family == "gpt_oss" else (found, reading)
    problems = tuple(
        f"tensor `{t.name}`: dtype `{t.format}` is not supported" for t in found.values() if t.format not in FORMATS
    )
    files = tuple(sorted({s.file for s in slices.values()}))
    tokenizer = tokenizer_of(directory, hyper)
    return Checkpoint(
        directory, "hf", family, hyper, found, reading, tokenizer, problems, files, quantised.ignored, quantised.orders
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_hf_config(
    directory: Path, ignore: frozenset[str], instead: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, dict[str, Any]]:
    """Family and canonical hyper-parameters of a directory; `instead`: fields that are read elsewhere, as null."""
    config = read_json(directory / "config.json")
    config |= {name: value for name, value in instead.items() if name in config}
    return hf_hyper(config, _optional(directory / "generation_config.json"), str(directory), ignore)


def tokenizer_of(directory: Path, hyper: Mapping[str, Any]) -> Callable[[], TokenizerFiles] | None:
    """What converts the directory's tokenizer; None if it has none."""
    if not any((directory / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return lambda: convert_hf_tokenizer(directory, hyper["eos"])


def _map_tensor(name: str, part: Slice) -> np.ndarray:
    if part.dtype not in (*DENSE, "U8"):
        raise LoadError(f"tensor `{name}`: dtype `{part.dtype}` is not supported", place=str(part.file))
    return part.map().view(BYTES if part.dtype == "U8" else DENSE[part.dtype][1]).reshape(part.shape)


def _map_any(part: Slice) -> np.ndarray:
    """A tensor in its own type, floats of eight bits as bytes; those of four, two in a byte, without their shape."""
    raw = part.map().view(WHOLE.get(part.dtype, BYTES))
    return raw.reshape(*part.shape[:-1], -1) if part.shape else raw


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
