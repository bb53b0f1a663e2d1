"""What rendering for any target shares: templates, and one function per distinct body."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..ir.bodies import Args, BodyArgs, all_bodies
from ..ir.graph import Graph
from ..ir.phases import Phase
from ..ir.schedule import Schedule
from ..ir.table import Body, cache_groups

BodyKey = tuple[str, str, str]  # graph, phase, body
Bodies = Mapping[str, Mapping[BodyKey, Body]]  # per bucket


@dataclass(frozen=True)
class BodyText:
    """A generated function: its number in the dispatcher, the first body it serves, its text."""

    code: int
    title: str
    text: str


@cache
def _environment(folder: Path) -> Environment:
    return Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def template(folder: Path, name: str) -> Template:
    """A Jinja2 template of a target; an undefined name in it is an error."""
    return _environment(folder).get_template(name)


def render_bodies(
    schedules: Mapping[str, Schedule], render: Callable[[Graph, Phase, str, Args], str], comment: str
) -> tuple[list[BodyText], Bodies]:
    """Every distinct body of a program and which one each task runs, with its arguments per bucket.

    `render` writes CODE for the function's number and TITLE for its title. Bodies that differ in comments
    (from `comment` on) and in the names of values alone are one function.
    """
    one = next(iter(schedules.values()))
    groups = cache_groups(one.program)
    args = {b: BodyArgs(one.program, one.limits, b, groups) for b in schedules}
    texts: dict[str, BodyText] = {}
    bodies: dict[str, dict[BodyKey, Body]] = {b: {} for b in schedules}
    for graph, phase, name in all_bodies(one.program):
        named = {b: args[b].of(graph, phase, name) for b in schedules}
        text, title = render(graph, phase, name, next(iter(named.values()))), f"{graph.name}.{phase.name}.{name}"
        number = len(texts)
        whole = text.replace("CODE", str(number)).replace("TITLE", title)
        found = texts.setdefault(_shape(text, comment), BodyText(number, title, whole))
        for b in schedules:
            bodies[b][graph.name, phase.name, name] = Body(found.code, tuple(named[b].values()))
    return list(texts.values()), bodies


def _shape(text: str, comment: str) -> str:
    """The text without comments, values numbered by first appearance."""
    names: dict[str, str] = {}
    plain = re.sub(rf"{comment}.*", "", text)
    return re.sub(r"\b\w*v_\w+", lambda m: names.setdefault(m[0], f"v{len(names)}"), plain)
