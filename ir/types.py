"""Types of IR values: tensors with symbolic row counts, KV caches, and the step's state.

Two dimensions are symbolic: `R`, the rows of this step, and `L`, the rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .errors import CompileError, expect
from .limits import PAGE_TOKENS

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
    """Keys and values of one layer: `kv[kv_heads, head_dim, window]`; window 0 keeps every position.

    `kv[.., window, sinks]` keeps the first `sinks` positions besides (StreamingLLM, arXiv 2309.17453), at the
    positions they have: a row at p sees 0 .. sinks-1 and its window.
    """

    kv_heads: int
    head_dim: int
    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        most = PAGE_TOKENS if self.window else 0
        expect(
            0 <= self.sinks <= most,
            f"expected 0 to {most} sinks of a cache with window {self.window}, got {self.sinks}",
            hint="sinks are positions of the first page, kept where a window would leave them",
        )

    def __str__(self) -> str:
        sinks = f", {self.sinks}" if self.sinks else ""
        return f"kv[{self.kv_heads}, {self.head_dim}, {self.window}{sinks}]"

    def seen(self, position: int) -> tuple[int, int]:
        """What a row at `position` sees: its sinks before the window, 0 .. s-1, and first .. position: (s, first)."""
        return seen(position, self.window, self.sinks)


def seen(position: int, window: int, sinks: int) -> tuple[int, int]:
    """`CacheType.seen`. Where the window reaches back to a sink, it counts as the window's."""
    first = max(0, position - window + 1) if window else 0
    return min(sinks, first), first


def seen_tokens(position: int, window: int, sinks: int) -> int:
    """Of how many positions a row at `position` reads keys and values."""
    before, first = seen(position, window, sinks)
    return before + position + 1 - first


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
