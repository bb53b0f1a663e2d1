"""The processor's part of an artifact: C++ of one step, a library per level, a task table per thread count."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..codegen.cpu.render import render_step
from ..codegen.cpu.units import STEP
from ..ir.table import WeightPlan, lower
from .artifact import ArtifactFolder, stack_tables
from .build import Level, compile_library
from .lowering import Lowered


@dataclass(frozen=True)
class NativeCode:
    """C++ by level name and file name; task tables by thread count, int32 [2 buckets, workers, records, 32]."""

    units: dict[str, dict[str, str]]
    tables: dict[int, np.ndarray]

    @property
    def steps(self) -> list[str]:
        """What is the model's own, of every level."""
        return [units[STEP] for units in self.units.values()]


def render_native(levels: Sequence[Level], lowered: Lowered, threads: Sequence[int], plan: WeightPlan) -> NativeCode:
    """The bodies are the same for every level and thread count: only the tables tell threads apart."""
    if not levels:
        return NativeCode({}, {})
    sources = {level.name: render_step(lowered.rendered(threads), level.number) for level in levels}
    bodies = sources[levels[0].name].bodies
    tables = {
        count: stack_tables({b: lower(s, bodies[b], plan) for b, s in lowered.schedules[count].items()})
        for count in threads
    }
    return NativeCode({name: source.units for name, source in sources.items()}, tables)


def build_native(
    level: Level, units: Mapping[str, str], folder: ArtifactFolder, reuse: Path | None = None
) -> tuple[dict[str, Any], float]:
    """Compile one level into the artifact; its target entry and the seconds it took.

    reuse: a folder of libraries by the digest of their source, to take one from and to leave one in.
    """
    start = time.perf_counter()
    library = f"kernels/{level.name}/step.so"
    sources = [folder.path(f"kernels/{level.name}/{name}.cpp") for name in units]
    for source, text in zip(sources, units.values(), strict=True):
        source.write_text(text)
    entry = {
        "library": library,
        "level": level.number,
        "isa": list(level.isa),
        "compiler": _compile(sources, folder.path(library), level, reuse),
    }
    return entry, time.perf_counter() - start


def _compile(sources: Sequence[Path], library: Path, level: Level, reuse: Path | None) -> str:
    """`compile_library`, unless the same sources were compiled into `reuse` before."""
    if reuse is None:
        return compile_library(sources, library, level)
    texts = [level.name, *(source.read_text() for source in sources)]
    kept = reuse / f"{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()}.so"
    if not kept.with_suffix(".txt").exists():
        version = compile_library(sources, library, level)
        shutil.copy(library, kept)
        kept.with_suffix(".txt").write_text(version)
    shutil.copy(kept, library)
    return kept.with_suffix(".txt").read_text()
