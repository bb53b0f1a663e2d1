"""Compile a checkpoint to an artifact: import, passes, code, packing, one progress line each."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..codegen.cpu.render import render_step
from ..ir.errors import UsageError, expect, nearest
from ..ir.limits import Limits
from ..ir.schedule import Schedule
from ..ir.table import lower
from ..ir.text import show
from ..models.checkpoint import Checkpoint
from ..models.importer import Imported, import_checkpoint
from ..models.open import open_checkpoint
from ..passes import Options
from .artifact import ArtifactFolder, manifest, stack_tables
from .build import LEVELS, Level, compile_library, host_level
from .lowering import (
    Dump,
    Lowered,
    Progress,
    check_edited,
    finish_schedules,
    lower_program,
    read_dump,
    run_graph_passes,
)
from .weights import PackedWeight, packed_weights, weight_plan, write_weights

DEFAULT_WORKERS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Request:
    """What to compile and for what. `workers` are the thread counts to make task tables for.

    fit_context: shorten `limits.context` to what the model was trained for instead of refusing more.
    """

    model: Path
    output: Path
    target: str = "auto"
    limits: Limits = field(default_factory=Limits)
    workers: Sequence[int] = ()
    quant: str = ""
    ignore_config: frozenset[str] = frozenset()
    start_from: Path | None = None
    fit_context: bool = False


def silent(phase: str, seconds: float, detail: str) -> None:
    """A Progress that prints nothing."""


def target_level(name: str) -> Level:
    """The level of a target name; `auto` and `cpu` are this machine's best."""
    if name in ("auto", "cpu"):
        return host_level()
    if name not in LEVELS:
        raise UsageError(
            f"--target: expected auto, cpu or one of {', '.join(LEVELS)}, got `{name}`",
            hint=nearest(name, LEVELS),
        )
    return LEVELS[name]


def worker_counts(request: Request) -> tuple[int, ...]:
    counts = tuple(request.workers) or (*DEFAULT_WORKERS, os.cpu_count() or 1)
    expect(all(1 <= w <= 256 for w in counts), f"--threads: expected 1 to 256, got {list(counts)}")
    return tuple(sorted(set(counts)))


def compile_model(request: Request, dump: Dump | None = None, progress: Progress = silent) -> Path | None:
    """Compile; returns the artifact's path, or None when `dump.stop_after` ended it early."""
    start = time.perf_counter()
    target_level(request.target)  # a wrong name is told before the checkpoint is read
    imported = import_checkpoint(open_checkpoint(request.model, request.ignore_config))
    return compile_imported(imported, request, dump, progress, start)


def compile_imported(
    imported: Imported,
    request: Request,
    dump: Dump | None = None,
    progress: Progress = silent,
    start: float | None = None,
) -> Path | None:
    """The same from a checkpoint that is bound to its family's text already; `start`: when that began."""
    dump, checkpoint = dump or Dump(), imported.checkpoint
    start = time.perf_counter() if start is None else start
    level = target_level(request.target)
    limits = _fit_context(request, checkpoint)
    progress("import", time.perf_counter() - start, f"{checkpoint.family}, {len(checkpoint.tensors)} tensors")
    dump.keep("import", show(imported.program))
    if dump.stops("import"):
        return None
    lowered = _lower(request, imported, limits, dump, progress)
    return None if lowered is None else _emit(request, imported, lowered, limits, level, dump, progress)


def _fit_context(request: Request, checkpoint: Checkpoint) -> Limits:
    """No more positions than the model was trained for."""
    trained, limits = checkpoint.hyper["context"], request.limits
    if request.fit_context:
        return replace(limits, context=min(limits.context, trained))
    expect(
        limits.context <= trained,
        f"--context: expected at most {trained}, the model's own, got {limits.context}",
    )
    return limits


def _lower(
    request: Request, imported: Imported, limits: Limits, dump: Dump, progress: Progress
) -> Lowered | None:
    options = Options(request.quant)
    if request.start_from is None:
        program = run_graph_passes(imported.program, options, dump, progress, "import")
        return None if dump.stop_after in _graph_names() else lower_program(
            program, limits, worker_counts(request), dump, progress
        )
    found, after = read_dump(request.start_from)
    if isinstance(found, Schedule):
        check_edited(found.program, imported.program)
        expect(found.limits == limits, "--start-from: the schedule was made for other limits")
        rest = lower_program(found.program, limits, worker_counts(request), Dump(), silent)
        assert rest is not None
        made = {**rest.schedules, found.workers: {**rest.schedules[found.workers], found.bucket: found}}
        return finish_schedules(found.program, made, (found.workers, found.bucket), dump, progress, after)
    check_edited(found, imported.program)
    program = run_graph_passes(found, options, dump, progress, after)
    if dump.stop_after in _graph_names():
        return None
    return lower_program(program, limits, worker_counts(request), dump, progress)


def _graph_names() -> tuple[str, ...]:
    from ..passes import GRAPH_PASSES

    return tuple(name for name, _ in GRAPH_PASSES)


def _emit(
    request: Request,
    imported: Imported,
    lowered: Lowered,
    limits: Limits,
    level: Level,
    dump: Dump,
    progress: Progress,
) -> Path | None:
    start = time.perf_counter()
    weights = packed_weights(lowered.program)
    plan = weight_plan(weights)
    sources = {w: render_step(s, level.number) for w, s in lowered.schedules.items()}
    text = next(iter(sources.values())).text
    tables = {
        w: stack_tables({b: lower(s, sources[w].bodies[b], plan) for b, s in schedules.items()})
        for w, schedules in lowered.schedules.items()
    }
    rendering = time.perf_counter() - start
    dump.keep("codegen", text, "cpp")
    if dump.stops("codegen"):
        progress("codegen", rendering, f"{text.count(chr(10))} lines of C++")
        return None
    folder = ArtifactFolder(request.output)
    try:
        # The C++ compiler is another process: weights are packed meanwhile.
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(_build, folder, text, level)
            _pack(folder, weights, imported, progress)
            compiler, seconds = building.result()
        progress("codegen", rendering + seconds, f"{text.count(chr(10))} lines of C++ for {level.name}")
        _write_rest(folder, request, imported, lowered, tables, dump)
        folder.commit(
            manifest(
                lowered.program, limits, lowered.schedules, weights,
                _more(request, imported, lowered, folder, level, compiler),
            )
        )  # fmt: skip
    except BaseException:
        folder.discard()
        raise
    return request.output


def _build(folder: ArtifactFolder, text: str, level: Level) -> tuple[str, float]:
    start = time.perf_counter()
    source, library = (folder.path(f"kernels/{level.name}/step.{suffix}") for suffix in ("cpp", "so"))
    source.write_text(text)
    version = compile_library(source, library, level)
    return version, time.perf_counter() - start


def _pack(folder: ArtifactFolder, weights: list[PackedWeight], imported: Imported, progress: Progress) -> None:
    start = time.perf_counter()
    name = "weights/weights.safetensors"
    digest = write_weights(folder.path(name), weights, imported, lambda done, total: None)
    folder.add(name, digest)
    size = sum(w.size for w in weights)
    progress("pack", time.perf_counter() - start, f"{size / 1e6:.1f} MB in {len(weights)} tensors")


def _write_rest(
    folder: ArtifactFolder,
    request: Request,
    imported: Imported,
    lowered: Lowered,
    tables: dict[int, np.ndarray],
    dump: Dump,
) -> None:
    for name in sorted(p.relative_to(folder.folder).as_posix() for p in folder.folder.glob("kernels/*/*")):
        folder.add(name)
    for workers, table in tables.items():
        np.save(folder.path(f"tables/{workers}.npy"), table, allow_pickle=False)
        folder.add(f"tables/{workers}.npy")
    for name, text in dump.texts.items():
        if name.endswith(".ir"):
            folder.text(f"ir/{name}", text)
    if imported.checkpoint.tokenizer is not None:
        tokenizer = folder.path("tokenizer/x").parent
        imported.checkpoint.tokenizer().write(tokenizer)
        for path in sorted(tokenizer.iterdir()):
            folder.add(f"tokenizer/{path.name}")


def _more(
    request: Request,
    imported: Imported,
    lowered: Lowered,
    folder: ArtifactFolder,
    level: Level,
    compiler: str,
) -> dict[str, Any]:
    checkpoint = imported.checkpoint
    hyper = {k: v for k, v in checkpoint.hyper.items() if isinstance(v, int | float | bool | str | tuple | dict)}
    return {
        "name": request.model.name if request.model.is_dir() else request.model.stem,
        "source": {"path": request.model.name, "format": checkpoint.source, "ignored": imported.ignored},
        "hyper": hyper,
        "quant": request.quant,
        "numerics": "int8 activations per 32, float32 sums in a fixed order",
        "targets": {
            level.name: {
                "library": f"kernels/{level.name}/step.so",
                "level": level.number,
                "isa": list(level.isa),
                "compiler": compiler,
            }
        },
        "certificates": {
            str(w): {
                "tables": folder.hashes[f"tables/{w}.npy"],
                "schedules": {b: c.as_dict() for b, c in proofs.items()},
            }
            for w, proofs in lowered.certificates.items()
        },
    }
