"""What evaluating a candidate gives, whichever evaluator did it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import exp, log
from typing import Any


@dataclass(frozen=True)
class Result:
    """A candidate beside the default. per_test, per_phase: name to microseconds of (default, candidate).

    ratio: the geometric mean over tests of candidate / default, each the median of paired rounds where measured.
    wrong: why its numbers are not the default's; such a candidate is never chosen. notes: for `--explain`.
    """

    ratio: float
    per_test: dict[str, tuple[float, float]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    per_phase: dict[str, tuple[float, float]] = field(default_factory=dict)
    noise: float = 0.0
    wrong: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))
