"""Why the winner won: the candidates of every choice that a phase feels, from the journal of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.errors import UsageError, nearest
from ...ir.graph import Program
from ...ir.phases import Phase
from .search import Trial
from .space import Degree

Row = dict[str, Any]


def phase_named(program: Program, name: str) -> tuple[str, Phase]:
    """The graph and phase of `decoder.qkv`, or of `qkv` where one graph alone has it. UsageError else."""
    known = {f"{g.name}.{p.name}": (g.name, p) for g in program.graphs for p in g.phases}
    mine = [key for key in known if key == name or key.partition(".")[2] == name]
    if len(mine) == 1:
        return known[mine[0]]
    hint = f"one of {', '.join(mine)}" if mine else nearest(name, known) or ""
    raise UsageError(f"--explain: expected a phase, one of {', '.join(known)}, got `{name}`", hint=hint)


def explain(program: Program, name: str, degrees: Sequence[Degree], trials: Sequence[Trial]) -> list[Row]:
    """One row per value of every choice that a phase feels.

    best: the lowest ratio to the default of a candidate with the value; us: of this phase in that candidate, and of
    the default, where the evaluator knows phases apart. verdict: won, default, tried, pruned or untried, and why.
    """
    graph, phase = phase_named(program, name)
    where, winner = f"{graph}.{phase.name}", _winner(trials)
    rows: list[Row] = []
    for degree in degrees:
        own = degree.choice.home != "phase" or any(key.endswith(f" {where}") for key in degree.keys)
        if phase.anchor_kind not in degree.choice.anchors or not own:
            continue
        for value in degree.values:
            rows.append(_tried(degree, value, where, trials, winner))
        rows += [_row(degree, v, "pruned", why) for v, why in degree.pruned.items()]
    return rows


def _winner(trials: Sequence[Trial]) -> Trial | None:
    return next((t for t in trials if t.right), None)


def _value(trial: Trial, degree: Degree) -> int:
    return trial.tuning.as_dict().get(degree.key, degree.default)


def _tried(degree: Degree, value: int, where: str, trials: Sequence[Trial], winner: Trial | None) -> Row:
    mine = [t for t in trials if _value(t, degree) == value]
    right = [t for t in mine if t.right]
    if not right:
        wrong = next((t.result["wrong"] for t in mine), "the budget ended before")
        return _row(degree, value, "refused" if mine else "untried", wrong)
    best = right[0]
    won = winner is not None and _value(winner, degree) == value
    others = [t for t in trials if t.right and _value(t, degree) != value]
    why = _why(best, others, where)
    row = _row(degree, value, "won" if won else "tried", why)
    row["ratio"] = best.ratio
    if where in best.result.get("per_phase", {}):
        row["default_us"], row["us"] = best.result["per_phase"][where]
    return row


def _why(best: Trial, others: Sequence[Trial], where: str) -> str:
    """Beside the best candidate without the value, and what bounds the phase where that is known."""
    found = []
    if others:
        found.append(_beside(best.ratio, others[0].ratio))
    notes = best.result.get("notes", {})
    if "bounds" in notes and where in notes["bounds"]:
        found.append(f"bound by {notes['bounds'][where]}")
    if "registers" in notes:
        spilled = f", {notes['spills']} bytes spilled" if notes["spills"] else ""
        found.append(
            f"{notes['registers']} registers{spilled}, {notes['shared'] / 1024:.0f} KiB shared, "
            f"{notes['per_weight']:.2f} instructions per weight"
        )
    if noise := best.result.get("noise"):
        found.append(f"noise {100 * noise:.1f} %")
    return "; ".join(found)


def _beside(mine: float, other: float) -> str:
    """Of times: how much longer or shorter."""
    if abs(mine / other - 1) < 0.0005:
        return "no different from the best candidate with another value"
    word = "slower" if mine > other else "faster"
    return f"{100 * abs(mine / other - 1):.1f} % {word} than the best candidate with another value"


def _row(degree: Degree, value: int, verdict: str, why: str) -> Row:
    choice = degree.choice
    return {
        "choice": choice.name,
        "value": value,
        "unit": choice.unit,
        "default": value == degree.default,
        "verdict": verdict,
        "ratio": None,
        "default_us": None,
        "us": None,
        "why": why,
    }
