"""`onelaunch inspect`: what an artifact holds and what a step of it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.errors import UsageError
from .tables import Asked, table, texts
from .words import Json, human_int, print_json

if TYPE_CHECKING:
    from ...runtime.artifact import Artifact

VIEW = "What to show"


def _view(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel=VIEW)


def command(
    artifact: Annotated[str, typer.Argument(help="A .ola file or an artifact folder")],
    tensors: Annotated[bool, _view("--tensors", "Packed tensors: formats, bits, bytes")] = False,
    phases: Annotated[bool, _view("--phases", "Phases: bytes, operations, time; of a GPU modelled")] = False,
    schedule: Annotated[bool, _view("--schedule", "The queue of one worker")] = False,
    memory: Annotated[bool, _view("--memory", "The buffers of the workspace")] = False,
    ir: Annotated[str, typer.Option(metavar="PASS", help="The IR text after a pass", rich_help_panel=VIEW)] = "",
    source: Annotated[bool, _view("--source", "The generated code")] = False,
    ptx: Annotated[bool, _view("--ptx", "A GPU's kernels as PTX")] = False,
    sass: Annotated[bool, _view("--sass", "A GPU's kernels as machine code")] = False,
    mix: Annotated[bool, _view("--mix", "A GPU's kernels: registers, shared memory, instructions per weight")] = False,
    timeline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a GPU's modelled step for ui.perfetto.dev", rich_help_panel=VIEW),
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="How often experts would be found, by how many are kept: of a trace that "
                     "`run --trace-routing` wrote", rich_help_panel=VIEW),
    ] = None,
    target: Annotated[str, typer.Option(metavar="NAME", help="Target or GPU to show: cpu, sm_90, h200",
                                        show_default="cpu, if there is one")] = "",
    worker: Annotated[int, typer.Option(min=0, help="Worker whose queue is shown")] = 0,
    depth: Annotated[int, typer.Option(parser=human_int, metavar="N", help="Cached tokens that costs are for")] = 0,  # type: ignore[assignment]
    gbps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Read bandwidth that times are for", show_default="measured here, or the GPU's"),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Show what an artifact holds, how it runs and what a step costs"""
    chosen = [n for n, on in (("tensors", tensors), ("phases", phases), ("schedule", schedule), ("memory", memory),
                              ("ir", ir), ("source", source), ("ptx", ptx), ("sass", sass), ("mix", mix),
                              ("timeline", timeline), ("routing", routing)) if on]  # fmt: skip
    if len(chosen) > 1:
        raise UsageError(f"inspect: expected one view, got {', '.join('--' + c for c in chosen)}")
    from ...runtime.artifact import Artifact
    from ..gpu.report import find_target
    from ..ondemand import find_artifact
    from ..reports import artifact as report
    from .inspect_gpu import VIEWS, show

    opened = Artifact.open(find_artifact(artifact, "inspect"))
    view, gpu = chosen[0] if chosen else "", find_target(opened, target)
    if view in VIEWS and gpu is not None:
        show(gpu, view, Asked(worker, depth, gbps, timeline, json))
        return
    if view in VIEWS.keys() - TABLES.keys() - {"source"}:
        hint = "name one of the artifact: --target sm_90"
        raise UsageError(f"--{view}: expected a GPU target, got the CPU's", hint=hint)
    if view in ("ir", "source"):
        texts(report.sources(opened) if source else [report.ir_text(opened, ir)], json)
        return
    bandwidth = _bandwidth(gbps) if view in ("", "phases") else 0.0
    if not view:
        _overview(opened, bandwidth, json)
        return
    views: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "tensors": lambda: report.tensors(opened),
        "phases": lambda: report.phases(opened, bandwidth, depth),
        "schedule": lambda: report.queue(report.stored_schedule(opened), worker),
        "memory": lambda: report.memory(opened),
        "routing": lambda: routing_report(routing),
    }
    rows = views[view]()
    print_json(rows) if json else TABLES[view](rows, bandwidth, depth)


def routing_report(path: Path | None) -> list[dict[str, Any]]:
    from ..reports.routing import hit_rates, read_routing

    assert path is not None
    return hit_rates(read_routing(path))


def _bandwidth(given: float | None) -> float:
    from ..doctor import read_bandwidth

    return given or read_bandwidth()


def _overview(artifact: Artifact, gbps: float, json: bool) -> None:
    from ..reports import artifact as report

    found = report.overview(artifact, gbps)
    if json:
        print_json(found)
        return
    limits = ", ".join(f"{k} {v}" for k, v in found["limits"].items())
    print(f"{found['name']}: {found['family']}, made by onelaunch {found['onelaunch']}")
    print(f"targets    {', '.join(f'{t} ({c})' for t, c in found['targets'].items())}")
    print(f"threads    {', '.join(map(str, found['threads']))}")
    print(f"limits     {limits}")
    print(f"numerics   {found['numerics']}")
    for line in report.summary_lines(found):
        print(line)
    print(f"ir         {', '.join(found['ir'])}")


def _tensors(rows: list[dict[str, Any]], gbps: float, depth: int) -> None:
    lines = [
        [r["tensor"], "x".join(map(str, r["shape"])), r["source_format"], f"{r['source_bits']:.2f}", r["format"],
         f"{r['bits']:.2f}", f"{r['bytes']:,}", r["note"]]
        for r in rows
    ]  # fmt: skip
    columns = ["tensor", "shape", "source", "bits", "packed", "bits", "bytes", ""]
    sides = ["left", "right", "left", "right", "left", "right", "right", "left"]
    total = sum(r["bytes"] for r in rows)
    table(f"{len(rows)} tensors, {total / 1e6:.1f} MB", list(zip(columns, sides, strict=True)), lines)


def _phases(rows: list[dict[str, Any]], gbps: float, depth: int) -> None:
    lines = [
        [r["section"], r["phase"], r["kind"], str(r["layers"]), f"{r['weight_bytes'] / 1e6:.3f}",
         f"{r['cache_bytes'] / 1e6:.3f}", f"{r['operations'] / 1e6:.2f}", f"{r['us']:.1f}", " ".join(r["ops"])]
        for r in rows
    ]  # fmt: skip
    names = ["section", "phase", "kind", "layers", "weights MB", "cache MB", "M operations", "us", "ops"]
    sides = ["left", "left", "left", *["right"] * 5, "left"]
    total = sum(r["weight_bytes"] + r["cache_bytes"] for r in rows)
    title = (
        f"one row at depth {depth}: {total / 1e6:.1f} MB, {total / gbps * 1e-6:.2f} ms at {gbps:.1f} GB/s "
        f"({gbps * 1e9 / total:.0f} tokens/s at most)"
    )
    table(title, list(zip(names, sides, strict=True)), lines)


def _schedule(rows: list[dict[str, Any]], gbps: float, depth: int) -> None:
    lines = [[r["section"], str(r["layers"]), r["task"]] for r in rows]
    table("queue of one worker, few rows", [("section", "left"), ("layers", "right"), ("task", "left")], lines)


def _memory(rows: list[dict[str, Any]], gbps: float, depth: int) -> None:
    lines = [
        [r["buffer"], f"{r['offset']:,}", f"{r['bytes']:,}", str(r["copies"]), r["alive"], ", ".join(r["values"])]
        for r in rows
    ]
    names = ["buffer", "offset", "bytes", "copies", "alive", "values"]
    sides = ["left", "right", "right", "right", "left", "left"]
    top = max((r["offset"] + r["bytes"] for r in rows), default=0)
    table(f"workspace of {top / 2**20:.2f} MiB", list(zip(names, sides, strict=True)), lines)


def _routing(rows: list[dict[str, Any]], gbps: float, depth: int) -> None:
    lines = [[str(r["resident"]), f"{100 * r['fixed']:.1f}", f"{100 * r['lru']:.1f}"] for r in rows]
    title = "share of expert loads that find theirs, by experts kept per layer"
    table(title, [("kept", "right"), ("most used %", "right"), ("used last %", "right")], lines)


TABLES = {"tensors": _tensors, "phases": _phases, "schedule": _schedule, "memory": _memory, "routing": _routing}
