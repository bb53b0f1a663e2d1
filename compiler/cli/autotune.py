"""`onelaunch autotune`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.errors import UsageError
from .compile import limits_of
from .tables import table
from .words import MODEL_HELP, Json, note, positive, print_json, thread_list

if TYPE_CHECKING:
    from ..tune.calibrate import Check
    from ..tune.database import Entry
    from ..tune.measured import Measured
    from ..tune.modelled import Modelled
    from ..tune.search import Trial
    from ..tune.session import Subject

SECONDS = {"s": 1, "m": 60, "h": 3600}


def duration(text: str) -> float:
    """`90s`, `10m`, `1h`; seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text).strip())
    if not found or float(found[1]) <= 0:
        raise typer.BadParameter(f"expected a time like 90s, 10m or 1h, got `{text}`")
    return float(found[1]) * SECONDS[found[2] or "s"]


def command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    target: Annotated[str, typer.Option(metavar="NAME", help="cpu, measured here; sm_90, h100, .., modelled")] = "cpu",
    target_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A TOML file, or a folder, with machines of your own")
    ] = None,
    budget: Annotated[
        float, typer.Option(parser=duration, metavar="TIME", help="How long to search, like 90s or 10m")
    ] = "10m",  # type: ignore[assignment]
    workload: Annotated[
        str, typer.Option(metavar="TEST,..", help="What to be fast at: tg4@512 decodes 4 sequences after 512 tokens, "
                          "pp256 reads a prompt of 256", show_default="tg1,tg4,pp128; of a GPU tg1,tg1@4096")
    ] = "",
    quant: Annotated[str, typer.Option(metavar="NAME|FILE", help="As of compile", show_default="as stored")] = "",
    rows: Annotated[int, typer.Option(parser=positive, metavar="N", help="As of compile")] = 256,
    slots: Annotated[int, typer.Option(parser=positive, metavar="N", help="As of compile")] = 4,
    context: Annotated[
        int | None, typer.Option(parser=positive, metavar="N", help="As of compile", show_default="4K")
    ] = None,
    threads: Annotated[
        str, typer.Option(metavar="N,N,..", help="Thread counts to choose from", show_default="1,2,4,8,16 and all")
    ] = "",
    rounds: Annotated[int, typer.Option(parser=positive, metavar="N", help="Rounds in which a candidate is timed")] = 7,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier searches found")] = False,
    explain: Annotated[
        str, typer.Option(metavar="PHASE", help="Show the candidates of a phase and why the winner won; no search")
    ] = "",
    json: Json = False,
) -> None:  # fmt: skip
    """Search for the choices that make a model fastest on a target; `compile` applies them"""
    from ..driver import Request
    from ..ondemand import find_model
    from ..tune.session import subject

    made = limits_of(rows, slots, context, None, "bf16", "auto")
    request = Request(
        find_model(model), Path("candidate"), target, made, thread_list(threads) if threads else (), quant,
        fit_context=context is None, target_files=tuple(target_file or ()),
    )  # fmt: skip
    what = subject(request)
    if explain:
        _explain(what, explain, json)
        return
    _search(what, _tests(workload, what), budget, rounds, fresh, json)


def _tests(workload: str, what: Subject) -> list[Any]:
    from ..build import Level
    from ..tune.measured import Test

    measured = isinstance(what.place, Level)
    deep = f",tg1@{4096}" if what.limits.context > 4096 else ""
    tests = [Test.parse(t) for t in (workload or ("tg1,tg4,pp128" if measured else f"tg1{deep}")).split(",")]
    for test in tests:
        most = what.limits.context - 8 - test.rows if test.kind == "tg" else what.limits.context
        if test.depth > most or (test.kind == "pp" and test.rows > most):
            hint = "give a longer --context"
            raise UsageError(f"--workload: expected at most {most} tokens before `{test}`", hint=hint)
        if not measured and (test.kind, test.rows) != ("tg", 1):
            raise UsageError(f"--workload: expected tests of one row, got `{test}`", hint="the model is of one row")
    return tests


def _search(what: Subject, tests: list[Any], budget: float, rounds: int, fresh: bool, json: bool) -> None:
    from ..tune.calibrate import calibrate
    from ..tune.measured import Measured
    from ..tune.session import conclude, evaluator, open_search

    start = time.monotonic()
    search = open_search(what, None, fresh, None)
    known, count = len(search.trials()), len(what.degrees())
    note(f"{what.request.model.name} for {what.target}: {count} choices, {known} candidates known")
    with evaluator(what, tests, rounds) as how:
        lines = Lines(start + budget, how)
        search.evaluator, search.told = how, lines
        checks = calibrate(how, what) if isinstance(how, Measured) else []
        search.run(budget - (time.monotonic() - start))
        entry, winner = conclude(what, how, search)
        segments = {} if isinstance(how, Measured) else how.segments(entry.tuning)
    _report(entry, winner, checks, segments, json)


class Lines:
    """Progress: what was tried, the best so far, how near it is to the floor, and the time that is left."""

    def __init__(self, end: float, how: Measured | Modelled) -> None:
        self.end, self.how, self.count = end, how, 0

    def __call__(self, trial: Trial, best: Trial) -> None:
        self.count += 1
        left = max(0, int(self.end - time.monotonic()))
        said = f"{1 / trial.ratio:.3f}x" if trial.right else trial.result["wrong"]
        us = next((b for name, (_, b) in best.result["per_test"].items() if name.startswith("tg")), 0.0)
        floor = f", {100 * self.how.floor_us() / us:.0f} % of the floor" if us else ""
        note(f"[{self.count:3d}] {trial.tuning}: {said}  best {1 / best.ratio:.3f}x ({best.tuning}){floor}  "
             f"{left // 60}:{left % 60:02d} left")  # fmt: skip


def _report(
    entry: Entry, winner: Trial | None, checks: list[Check], segments: dict[str, float], json: bool
) -> None:
    from dataclasses import asdict

    from ..tune.database import user_file

    if json:
        print_json({**asdict(entry), "model_error": [asdict(c) for c in checks], "segments": segments,
                    "database": str(user_file())})  # fmt: skip
        return
    if checks:
        names = ("threads", "measured us", "modelled us", "error")
        columns = [("test", "left"), *((name, "right") for name in names), ("", "left")]
        cells = [[c.test, str(c.threads), f"{c.measured_us:.0f}", f"{c.modelled_us:.0f}", f"{100 * c.error:+.0f} %",
                  "fitted" if c.fitted else ""] for c in checks]  # fmt: skip
        from ..tune.calibrate import mean_error

        title = f"the step model on this processor: {100 * mean_error(checks):.1f} % off where it was not fitted"
        table(title, columns, cells)
    if segments:
        better = min(segments, key=lambda name: segments[name])
        times = ", ".join(f"{name} {us:.0f} us" for name, us in segments.items())
        hint = "; run with --segments per-phase" if better != "mega" else ""
        note(f"segments: {times}, modelled: {better} is faster{hint}")
    chosen = ", ".join(f"{k}={v}" for k, v in entry.choices.items()) or "the defaults: nothing was faster beyond noise"
    print(f"{entry.how} on {entry.environment['machine']}, {entry.candidates} candidates: {chosen}")
    for name, (before, after) in entry.per_test.items():
        ratio = winner.result["ratios"][name] if winner else 1.0
        print(f"  {name}: {before:.0f} us -> {after:.0f} us, {100 * (1 / ratio - 1):+.1f} %")
    print(f"kept in {user_file()}; `onelaunch compile` applies it")


def _explain(what: Subject, phase: str, json: bool) -> None:
    from ..tune.explain import explain
    from ..tune.session import open_search

    search = open_search(what, None, False, None)
    trials = search.trials()
    if not trials:
        raise UsageError(
            f"--explain: expected a search of this model for {what.target}, found none",
            hint="run `onelaunch autotune` first, with the same --target and --quant",
        )
    rows = explain(what.program, phase, what.degrees(), trials)
    if json:
        print_json(rows)
        return
    cells = [
        [r["choice"], f"{r['value']} {r['unit']}", r["verdict"] + (" (default)" if r["default"] else ""),
         f"{1 / r['ratio']:.3f}x" if r["ratio"] else "", f"{r['us']:.1f}" if r["us"] else "", r["why"]]
        for r in rows
    ]  # fmt: skip
    names = ("choice", "value", "", "speed", "us", "why")
    columns = [(name, "right" if name in ("speed", "us") else "left") for name in names]
    table(f"{phase} on {what.target}, {len(trials)} candidates", columns, cells)
