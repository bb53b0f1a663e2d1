"""The processor's part of an artifact: C++ of one step, a library per level, a task table per thread count."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..codegen.cpu.render import render_step
from ..ir.table import WeightPlan, lower
from .artifact import ArtifactFolder, stack_tables
from .build import Level, compile_library
from .lowering import Lowered


@dataclass(frozen=True)
class NativeCode:
    """C++ by level name; task tables by thread count, int32 [2 buckets, workers, records, 32]."""

    texts: dict[str, str]
    tables: dict[int, np.ndarray]


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
    return NativeCode({name: source.text for name, source in sources.items()}, tables)


def build_native(
    level: Level, text: str, folder: ArtifactFolder, reuse: Path | None = None
) -> tuple[dict[str, Any], float]:
    """Compile one level into the artifact; its target entry and the seconds it took.

    reuse: a folder of libraries by the digest of their source, to take one from and to leave one in.
    """
    start = time.perf_counter()
    source, library = (folder.path(f"kernels/{level.name}/step.{suffix}") for suffix in ("cpp", "so"))
    source.write_text(text)
    entry = {
        "library": f"kernels/{level.name}/step.so",
        "level": level.number,
        "isa": list(level.isa),
        "compiler": _compile(source, library, level, reuse),
    }
    return entry, time.perf_counter() - start


def _compile(source: Path, library: Path, level: Level, reuse: Path | None) -> str:
    """`compile_library`, unless the same source was compiled into `reuse` before."""
    if reuse is None:
        return compile_library(source, library, level)
    kept = reuse / f"{hashlib.sha256(source.read_bytes() + level.name.encode()).hexdigest()}.so"
    if not kept.with_suffix(".txt").exists():
        version = compile_library(source, library, level)
        shutil.copy(library, kept)
        kept.with_suffix(".txt").write_text(version)
    shutil.copy(kept, library)
    return kept.with_suffix(".txt").read_text()
