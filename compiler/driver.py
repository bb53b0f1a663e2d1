"""Compile a checkpoint to an artifact: import, passes, code, packing, one progress line each."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..ir.errors import UsageError, expect
from ..ir.graph import Program
from ..ir.limits import Limits
from ..ir.schedule import Schedule
from ..ir.text import show
from ..ir.tuning import Tuning
from ..models.checkpoint import Checkpoint
from ..models.drafter import with_drafter
from ..models.importer import Imported, import_checkpoint
from ..models.open import open_checkpoint
from ..models.window import with_window
from ..passes import GRAPH_PASSES, PIPELINE, Options
from ..passes.policy import Policy, expect_matches, parse_policy, schemes, split_kinds
from ..passes.quantize import CALIBRATED, FLOATS, quantize
from .emit import Emission
from .gpu.compile import refuse_formats
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
from .target_list import Targets, parse_targets
from .toml_file import read_toml
from .tune.lookup import Chosen, choose

POLICY = ".toml"  # how the name of a policy file ends
DEFAULT_WORKERS = (1, 2, 4, 8, 16)
GRAPH_NAMES = tuple(name for name, _ in GRAPH_PASSES)


@dataclass(frozen=True)
class Request:
    """What to compile and for what. `target` is a list of processors and GPUs, as `--target` takes it.

    workers: the thread counts of a processor to make task tables for; a GPU has one worker per SM.
    fit_context: shorten `limits.context` to what the model was trained for instead of refusing more.
    quant: what `--quant` takes: a scheme, or a policy file's name.
    calibrate: a text file for schemes that need one.
    pack: False leaves the weights out; the artifact can be inspected, not loaded.
    draft: a checkpoint whose model guesses `limits.drafts` tokens a step, where `limits.drafter` is `model`.
    target_files: TOML files, or folders of them, with machines of the user's own.
    tuning: choices to compile with; None: those of the tuning database, or with `tune` none the defaults.
    reuse: a folder that keeps compiled libraries and packed weights for the next compilation of the same weights.
    window: what layers without one see, 0: everything; sinks: first tokens that windows keep (`models/window.py`).
    """

    model: Path
    output: Path
    target: str = "auto"
    limits: Limits = field(default_factory=Limits)
    workers: Sequence[int] = ()
    quant: str = ""
    calibrate: Path | None = None
    ignore_config: frozenset[str] = frozenset()
    start_from: Path | None = None
    fit_context: bool = False
    pack: bool = True
    draft: Path | None = None
    target_files: Sequence[Path] = ()
    tuning: Tuning | None = None
    tune: str = "cached"
    reuse: Path | None = None
    window: int = 0
    sinks: int = 0


def silent(phase: str, seconds: float, detail: str) -> None:
    """A Progress that prints nothing."""


def request_targets(request: Request) -> Targets:
    """The targets a request names. UsageError for a wrong name, and for threads that no target has."""
    targets = parse_targets(request.target, request.target_files)
    if request.workers and not targets.levels:
        raise UsageError(
            f"--threads: expected a processor among the targets to run them, got `{request.target}`",
            hint="a GPU has one worker per SM; add `cpu` to --target",
        )
    return targets


def thread_counts(request: Request, targets: Targets) -> tuple[int, ...]:
    """The worker counts of processors, ascending; none without a processor among the targets."""
    if not targets.levels:
        return ()
    counts = tuple(request.workers) or (*DEFAULT_WORKERS, os.cpu_count() or 1)
    expect(all(1 <= w <= 256 for w in counts), f"--threads: expected 1 to 256, got {list(counts)}")
    return tuple(sorted(set(counts)))


def compile_model(request: Request, dump: Dump | None = None, progress: Progress = silent) -> Path | None:
    """Compile; returns the artifact's path, or None when `dump.stop_after` ended it early."""
    start = time.perf_counter()
    request_targets(request)  # what is wrong is told before the checkpoint is read
    quant_policy(request.quant, request.calibrate)
    return compile_imported(import_model(request.model, request), request, dump, progress, start)


def import_model(model: Path, request: Request) -> Imported:
    return import_checkpoint(open_checkpoint(model, request.ignore_config, shapes_only=not request.pack))


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
    targets = request_targets(request)
    draft = None if request.draft is None else import_model(request.draft, request)
    limits = _fit_context(request, checkpoint, draft)
    if request.calibrate is not None and request.pack:
        imported = calibrate(imported, request.quant, request.calibrate, progress)
    if draft is not None:
        imported = with_drafter(imported, draft, limits.drafts)
    imported = replace(imported, program=with_window(imported.program, request.window, request.sinks))
    chosen = choose(imported.program, request.quant, targets, limits, request.tuning, request.tune)
    limits = chosen.limits
    threads = thread_counts(request, targets)
    progress("import", time.perf_counter() - start, f"{checkpoint.family}, {len(checkpoint.tensors)} tensors")
    dump.keep("import", show(imported.program))
    if dump.stops("import"):
        return None
    workers = sorted({*threads, *(count for gpu in targets.gpus for count in gpu.workers)})
    lowered = _lower(request, imported, targets, chosen, workers, dump, progress)
    if lowered is None:
        return None
    emission = Emission(
        request.model, request.quant, imported, targets, limits, threads, dump, progress, chosen.record, request.reuse
    )
    return emission.write(lowered, request.output, request.pack)


def _fit_context(request: Request, checkpoint: Checkpoint, draft: Imported | None) -> Limits:
    """No more positions than the model, and the one that drafts, were trained for."""
    limits, trained = request.limits, [(checkpoint.hyper["context"], "the model's own")]
    if draft is not None:
        trained.append((draft.checkpoint.hyper["context"], "the draft model's"))
    most, whose = min(trained)
    if request.fit_context:
        return replace(limits, context=min(limits.context, most))
    expect(limits.context <= most, f"--context: expected at most {most}, {whose}, got {limits.context}")
    return limits


def _lower(
    request: Request,
    imported: Imported,
    targets: Targets,
    chosen: Chosen,
    workers: Sequence[int],
    dump: Dump,
    progress: Progress,
) -> Lowered | None:
    limits = chosen.limits
    program, after, edited = imported.program, "import", None
    if request.start_from is not None:
        _refuse_bounds(request)
        found, after = read_dump(request.start_from)
        edited = found if isinstance(found, Schedule) else None
        program = found.program if isinstance(found, Schedule) else found
        check_edited(program, imported.program)
    if edited is None:
        done = PIPELINE.index(after) >= PIPELINE.index("quantize")
        program, options = (program, Options()) if done else quantization(program, request.quant)
        options = replace(options, tuning=chosen.tuning)
        program = run_graph_passes(program, options, dump, progress, after)
        if dump.stop_after in GRAPH_NAMES:
            return None
    refuse_formats(program, targets.gpus)
    if edited is None:
        return lower_program(program, limits, workers, dump, progress, chosen.tuning)
    return _lower_edited(edited, after, limits, workers, dump, progress)


def _refuse_bounds(request: Request) -> None:
    for option, value in (("--window", request.window), ("--sinks", request.sinks)):
        if value:
            raise UsageError(
                f"{option}: expected what the dump has, got {value} with --start-from",
                hint="write them into its `kv[kv_heads, head_dim, window, sinks]`",
            )


def _lower_edited(
    edited: Schedule, after: str, limits: Limits, workers: Sequence[int], dump: Dump, progress: Progress
) -> Lowered | None:
    """A schedule from a dump takes the place of ours for its worker count and bucket."""
    expect(edited.limits == limits, "--start-from: the schedule was made for other limits")
    expect(
        edited.workers in workers,
        f"--start-from: expected a schedule of {', '.join(map(str, workers))} workers, got {edited.workers}",
        hint="give the --target and --threads that the dump was made with",
    )
    rest = lower_program(edited.program, limits, workers, Dump(), silent, edited.tuning)
    assert rest is not None
    made = {**rest.schedules, edited.workers: {**rest.schedules[edited.workers], edited.bucket: edited}}
    return finish_schedules(edited.program, made, (edited.workers, edited.bucket), dump, progress, after)


def quant_policy(quant: str, calibrate: Path | None = None) -> Policy:
    """What `--quant` asks for. UsageError where it needs a calibration text and has none, or the other way round."""
    policy = parse_policy(read_toml(Path(quant), "a policy file"), quant) if quant.endswith(POLICY) else Policy(quant)
    needs = [s for s in (policy.default, *policy.patterns.values()) if s.startswith(CALIBRATED)]
    if needs and calibrate is None:
        raise UsageError(f"--quant {needs[0]}: expected --calibrate FILE, a text to choose weights by, got none")
    if calibrate is not None and not needs:
        raise UsageError(
            f"--calibrate: expected --quant {CALIBRATED}.., got `{quant or 'none'}`",
            hint="the others round to nearest and need no text",
        )
    return policy


def quantization(program: Program, quant: str) -> tuple[Program, Options]:
    """What `--quant` asks for; by a policy file, layers that get other formats become kinds of their own.

    UsageError for a checkpoint in which nothing can be quantised: formats that it has are kept.
    """
    stored = {w.tensor.dtype for graph in program.graphs for w in graph.weights if len(w.tensor.shape) > 1}
    if quant and not stored & set(FLOATS):
        raise UsageError(
            f"--quant {quant}: expected matrices of {', '.join(FLOATS)}, got {', '.join(sorted(stored))}",
            hint="what is quantised already keeps its format, as rounding twice loses twice: leave --quant out",
        )
    if not quant.endswith(POLICY):
        return program, Options(quant)
    policy = parse_policy(read_toml(Path(quant), "a policy file"), quant)
    expect_matches(program, policy)
    program = split_kinds(program, policy.scheme)
    return program, Options(schemes(program, policy))


def quantized(program: Program, quant: str) -> Program:
    """An imported program with the formats that `--quant` gives."""
    program, options = quantization(program, quant)
    return program.map(lambda graph: quantize(graph, options.schemes(graph)))


def calibrate(imported: Imported, quant: str, text: Path, progress: Progress) -> Imported:
    """The same model with the weights that the text chose for what `--quant` asks of them (calibrate.py)."""
    from .quality.calibrate import calibrated, read_pieces

    texts = read_pieces(imported.checkpoint, text)
    return calibrated(imported, quantized(imported.program, quant), quant_policy(quant, text).scheme, texts, progress)
