"""One quantised matrix of a Hugging Face checkpoint: the tensors it is made of, and how they become our disk rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.formats import FORMATS
from .checkpoint import TensorInfo

Array = np.ndarray


@dataclass(frozen=True)
class Settings:
    """What config.json says about quantisation, where tensors do not: `method` and all fields as they are."""

    method: str
    fields: Mapping[str, Any]

    def weights(self) -> list[Mapping[str, Any]]:
        """The schemes for weights in `config_groups`."""
        groups = self.fields.get("config_groups") or {}
        found = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        return [w for w in found if isinstance(w, dict)]

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale. Never a guess from shapes: 1000 rows in 8 parts are not of 125."""
        given = [w.get("block_structure") for w in self.weights()] + [self.fields.get("weight_block_size")]
        sizes = {tuple(b) for b in given if isinstance(b, list) and len(b) == 2 and all(type(n) is int for n in b)}
        return sizes.pop() if len(sizes) == 1 else None  # type: ignore[return-value]


@dataclass(frozen=True)
class Module:
    """The tensors `base.LEAF`, by leaf; `read` maps one in its own type (floats of 8 bits as bytes)."""

    base: str
    tensors: Mapping[str, TensorInfo]
    reading: Callable[[str], Array]
    settings: Settings

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.tensors

    def dtype(self, leaf: str) -> str:
        return self.tensors[leaf].format if leaf in self.tensors else ""

    def shape(self, leaf: str) -> tuple[int, ...]:
        return self.tensors[leaf].shape if leaf in self.tensors else ()

    def read(self, leaf: str) -> Array:
        return self.reading(self.tensors[leaf].name)

    def floats(self, leaf: str) -> Array:
        return self.read(leaf).astype(np.float32)

    def whole(self, leaf: str) -> int:
        return int(np.prod(self.shape(leaf))) if leaf in self else 0


@dataclass(frozen=True)
class Made:
    """A matrix [N, K] in one of our formats. `used`: leaves it is made of; `order`: which column of x each of its own
    is multiplied with, if not the same."""

    format: str
    shape: tuple[int, int]
    load: Callable[[], Array]
    used: tuple[str, ...]
    order: Array | None = None


def misfit(module: Module, made: Made) -> str:
    """Why the packed form cannot hold it, empty if it can."""
    fmt, k = FORMATS[made.format], made.shape[1]
    step = max(fmt.disk_block, 32 * fmt.packed_blocks)
    if k % fmt.disk_block or (not fmt.dense and k % step):
        return f"`{module.base}`: expected rows of a multiple of {step} weights for format `{fmt.name}`, got {k}"
    return ""


def rows_of(records: Array, trailer: Array | None = None) -> Array:
    """Records [N, ..] and scales after them [N, count] as bytes u8 [N, row bytes]."""
    body = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), -1)
    if trailer is None:
        return body
    return np.concatenate([body, np.ascontiguousarray(trailer).view(np.uint8).reshape(len(records), -1)], axis=1)


def nibbles(words: Array) -> Array:
    """Bytes or words [.., n] to codes of four bits u8 [.., n * per], the lowest first."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-1], -1)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def halves(codes: Array, group: int) -> Array:
    """Codes u8 [N, K] as GGUF has them, u8 [N, K / group, group / 2]: i in the low nibble, then i + group / 2."""
    split = codes.reshape(len(codes), -1, 2, group // 2)
    return split[:, :, 0] | split[:, :, 1] << 4
