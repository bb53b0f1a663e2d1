"""Run the passes: program to schedules, with a dump after each and the place to stop or start at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..ir.certificate import Certificate
from ..ir.errors import CompileError, UsageError, nearest
from ..ir.graph import Program
from ..ir.limits import Limits
from ..ir.schedule import BUCKETS, Schedule
from ..ir.schedule_text import parse_schedule, show_schedule
from ..ir.table import event_count
from ..ir.text import parse_program, show
from ..ir.tuning import UNTUNED, Tuning
from ..ir.validate import validate_buckets
from ..passes import GRAPH_PASSES, PIPELINE, SCHEDULE_PASSES, Options, schedule

Progress = Callable[[str, float, str], None]  # (phase, seconds, detail)


@dataclass
class Dump:
    """Where the text after each pass goes, and after which pass to stop ('' = never)."""

    folder: Path | None = None
    stop_after: str = ""
    texts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stop_after and self.stop_after not in PIPELINE:
            raise UsageError(
                f"--stop-after: expected one of {', '.join(PIPELINE)}, got `{self.stop_after}`",
                hint=nearest(self.stop_after, PIPELINE),
            )

    def keep(self, name: str, text: str, suffix: str = "ir") -> None:
        file = f"{PIPELINE.index(name):02d}-{name}.{suffix}"
        self.texts[file] = text
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text(text)

    def stops(self, name: str) -> bool:
        return self.stop_after == name


@dataclass(frozen=True)
class Lowered:
    """The fused program and, per worker count and bucket, a validated schedule."""

    program: Program
    schedules: dict[int, dict[str, Schedule]]
    certificates: dict[int, dict[str, Certificate]]

    def rendered(self, counts: Sequence[int]) -> dict[str, Schedule]:
        """What to render code from that serves all these worker counts: the one with most events to make room for."""
        return max((self.schedules[w] for w in counts), key=lambda made: max(map(event_count, made.values())))


def run_graph_passes(program: Program, options: Options, dump: Dump, progress: Progress, after: str) -> Program:
    """The graph passes that come after the one named `after`, each verified."""
    for name, change in GRAPH_PASSES:
        if PIPELINE.index(name) <= PIPELINE.index(after):
            continue
        start = time.perf_counter()
        program = program.map(lambda g, c=change: c(g, options)).verify()  # type: ignore[misc]
        ops = sum(len(g.ops) for g in program.graphs)
        phases = sum(len(g.phases) for g in program.graphs)
        progress(name, time.perf_counter() - start, f"{ops} ops" + (f", {phases} phases" if phases else ""))
        dump.keep(name, show(program))
        if dump.stops(name):
            break
    return program


def lower_program(
    program: Program,
    limits: Limits,
    workers: Sequence[int],
    dump: Dump,
    progress: Progress,
    tuning: Tuning = UNTUNED,
) -> Lowered | None:
    """Schedule, place and validate for every worker count; None when asked to stop on the way.

    Dumps show the largest worker count, bucket `few`.
    """
    start = time.perf_counter()
    made = {w: {b: schedule(program, limits, b, w, tuning) for b in BUCKETS} for w in workers}
    shown = max(workers), BUCKETS[0]
    progress("schedule", time.perf_counter() - start, f"workers {', '.join(map(str, workers))}")
    dump.keep("schedule", show_schedule(made[shown[0]][shown[1]]))
    if dump.stops("schedule"):
        return None
    return finish_schedules(program, made, shown, dump, progress, "schedule")


def finish_schedules(
    program: Program,
    made: dict[int, dict[str, Schedule]],
    shown: tuple[int, str],
    dump: Dump,
    progress: Progress,
    after: str,
) -> Lowered | None:
    for name, change in SCHEDULE_PASSES:
        if PIPELINE.index(name) <= PIPELINE.index(after):
            continue
        start = time.perf_counter()
        made = {w: {b: change(s) for b, s in buckets.items()} for w, buckets in made.items()}
        one = made[shown[0]][shown[1]]
        tasks = sum(len(q) for s in one.sections for q in s.queues)
        memory = f", {one.workspace_bytes >> 10} KiB workspace" if one.buffers else ""
        progress(name, time.perf_counter() - start, f"{tasks} tasks{memory}")
        dump.keep(name, show_schedule(one))
        if dump.stops(name):
            return None
    start = time.perf_counter()
    proofs = {w: validate_buckets(buckets) for w, buckets in made.items()}
    progress("validate", time.perf_counter() - start, f"{sum(map(len, proofs.values()))} schedules proved")
    return None if dump.stops("validate") else Lowered(program, made, proofs)


def read_dump(path: Path) -> tuple[Program | Schedule, str]:
    """A file that --dump wrote: its program or schedule, and the pass it was written after."""
    if not path.is_file():
        raise UsageError(f"--start-from: expected a file written by --dump, got `{path}`")
    number, _, name = path.stem.partition("-")
    if name not in PIPELINE or not number.isdigit():
        raise UsageError(
            f"--start-from: expected a name like 03-fuse.ir, got `{path.name}`",
            hint="the name says which passes are done",
        )
    text = path.read_text()
    if PIPELINE.index(name) >= PIPELINE.index("schedule"):
        return parse_schedule(text, str(path)), name
    return parse_program(text, str(path)), name


def check_edited(program: Program, original: Program) -> None:
    """An edited dump may change anything but what the checkpoint decides: layers and weight shapes."""
    counts = [[len(model.layers) for model in of.models] for of in (original, program)]
    if counts[0] != counts[1]:
        wanted, got = (" and ".join(map(str, count)) for count in counts)
        raise CompileError(f"--start-from: expected {wanted} layers as in the checkpoint, got {got}")
    for graph, layer in program.sections():
        known = {w.name: w.tensor.shape for w in _section(original, layer, graph.name).weights}
        for weight in graph.weights:
            if known.get(weight.name) != weight.tensor.shape:
                raise CompileError(
                    f"--start-from: `{graph.name}` reads `{weight.name}` as {list(weight.tensor.shape)}, "
                    f"the checkpoint has {list(known[weight.name]) if weight.name in known else 'no such weight'}"
                )


def _section(program: Program, layer: int, name: str):  # type: ignore[no-untyped-def]
    if layer >= 0:
        return program.kind(program.all_layers[layer])
    return next(g for g in program.graphs if g.name == name)
