"""One tuning of one model for one target, from the request to the database."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...ir.errors import UsageError
from ...ir.graph import Program
from ...ir.limits import Limits
from ...ir.tuning import UNTUNED, Tuning
from ...models.importer import Imported
from ...passes import Options
from ..build import Level, host_flags
from ..driver import Request, import_model, quantization, request_targets, silent, thread_counts
from ..gpu.compile import refuse_formats, with_fewest_rows
from ..gpu.machines import Machine
from ..lowering import Dump, run_graph_passes
from .database import Entry, user_file, write
from .lookup import cpu_environment, gpu_environment, program_key
from .measured import Measured, Test
from .modelled import Modelled
from .search import Search, Trial, open_study
from .space import Degree, clash, space

CONFIRM = 24  # rounds in which the winner is timed once more
SLOWER = 0.03  # of any one test, beyond noise: a winner that costs more there is none


@dataclass(frozen=True)
class Subject:
    """What is tuned: a program for a target within limits. `place`: the level or the machine."""

    request: Request
    imported: Imported
    program: Program
    limits: Limits
    place: Level | Machine

    @property
    def key(self) -> str:
        return program_key(self.imported.program, self.request.quant)

    @property
    def target(self) -> str:
        return self.place.name

    @property
    def environment(self) -> dict[str, Any]:
        where = cpu_environment(self.place) if isinstance(self.place, Level) else gpu_environment(self.place)
        return where | {"onelaunch": __version__}

    @property
    def study(self) -> str:
        return f"{self.key}-{self.target}-{self.environment['machine']}"

    def degrees(self) -> list[Degree]:
        return space(self.program, self.limits, self.place, self.request.workers)

    def clash(self, tuning: Tuning) -> str:
        return clash(tuning, self.program, self.limits, self.place)


def subject(request: Request) -> Subject:
    """Import and fuse. UsageError where the target is several, or a processor that is not this machine's."""
    targets = request_targets(request)
    places: list[Level | Machine] = [*targets.levels, *(m for gpu in targets.gpus for m in gpu.machines)]
    if len(places) != 1:
        raise UsageError(f"--target: expected one target to tune for, got {', '.join(p.name for p in places)}")
    place = places[0]
    if isinstance(place, Level) and not set(place.isa) <= host_flags():
        raise UsageError(
            f"--target: expected a processor that this machine can stand for, got `{place.name}`",
            hint="processors are measured, not modelled: run autotune where the model is to run",
        )
    workers = request.workers or thread_counts(request, targets)
    request = replace(request, pack=isinstance(place, Level), workers=workers)
    imported = import_model(request.model, request)
    trained = imported.checkpoint.hyper["context"]
    limits = replace(request.limits, context=min(request.limits.context, trained))
    limits = limits if isinstance(place, Level) else with_fewest_rows(replace(limits, drafts=0))
    program, options = quantization(imported.program, request.quant)
    program = run_graph_passes(program, Options(options.quant), Dump(), silent, "import")
    refuse_formats(program, targets.gpus)
    return Subject(replace(request, limits=limits), imported, program, limits, place)


@contextlib.contextmanager
def evaluator(what: Subject, tests: Sequence[Test], rounds: int) -> Iterator[Measured | Modelled]:
    """What evaluates candidates of a subject: on this machine, or by the model of its machine."""
    if isinstance(what.place, Machine):
        yield Modelled(what.program, what.limits, what.place, [t.depth for t in tests if t.kind == "tg"])
        return
    most = max(t.rows for t in tests if t.kind == "tg") if any(t.kind == "tg" for t in tests) else 1
    limits = what.limits
    limits = replace(limits, slots=max(limits.slots, most), outputs=max(limits.outputs, most + limits.decode_rows))
    made = Measured(what.imported, replace(what.request, limits=limits), work_folder(what), tests, rounds)
    try:
        yield made
    finally:
        made.close()


def work_folder(what: Subject) -> Path:
    """Where a processor's candidates are compiled, by one process alone."""
    return user_file().parent / "tuning" / f"{what.key}-{os.getpid()}"


def journal() -> Path:
    return user_file().parent / "tuning" / "journal.log"


def open_search(what: Subject, how: Measured | Modelled | None, fresh: bool, told: Any) -> Search:
    """`how` None: to read what was found."""
    study = open_study(journal(), what.study, fresh)
    return Search(how, what.degrees(), what.clash, study, told)  # type: ignore[arg-type]


def conclude(what: Subject, how: Measured | Modelled, search: Search) -> tuple[Entry, Trial | None]:
    """Time the best once more, keep it if it is faster and nowhere slower beyond noise, else the defaults."""
    winner: Trial | None = None
    per_test: dict[str, list[float]] = {}
    for trial in search.trials()[:3]:
        if trial.tuning == UNTUNED or not trial.right or trial.ratio >= 1:
            break
        result = trial.result
        if how.how == "measured":
            result = how.evaluate(trial.tuning, CONFIRM).as_dict()  # type: ignore[call-arg]
        limit = 1 + SLOWER + 2 * result["noise"]
        if result["ratio"] < 1 - result["noise"] and max(result["ratios"].values()) <= limit:
            winner, per_test = Trial(trial.tuning, result["ratio"], result), result["per_test"]
            break
    default = how.default_us() if not per_test else next(iter(per_test.values()))[0]
    entry = Entry(
        what.request.model.name, what.key, what.target, winner.tuning.as_dict() if winner else {}, how.how,
        default, default * winner.result["ratios"][next(iter(per_test))] if winner else default,
        [str(t) for t in how.tests], len(search.trials()), what.environment, how.floor_us(),
        {k: list(v) for k, v in per_test.items()},
    )  # fmt: skip
    write(entry)
    return entry, winner

