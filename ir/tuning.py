"""Choices: numbers that change how fast a step is, never what a row computes from its inputs beyond rounding.

Every number that a person or `onelaunch autotune` may choose is one entry of CHOICES, with the default, what else is
worth trying, and which phases feel it. `Tuning` holds values; `Tuning()` is what is compiled where nobody chose.
Passes take it as an input: the tile pass writes what is a phase's own into the phase, the schedule carries the rest.

    Tuning.of({"panel": 6, "fetch": 2048})                    # for every phase
    Tuning.of({"fetch decoder.gate_up": 4096})                # of one phase

A new choice is an entry here and a use in the pass or the generator that honours it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UsageError, expect, nearest
from .limits import PAGE_TOKENS

CPU, GPU = "cpu", "gpu"
MATRICES, EVERY = ("linear", "experts"), ("rows", "linear", "experts", "attend")


@dataclass(frozen=True)
class Choice:
    """One degree of freedom. `target`: cpu, gpu or both; `anchors`: kinds of phases that feel it.

    home: `limits` where the runtime must know it, `phase` where each phase may have its own, else `schedule`.
    exact: whether every value gives the same bits.
    """

    name: str
    target: str
    default: int
    values: tuple[int, ...]
    unit: str
    anchors: tuple[str, ...]
    about: str
    home: str = "schedule"
    exact: bool = True


CHOICES = {
    c.name: c
    for c in (
        Choice("threads", CPU, 0, (0, 1, 2, 4, 8, 16), "threads", EVERY,
               "workers of a step where nobody says; 0: one per core", "host"),
        Choice("panel", CPU, 0, (0, 2, 3, 4, 6, 8), "rows", MATRICES,
               "of activations that one pass over a tile takes where one does not take all; 0: as suits the level"),
        Choice("block", CPU, 32, (24, 30, 32, 48, 64), "rows", MATRICES,
               "that meet a tile before the next tile is read"),
        Choice("few_rows", "both", 0, (0, 1, 4, 8, 16, 32), "rows", EVERY,
               "up to which every worker packs for itself, rows on a GPU meet weights one by one on CUDA cores, and "
               "attention is split; above, packs are shared and matrices go through tensor cores; 0: as compiled for",
               "limits"),
        Choice("split", "both", 256, (128, 256, 512), "tokens", ("attend", "linear"),
               "of an attention split, the least that workers share out", "limits", exact=False),
        Choice("fetch", CPU, 1024, (512, 1024, 2048, 4096), "bytes", MATRICES,
               "from a load of weights to the prefetch beside it", "phase"),
        Choice("cache_fetch", CPU, 2048, (1024, 2048, 4096), "bytes", ("attend",),
               "from a load of keys or values to the prefetch beside it"),
        Choice("ahead", CPU, 16 << 10, (0, 4 << 10, 16 << 10, 64 << 10), "bytes", MATRICES,
               "of its next weights that a worker asks for before a join"),
        Choice("warps", GPU, 8, (4, 8, 16), "warps", EVERY, "of a worker's block"),
        Choice("chunk", GPU, 32, (16, 32, 64), "blocks of 32 k", MATRICES, "in a chunk of the weight stream"),
        Choice("ring", GPU, 8, (2, 3, 4, 6, 8), "chunks", MATRICES, "of the weight stream on their way, at most"),
        Choice("ahead_part", GPU, 2, (2, 4, 8), "parts of L2", MATRICES,
               "one of so many is asked to hold what comes after a join"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """Values of choices, only those that differ from the default, sorted; keys are `CHOICE` or `CHOICE GRAPH.PHASE`."""

    values: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tuning:
        """UsageError names every key that is no choice and every value that is no number it takes."""
        reasons = [reason for key, value in values.items() if (reason := _wrong(key, value))]
        if reasons:
            first = next(iter(k.partition(" ")[0] for k in values if k.partition(" ")[0] not in CHOICES), "")
            raise UsageError(reasons, hint=nearest(first, CHOICES) if first else "")
        kept = {k: int(v) for k, v in values.items() if " " in k or int(v) != CHOICES[k].default}
        return cls(tuple(sorted(kept.items())))

    def __getitem__(self, name: str) -> int:
        return dict(self.values).get(name, CHOICES[name].default)

    def of_phase(self, name: str, graph: str, phase: str) -> int:
        """What one phase has: its own value, else everybody's."""
        return dict(self.values).get(f"{name} {graph}.{phase}", self[name])

    def only(self, target: str) -> Tuning:
        """The part that one kind of target, cpu or gpu, is compiled by; choices for both are left out."""
        return Tuning(tuple((k, v) for k, v in self.values if CHOICES[k.partition(" ")[0]].target == target))

    def __or__(self, other: Tuning) -> Tuning:
        return Tuning(tuple(sorted({**dict(self.values), **dict(other.values)}.items())))

    def as_dict(self) -> dict[str, int]:
        return dict(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.values) or "defaults"


UNTUNED = Tuning()


def _wrong(key: str, value: Any) -> str:
    name, _, phase = key.partition(" ")
    choice = CHOICES.get(name)
    if choice is None:
        return f"tuning: expected a choice, one of {', '.join(CHOICES)}, got `{name}`"
    if phase and choice.home != "phase":
        return f"tuning: expected one value of `{name}` for all phases, got one for `{phase}`"
    if isinstance(value, bool) or not isinstance(value, int) or not _accepts(choice, value):
        return f"tuning: expected `{key}` {_range(choice)}, got `{value}`"
    return ""


LIMITS = {  # least, most, and what values are multiples of: what the generators can take
    "threads": (0, 256, 1), "fetch": (0, 1 << 20, 64), "cache_fetch": (0, 1 << 20, 64), "ahead": (0, 16 << 20, 128),
    "panel": (0, 8, 1), "block": (1, 256, 1), "few_rows": (0, 64, 1), "split": (PAGE_TOKENS, 1 << 16, PAGE_TOKENS),
    "warps": (4, 16, 4), "chunk": (16, 64, 16), "ring": (2, 8, 1), "ahead_part": (1, 64, 1),
}  # fmt: skip


def _accepts(choice: Choice, value: int) -> bool:
    least, most, step = LIMITS[choice.name]
    return least <= value <= most and value % step == 0


def _range(choice: Choice) -> str:
    least, most, step = LIMITS[choice.name]
    return f"from {least} to {most}" + (f" in steps of {step}" if step > 1 else "")


def check_target(tuning: Tuning, target: str) -> None:
    """CompileError for a choice that a target has not."""
    for key, _ in tuning.values:
        choice = CHOICES[key.partition(" ")[0]]
        expect(choice.target in (target, "both"), f"tuning: `{key}` is a choice of {choice.target}, got {target}")
