"""Types of IR values: tensors with symbolic row counts, KV caches, and the step's state.

Two dimensions are symbolic: `R`, the rows of this step, and `L`, the rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .errors import CompileError

Dim: TypeAlias = int | str
ROWS = "R"
OUTPUTS = "L"
PLAIN_DTYPES = ("f32", "f16", "bf16", "i32")


@dataclass(frozen=True)
class TensorType:
    """`dtype[shape]`; dtype is a plain type or the name of a weight format (`q4_0[N out, K in]`)."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def width(self) -> int:
        """The last axis, which is never symbolic in a valid program."""
        last = self.shape[-1]
        assert isinstance(last, int), self
        return last


@dataclass(frozen=True)
class CacheType:
    """Keys and values of one layer: `kv[kv_heads, head_dim, window]`; window 0 keeps every position."""

    kv_heads: int
    head_dim: int
    window: int

    def __str__(self) -> str:
        return f"kv[{self.kv_heads}, {self.head_dim}, {self.window}]"


@dataclass(frozen=True)
class StateType:
    """`rows`: token, slot and position of each row. `slots`: the live sequences and their sampling."""

    name: str

    def __str__(self) -> str:
        return self.name


Type: TypeAlias = TensorType | CacheType | StateType
STATES = ("rows", "slots")


@dataclass(frozen=True)
class Value:
    """A named value. Names are unique in a graph; weights are named `w.NAME`."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"

    @property
    def tensor(self) -> TensorType:
        if isinstance(self.type, TensorType):
            return self.type
        raise CompileError(f"`{self.name}`: expected a tensor, got {self.type}")

    @property
    def cache(self) -> CacheType:
        if isinstance(self.type, CacheType):
            return self.type
        raise CompileError(f"`{self.name}`: expected a kv cache, got {self.type}")

    @property
    def is_weight(self) -> bool:
        return self.name.startswith("w.")
