"""The files that a step is compiled from: its own, and kernels that know no model, which models share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ir.drafting import LONGEST, MATCH_BITS, SHORTEST
from ...ir.graph import Program
from ...ir.limits import Limits
from ...ir.ops import Embed
from ...ir.phases import Phase
from ...ir.schedule import part_weight, parts
from ...ir.tuning import CHOICES, Tuning
from ..rendering import template
from . import emit

TEMPLATES = Path(__file__).parent / "templates"
HEADER_CHOICES = ("cache_fetch", "panel", "block")  # that templates/tuning.h names
STEP = "step"  # the unit that is the model's own


def unit(name: str, chosen: str = "", **fields: Any) -> str:
    """A template's text with its headers in it, each once: a file that compiles alone.

    chosen: `definitions`, of what was chosen for the model.
    """
    return chosen + _inline(template(TEMPLATES, name).render(**fields), set())


def definitions(limits: Limits, tuning: Tuning) -> str:
    """What templates/tuning.h is to have otherwise; empty, so that models share their units, where nobody chose."""
    chosen = {name: tuning[name] for name in HEADER_CHOICES} | {"split": limits.split_tokens}
    changed = {name: value for name, value in chosen.items() if value != CHOICES[name].default}
    return "".join(f"#define OL_{name.upper()} {value}\n" for name, value in changed.items())


def phase_fetch(phase: Phase) -> int:
    """Bytes from a load of a phase's weights to the prefetch beside it."""
    return phase.fetch or CHOICES["fetch"].default


def _inline(text: str, seen: set[str]) -> str:
    def header(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        body = (TEMPLATES / name).read_text().replace("#pragma once\n", "")
        return _inline(body, seen)

    return re.sub(r'^#include "([\w.]+)"$', header, text, flags=re.MULTILINE)


def look_up_unit() -> str:
    """How drafts are looked up."""
    return unit("units/drafts.cpp.j2", shortest=SHORTEST, longest=LONGEST, match_bits=MATCH_BITS)


def kernel_units(program: Program, limits: Limits, tuning: Tuning) -> dict[str, str]:
    """What the step of a program calls, by file name without suffix."""
    chosen = definitions(limits, tuning)
    kv = {"bf16": "KvBf16", "f32": "KvF32"}[limits.kv_dtype]
    found = {
        f"attend_{limits.kv_dtype}": unit("units/attend.cpp.j2", chosen, kv=kv),
        "sample": unit("units/sample.cpp"),
        "team": unit("units/team.cpp"),
    }
    if limits.drafts:
        found["drafts"] = look_up_unit()
    for name in sorted(set(_formats(program))):
        fetches = _fetches(program, name)
        found[f"linear_{name}"] = unit("units/linear.cpp.j2", chosen, format=emit.format_struct(name), fetches=fetches)
    return found


def _fetches(program: Program, name: str) -> list[int]:
    """What phases with matrices of a format fetch ahead; the default, of a format that is looked up alone."""
    phases = [p for g in program.graphs for p in g.phases if p.reads_matrix]
    mine = [p for p in phases if any(part_weight(part).tensor.dtype == name for part in parts(p))]
    return sorted({phase_fetch(p) for p in mine}) or [CHOICES["fetch"].default]


def _formats(program: Program) -> Iterator[str]:
    """The formats of the matrices and tables that a program reads, repeated."""
    for phase in (p for g in program.graphs for p in g.phases):
        yield from (op.table.tensor.dtype for op in phase.ops if isinstance(op, Embed))
        if phase.reads_matrix:
            yield from (part_weight(part).tensor.dtype for part in parts(phase))
