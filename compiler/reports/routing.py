"""How often a step would find its experts in memory, if each layer kept some: from a trace of `run --trace-routing`.

A load is an expert that a layer needs in a step, whichever of its rows ask for it. Two ways to keep n experts per
layer: those the trace uses most, always the same (`fixed`), or those used last (`lru`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import LoadError


@dataclass(frozen=True)
class Routing:
    """`loads[layer]`: the experts of each step, sorted. `assignments`: of rows to experts, all layers."""

    layers: int
    experts: int
    loads: tuple[tuple[tuple[int, ...], ...], ...]
    assignments: int


def read_routing(path: Path) -> Routing:
    """A trace; LoadError if it is none."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        head, steps = lines[0], lines[1:]
        if head["routing"] != 1:
            raise ValueError(f"version {head['routing']}")
        layers, experts = int(head["layers"]), int(head["experts"])
        used = [[[int(e) for row in step[layer] for e in row] for step in steps] for layer in range(layers)]
        if any(not 0 <= e < experts for layer in used for step in layer for e in step):
            raise ValueError("an expert's number is out of range")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise LoadError(
            f"expected a routing trace, got {error!r}", place=str(path), hint="`run --trace-routing FILE` writes one"
        ) from None
    loads = tuple(tuple(tuple(sorted(set(step))) for step in layer) for layer in used)
    return Routing(layers, experts, loads, sum(len(step) for layer in used for step in layer))


def hit_rates(routing: Routing) -> list[dict[str, Any]]:
    """One row per number of experts kept in each layer: shares of the loads that find theirs."""
    total = sum(len(step) for layer in routing.loads for step in layer)
    fixed, recent = [0] * (routing.experts + 1), [0] * (routing.experts + 1)
    for layer in routing.loads:
        counts = Counter(e for step in layer for e in step)
        for rank, (_, count) in enumerate(counts.most_common()):
            fixed[rank + 1] += count  # found if more than `rank` are kept
        for depth, count in _depths(layer).items():
            recent[depth + 1] += count
    rows, sums = [], [0, 0]
    for kept in range(1, routing.experts + 1):
        sums = [sums[0] + fixed[kept], sums[1] + recent[kept]]
        shares = [s / total if total else 0.0 for s in sums]
        rows.append({"resident": kept, "fixed": shares[0], "lru": shares[1]})
    return rows


def _depths(layer: tuple[tuple[int, ...], ...]) -> Counter[int]:
    """How many other experts were used since each load's last use: it is found if more than so many are kept."""
    stack: list[int] = []  # the one used last comes first
    found: Counter[int] = Counter()
    for step in layer:
        for expert in step:
            if expert in stack:
                found[stack.index(expert)] += 1
                stack.remove(expert)
            stack.insert(0, expert)
    return found
