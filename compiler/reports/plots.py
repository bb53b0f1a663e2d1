"""Plots of the report as SVG text: numbers become coordinates here, the template only places them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from ..gpu.step_model import StepModel
from ..gpu.timeline import trace
from .data import Row, TargetView

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1240, 90, 20, 14, 46
ROOF_HEIGHT, LANE_HEIGHT, MOST_LANES = 380, 16, 16
COLOURS = {"linear": "#2f6db3", "experts": "#7a4fb5", "attend": "#c2603a", "rows": "#4c9c6a", "sample": "#a08a2e",
           "commit": "#777777", "guess": "#777777"}  # fmt: skip
WAIT, PRIVATE, SHARED = "#e3e3e3", "#c2603a", "#2f6db3"
BYTES_APART = 14  # pixels between labels of the roofline


def roofline(view: TargetView) -> str:
    """Operations per byte against operations per microsecond of every phase, both logarithmic, under two roofs."""
    points = [p for p in view.phases if p["bytes"] and p["operations"] and p["us"]]
    if not points:
        return ""
    rate = view.step.machine.bandwidth_gb_s * 1e3  # bytes per microsecond
    xs = [p["operations"] / p["bytes"] for p in points]
    ys = [p["operations"] / p["us"] for p in points]
    x = _Log([*xs, view.peak / rate * 2], LEFT, WIDTH - RIGHT)
    y = _Log([*ys, view.peak * 1.5], ROOF_HEIGHT - BOTTOM, TOP)
    ridge = view.peak / rate
    roof = [(x.low, rate * x.low), (ridge, view.peak), (x.high, view.peak)]
    parts = [*_axis(x, y, "operations per byte", "operations per us")]
    line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in roof)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#222" stroke-width="1.5"/>')
    parts += _labelled([(x.at(a), y.at(b), p) for a, b, p in zip(xs, ys, points, strict=True)])
    return _svg(ROOF_HEIGHT, parts, f"Roofline of {view.name}")


def _labelled(points: Sequence[tuple[float, float, Row]]) -> Iterator[str]:
    """Dots, and labels to the right of the cloud that do not cover each other."""
    taken = -1e9
    for px, py, phase in sorted(points, key=lambda p: p[1]):
        at = max(py, taken + BYTES_APART)
        taken = at
        share = 100 * phase["floor_us"] / phase["us"]
        name = escape(f"{phase['section']}.{phase['phase']}: {share:.0f} % of the bandwidth, by {phase['bound']}")
        colour = COLOURS.get(phase["kind"], "#333")
        yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{colour}"/>'
        yield f'<path d="M{px + 6:.1f},{py:.1f} L{px + 34:.1f},{at:.1f}" stroke="#999" fill="none"/>'
        yield f'<text x="{px + 38:.1f}" y="{at + 4:.1f}">{name}</text>'


class _Log:
    """A logarithmic axis over whole decades around the values."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.first, self.last = floor(log10(min(values) * 0.8)), ceil(log10(max(values) * 1.2))
        self.low, self.high, self._start, self._end = 10.0**self.first, 10.0**self.last, start, end

    def at(self, value: float) -> float:
        share = (log10(value) - self.first) / (self.last - self.first)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        return [10.0**n for n in range(self.first, self.last + 1)]


def _axis(x: _Log, y: _Log, x_name: str, y_name: str) -> Iterator[str]:
    bottom = ROOF_HEIGHT - BOTTOM
    for value in x.ticks():
        at = x.at(value)
        yield f'<path d="M{at:.1f},{TOP} V{bottom}" stroke="#ddd"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
    for value in y.ticks():
        at = y.at(value)
        yield f'<path d="M{LEFT},{at:.1f} H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
    yield f'<text x="{WIDTH / 2}" y="{ROOF_HEIGHT - 8}" text-anchor="middle">{x_name}</text>'
    turn = f'transform="rotate(-90 14 {ROOF_HEIGHT / 2})" text-anchor="middle"'
    yield f'<text x="14" y="{ROOF_HEIGHT / 2}" {turn}>{y_name}</text>'


def timeline(view: TargetView) -> str:
    """The modelled step of the first workers: the first section that runs, one layer, and the last section."""
    events, shown = _window(trace(view.step, view.schedule)["traceEvents"], view)
    if not events:
        return ""
    lanes = min(view.step.workers, MOST_LANES)
    start, end = shown
    scale = (WIDTH - LEFT - RIGHT) / (end - start)
    kinds = {(p.section, p.phase): p.kind for p in view.step.phases}
    height = TOP + lanes * LANE_HEIGHT + BOTTOM
    parts = [f'<text x="{LEFT - 6}" y="{TOP + w * LANE_HEIGHT + 12}" text-anchor="end">worker {w}</text>'
             for w in range(lanes)]  # fmt: skip
    for e in events:
        at, wide = LEFT + (e["ts"] - start) * scale, e["dur"] * scale
        kind = kinds.get((e["cat"], e["name"].partition(" ")[0]), "wait")
        top = TOP + e["tid"] * LANE_HEIGHT + 1
        about = escape(f"{e['name']}: {e['dur']:.2f} us")
        parts.append(
            f'<rect x="{at:.2f}" y="{top}" width="{max(wide, 0.3):.2f}" height="{LANE_HEIGHT - 2}" '
            f'fill="{COLOURS.get(kind, WAIT)}"><title>{about}</title></rect>'
        )
        if e["tid"] == 0 and wide > 7 * len(e["name"]) and kind != "wait":
            parts.append(f'<text x="{at + 3:.1f}" y="{top + 11}" class="on">{escape(e["name"])}</text>')
    parts += _time_ticks(start, end, scale, TOP + lanes * LANE_HEIGHT)
    return _svg(height, parts, f"Timeline of {view.name}")


def _window(events: Sequence[Row], view: TargetView) -> tuple[list[Row], tuple[float, float]]:
    """Events of the workers that are drawn, up to the end of the first layer of each kind."""
    lanes = min(view.step.workers, MOST_LANES)
    whole = [e for e in events if e["ph"] == "X" and e["tid"] < lanes]
    end = _end_of_first_layers(view.step, view.schedule)
    mine = [e for e in whole if e["ts"] < end]
    return mine, (0.0, end)


def _end_of_first_layers(step: StepModel, schedule: Any) -> float:
    """When every kind of section has run once, from the start of the step; the exit is left out where layers repeat."""
    seen: set[str] = set()
    now, kinds = step.machine.launch_us, {g.name for g, layer in schedule.program.sections() if layer >= 0}
    times = {name: sum(p.us for p in step.phases if p.section == name) for name in {p.section for p in step.phases}}
    for graph, _ in schedule.program.sections():
        now += times[graph.name]
        seen.add(graph.name)
        if kinds <= seen:
            break
    return now


def _time_ticks(start: float, end: float, scale: float, y: float) -> Iterator[str]:
    step = 10.0 ** floor(log10((end - start) / 4))
    for i in range(int((end - start) / step) + 1):
        at = LEFT + i * step * scale
        yield f'<path d="M{at:.1f},{y} v5" stroke="#444"/>'
        if (end - start) / step < 16 or i % 5 == 0:
            yield f'<text x="{at:.1f}" y="{y + 18}" text-anchor="middle">{start + i * step:g} us</text>'


def memory_plan(buffers: Sequence[Row]) -> str:
    """Every buffer of the workspace over its bytes, one to a line in order of offset."""
    if not buffers:
        return ""
    top = max(b["offset"] + b["bytes"] for b in buffers)
    left = 330
    scale = (WIDTH - left - RIGHT) / top
    parts = []
    for i, b in enumerate(buffers):
        y = TOP + i * LANE_HEIGHT
        about = escape(f"{b['buffer']}: {b['bytes']:,} bytes at {b['offset']:,}, {b['alive']}")
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(b["buffer"])}</text>')
        parts.append(
            f'<rect x="{left + b["offset"] * scale:.2f}" y="{y + 1}" width="{max(1.0, b["bytes"] * scale):.2f}" '
            f'height="{LANE_HEIGHT - 3}" fill="{PRIVATE if b["copies"] > 1 else SHARED}"><title>{about}</title></rect>'
        )
    y = TOP + len(buffers) * LANE_HEIGHT
    parts += [
        f'<text x="{left + s * top * scale:.1f}" y="{y + 20}" text-anchor="middle">{s * top / 2**20:.2f} MiB</text>'
        for s in (0.0, 0.25, 0.5, 0.75, 0.97)
    ]
    return _svg(y + 30, parts, "Memory plan")


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}">\n{body}\n</svg>'
    )
