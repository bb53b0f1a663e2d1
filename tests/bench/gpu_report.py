"""From timings to the report of gpu.py: verdict, speeds, shares of phases, as JSON-ready dicts and as a table.

Nothing here touches a device, so everything is tested without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onelaunch.compiler.check.verify import COSINE, LEAD, compare_logits
from onelaunch.compiler.reports.artifact import fused_program
from onelaunch.ir.schedule import BUCKETS, Schedule
from onelaunch.ir.segments import cuts
from onelaunch.passes import SCHEDULE_PASSES, schedule
from onelaunch.runtime import Artifact

Row = dict[str, Any]
FLOOR = 1e-3  # least error of a logit, in deviations of its row, that a near tie is judged by


def artifact_schedule(artifact: Artifact, workers: int) -> Schedule:
    """The schedule behind an artifact's table for few rows, made again from its fused program."""
    made = schedule(fused_program(artifact), artifact.manifest.limits, BUCKETS[0], workers)
    for _, change in SCHEDULE_PASSES:
        made = change(made)
    return made


def launch_names(made: Schedule, table: NDArray[np.int32]) -> list[str]:
    """Which phases each launch of a table runs, `decoder.qkv`; ValueError if the table is not the schedule's."""
    queues = [
        [f"{graph.name}.{task.phase}" for graph, _ in made.program.sections()
         for task in made.section(graph.name).queues[worker]]
        for worker in range(made.workers)
    ]  # fmt: skip
    launches = cuts(table)
    if not launches or len(table) != made.workers or launches[-1][1].tolist() != [len(q) for q in queues]:
        raise ValueError("expected the table of this schedule, got one with other records")
    return [
        " + ".join(dict.fromkeys(n for q, a, b in zip(queues, *cut, strict=True) for n in q[a:b])) for cut in launches
    ]


def phase_shares(names: Sequence[str], rounds: Sequence[Sequence[float]]) -> list[Row]:
    """Of each phase: its launches, their time (the median of each launch over rounds, summed), its share of all."""
    found: dict[str, Row] = {}
    for name, seconds in zip(names, zip(*rounds, strict=True), strict=True):
        row = found.setdefault(name, {"phase": name, "launches": 0, "us": 0.0})
        row["launches"] += 1
        row["us"] += 1e6 * median(seconds)
    total = sum(row["us"] for row in found.values())
    return [{**row, "share": row["us"] / total} for row in found.values()]


def speed(seconds: Sequence[float], device: Sequence[float], bytes_per_token: float, copy_gbps: float) -> Row:
    """One way of launching: wall seconds per token of each round, and those of one replay by the device's clock."""
    us = 1e6 * median(seconds)
    gbps = bytes_per_token / us * 1e-3
    return {
        "us_per_token": us,
        "fastest_us": 1e6 * min(seconds),
        "slowest_us": 1e6 * max(seconds),
        "device_us": 1e6 * median(device),
        "gbps": gbps,
        "of_copy": gbps / copy_gbps,
        "rounds_us": [1e6 * s for s in seconds],
    }


def verdict(
    want: NDArray[np.float32], got: NDArray[np.float32], per_phase_equal: bool, generated: dict[str, list[int]]
) -> Row:
    """Whether the device's logits [steps, vocab] say what the CPU target's do on the same tokens.

    The targets round activations differently: another token passes where the CPU's lead is within that rounding.
    generated: tokens of `cpu`, `mega` and `per-phase`, each left to itself.
    """
    rows = [compare_logits(a, b) for a, b in zip(got, want, strict=True)]
    error = mean(r["relative_rmse"] for r in rows)
    other = [r for r in rows if r["token"] != r["reference_token"]]
    lead = max((r["margin"] for r in other), default=0.0)
    cosine = min(r["cosine"] for r in rows)
    same = generated["mega"] == generated["per-phase"]
    return {
        "passed": bool(cosine >= COSINE and lead <= LEAD * max(error, FLOOR) and per_phase_equal and same),
        "steps": len(rows),
        "tokens_equal": len(rows) - len(other),
        "largest_lead_lost": lead,
        "worst_cosine": cosine,
        "mean_error": error,
        "per_phase_is_mega": bool(per_phase_equal and same),
        "generated_as_cpu": _common(generated["cpu"], generated["mega"]),
    }


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts share from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def markdown(report: Row) -> str:
    """The report for people; the verdict comes first."""
    v, d = report["verdict"], report["device"]
    copies = "copies reach {before:.0f} GB/s before, {after:.0f} after, read and written bytes together"
    clocks = "; ".join(f"{when} {_clocks(report['clocks'][when])}" for when in ("before", "after"))
    lines = [
        f"{'passed' if v['passed'] else 'FAILED'}: {v['tokens_equal']} of {v['steps']} tokens as the CPU target's, "
        f"worst cosine {v['worst_cosine']:.5f}, mean error {v['mean_error']:.4f}; per-phase "
        f"{'equals' if v['per_phase_is_mega'] else 'DIFFERS FROM'} mega to the bit",
        f"{report['model']} on {d['name']} ({report['target']}, {report['workers']} workers, driver {d['driver']})",
        copies.format(**report["copy_gbps"]),
        f"clocks: {clocks}",
        "",
        "| launches | us/token | min - max | device us | GB/s | of copy |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, s in report["modes"].items():
        lines.append(
            f"| {name} ({s['launches']}) | {s['us_per_token']:.1f} | {s['fastest_us']:.1f} - {s['slowest_us']:.1f} "
            f"| {s['device_us']:.1f} | {s['gbps']:.0f} | {100 * s['of_copy']:.0f} % |"
        )
    lines += ["", "| phase, per-phase | launches | us | share |", "|---|--:|--:|--:|"]
    for p in report["phases"]:
        lines.append(f"| {p['phase']} | {p['launches']} | {p['us']:.1f} | {100 * p['share']:.1f} % |")
    return "\n".join(lines)


def _clocks(found: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items()) or "not read"
