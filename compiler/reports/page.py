"""The report of an artifact: DIR/report.html, and beside it a timeline of each target for ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...ir.errors import HostError
from ...runtime.artifact import Artifact
from ..gpu.timeline import trace
from .artifact import tuned_words
from .data import Report, Row, gather
from .plots import COLOURS, WAIT, memory_plan, roofline, timeline

PAGE = "report.html"


def write_report(artifact: Artifact, folder: Path, seconds: Mapping[str, float], gbps: float) -> Path:
    """Write the page and the timelines; the page's path. HostError where the folder cannot be written.

    seconds: of each pass, where the artifact was compiled just now; gbps: what a processor reads.
    """
    found = gather(artifact, seconds, gbps)
    timelines = {view.name: f"timeline-{view.name}.json" for view in found.targets}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for view in found.targets:
            (folder / timelines[view.name]).write_text(json.dumps(trace(view.step, view.schedule)) + "\n")
        (folder / PAGE).write_text(render(found, timelines))
    except OSError as error:
        raise HostError(f"cannot write `{folder}`: {error.strerror}") from None
    return folder / PAGE


def render(r: Report, timelines: Mapping[str, str]) -> str:
    """The page; `timelines`: file name by target."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    environment.filters["shown"] = shown
    plots = {v.name: {"roofline": Markup(roofline(v)), "timeline": Markup(timeline(v))} for v in r.targets}
    targets = [(f"target-{view.name}", view.name) for view in r.targets]
    files = {name.partition("-")[2].partition(".")[0]: f"ir/{name}" for name in r.overview["ir"]}
    return environment.get_template("page.html.j2").render(
        r=r,
        sections=[("summary", "Summary"), ("pipeline", "Pipeline"), ("tuned", "What was chosen"), *targets,
                  ("memory", "Memory plan")],
        facts=_facts(r.overview),
        pipeline=[{"name": n, "seconds": s, "file": files.get(n, "")} for n, s in r.seconds.items()],
        tuned=[(name, tuned_words(one)) for name, one in r.tuned.items()],
        timelines=timelines,
        plots=plots,
        colours=COLOURS | {"waiting": WAIT},
        memory_plot=Markup(memory_plan(r.memory)),
        resource_columns=lambda rows: [(k.replace("_", " "), k, _side(rows, k)) for k in rows[0]] if rows else [],
    )  # fmt: skip


def _side(rows: list[Row], key: str) -> str:
    return "n" if any(isinstance(row[key], int | float) for row in rows) else ""


def _facts(o: Row) -> list[tuple[str, str, Any, str]]:
    """Name, the manifest's key, its value, and the value in words."""
    formats = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in o["weights_by_format"].items())
    limits = ", ".join(f"{k} {v}" for k, v in o["limits"].items())
    return [
        ("family", "family", o["family"], o["family"]),
        ("made by", "onelaunch", o["onelaunch"], f"onelaunch {o['onelaunch']}"),
        ("targets", "targets", " ".join(o["targets"]), ", ".join(f"{t} ({c})" for t, c in o["targets"].items())),
        ("limits", "limits", o["limits"]["rows"], limits),
        ("weights", "weights_bytes", o["weights_bytes"],
         f"{o['weights_bytes'] / 1e6:.1f} MB, {o['bits_per_weight']:.2f} bits per weight ({formats})"),
        ("a step reads", "weights_per_step", o["bytes_per_step"],
         f"{o['bytes_per_step'] / 1e6:.1f} MB; at {o['read_gbps']:.1f} GB/s that is {o['floor_ms']:.3f} ms"),
        ("kv cache", "kv_bytes_per_token", o["kv_bytes_per_token"],
         f"{o['kv_bytes_per_token'] / 1024:.1f} KiB per token"),
        ("workspace", "workspace_bytes", o["workspace_bytes"], f"{o['workspace_bytes'] / 2**20:.2f} MiB"),
        ("numerics", "numerics", o["numerics"], o["numerics"]),
    ]  # fmt: skip


def shown(value: object) -> str:
    """A number as people read it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
