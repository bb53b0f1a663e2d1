"""The views of `inspect` for a GPU target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...ir.errors import UsageError
from ..gpu import report as gpu_report
from ..gpu.report import GpuView
from ..reports.artifact import queue
from .tables import Asked, table, texts
from .words import print_json

Row = dict[str, Any]


def show(view: GpuView, name: str, asked: Asked) -> None:
    """Print one view, a key of VIEWS."""
    if asked.gbps is not None:
        view = replace(view, machine=replace(view.machine, bandwidth_gb_s=asked.gbps))
    VIEWS[name](view, asked)


def _mix(view: GpuView, asked: Asked) -> None:
    rows = gpu_report.mix(view)
    if asked.json:
        print_json(rows)
        return
    for kernel in rows:
        print(
            f"{kernel['entry']}: {kernel['registers']} registers, {kernel['stack']} bytes of stack, "
            f"{kernel['spills']} spilled, {kernel['shared']} + {kernel['static_shared']} bytes of shared memory, "
            f"{32 * kernel['warps']} threads"
        )
        print("mix        " + ", ".join(f"{n} {count}" for n, count in list(kernel["mix"].items())[:12]))
        for problem in kernel["problems"]:
            print(f"problem    {problem}")
        columns = [("code", "left"), ("instructions", "right"), ("bodies", "left")]
        lines = [[b["function"], str(b["instructions"]), ", ".join(b["titles"])] for b in kernel["branches"]]
        table("", columns, [["table loop", str(kernel["loop"]), ""], *lines])
        _loops(kernel, view)


def _loops(kernel: Row, view: GpuView) -> None:
    names = ["main loop", "format", "kind", "instructions", "KiB", "loads", "per weight", "budget"]
    sides = ["left", "left", "left", "right", "right", "left", "right", "right"]
    lines = [
        [loop["function"], branch["format"], loop["kind"], str(loop["instructions"]), f"{loop['bytes'] / 1024:g}",
         ", ".join(f"{n} x {bits} bits" for bits, n in loop["widths"].items()), f"{loop['per_weight']:.2f}",
         f"{branch['issue_budget']:.2f}"]
        for branch in kernel["branches"]
        for loop in branch["loops"]
    ]  # fmt: skip
    title = f"thread-instructions per weight; above the budget of {view.machine.name} issue takes longer than reading"
    table(title, list(zip(names, sides, strict=True)), lines)


def _phases(view: GpuView, asked: Asked) -> None:
    step = gpu_report.modelled(view, asked.depth)
    found, rows = gpu_report.summary(step), gpu_report.phases(step)
    if asked.json:
        print_json({**found, "phases": rows})
        return
    lines = [
        [r["section"], r["phase"], str(r["layers"]), f"{r['bytes'] / 1e6:.3f}", f"{r['us']:.1f}", f"{r['join_us']:.1f}",
         f"{r['start_us']:.1f}", f"{r['stream_us']:.1f}", f"{r['floor_us']:.1f}", r["bound"], f"{r['share']:.1%}"]
        for r in rows
    ]  # fmt: skip
    names = ["section", "phase", "layers", "MB", "us", "join", "start", "stream", "floor", "bound", "share"]
    sides = ["left", "left", *["right"] * 7, "left", "right"]
    title = (
        f"one row at depth {step.depth} on {step.machine.title}, modelled: {step.us:.1f} us, of which reading "
        f"{step.memory / 1e6:.1f} MB takes {step.floor_us:.1f} us at best: {step.of_floor:.1%} of the bandwidth floor"
    )
    table(title, list(zip(names, sides, strict=True)), lines)
    for line in found["assumptions"]:
        print(f"assumed    {line}")


def _schedule(view: GpuView, asked: Asked) -> None:
    last = view.machine.sms - 1
    if asked.worker > last:
        raise UsageError(f"--worker: expected at most {last} on {view.machine.name}, got {asked.worker}")
    rows = queue(gpu_report.target_schedule(view), asked.worker)
    if asked.json:
        print_json(rows)
        return
    lines = [[r["section"], str(r["layers"]), r["task"]] for r in rows]
    title = f"queue of worker {asked.worker} of {view.machine.sms}, few rows"
    table(title, [("section", "left"), ("layers", "right"), ("task", "left")], lines)


def _timeline(view: GpuView, asked: Asked) -> None:
    assert asked.file is not None
    step = gpu_report.modelled(view, asked.depth)
    gpu_report.write_timeline(view, step, asked.file)
    print_json(gpu_report.summary(step)) if asked.json else print(asked.file)


VIEWS: dict[str, Callable[[GpuView, Asked], None]] = {
    "source": lambda view, asked: texts(gpu_report.source(view), asked.json),
    "ptx": lambda view, asked: texts(gpu_report.ptx(view), asked.json),
    "sass": lambda view, asked: texts(gpu_report.sass(view), asked.json),
    "mix": _mix,
    "phases": _phases,
    "schedule": _schedule,
    "timeline": _timeline,
}
