"""Artifacts of tiny checkpoints: one run of the C++ compiler per distinct source and level."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.compiler import driver, native
from onelaunch.compiler.build import LEVELS, Level, host_flags
from onelaunch.ir.limits import Limits
from onelaunch.runtime import Model

compile_library = native.compile_library


class ArtifactCache:
    """`cache(checkpoint, quant="int4", limits={"rows": 64})`: the artifact, made at the first call only."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, dict[tuple[Any, ...], Path]()

    def __call__(
        self,
        checkpoint: Path,
        *,
        target: str = "auto",
        quant: str = "",
        workers: tuple[int, ...] = (2,),
        limits: dict[str, Any] | None = None,
        draft: Path | None = None,
        window: int = 0,
        sinks: int = 0,
    ) -> Path:
        limits = limits or {}
        key = (checkpoint, target, quant, workers, draft, window, sinks, *sorted(limits.items()))
        if key not in self._made:
            output = self._folder / f"artifact{len(self._made)}"
            made = Limits(**limits)
            more = {"draft": draft, "window": window, "sinks": sinks}
            driver.compile_model(driver.Request(checkpoint, output, target, made, workers, quant, **more))
            self._made[key] = output
        return self._made[key]

    def library(self, sources: Sequence[Path], library: Path, level: Level) -> str:
        """In place of `compile_library`."""
        digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources) + level.name.encode()).hexdigest()
        kept, version = self._folder / f"{digest}.so", self._folder / f"{digest}.txt"
        if not version.exists():
            version.write_text(compile_library(sources, kept, level))
        shutil.copy(kept, library)
        return version.read_text()


def host_targets() -> list[str]:
    """The targets this machine can run."""
    return [name for name, level in LEVELS.items() if set(level.isa) <= host_flags()]


def all_logits(model: Model, tokens: list[int], chunk: int, slot: int = 0) -> np.ndarray:
    """Logits [len(tokens), vocab] of every position of a slot, `chunk` rows a step."""
    model.reset()
    rows = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        n = len(part)
        rows.append(model.step(part, [slot] * n, range(start, start + n), range(n)))
    return np.concatenate(rows)


def relative_errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|got - expected| / |expected| of every row."""
    return np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
