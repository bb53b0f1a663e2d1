"""Which scheme each matrix gets: one for all of them, or by patterns over their names.

A policy file is TOML; patterns are tried in order, names are `LAYER.NAME`, or `NAME` outside of layers:

    default = "nvfp4"       # of what no pattern names; without it, as stored
    [tensors]
    "head" = "int8"
    "0.*" = "int8"          # the first layer
    "*.down" = "keep"       # as stored
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ..ir.errors import CompileError, nearest
from ..ir.graph import Graph, Program
from .quantize import SCHEMES

KEEP = "keep"


@dataclass(frozen=True)
class Policy:
    """`scheme(key)`: what a matrix is quantised to, empty for as stored."""

    default: str = ""
    patterns: Mapping[str, str] = field(default_factory=dict)

    def scheme(self, key: str) -> str:
        found = next((s for pattern, s in self.patterns.items() if fnmatchcase(key, pattern)), self.default)
        return "" if found == KEEP else found

    def unmatched(self, keys: list[str]) -> list[str]:
        """Patterns that name none of `keys`: misspelt."""
        return [pattern for pattern in self.patterns if not any(fnmatchcase(key, pattern) for key in keys)]


def parse_policy(tables: Mapping[str, Any], place: str) -> Policy:
    """The policy in a file; CompileError with all that is wrong with it."""
    known = (*SCHEMES, KEEP)
    default, patterns = tables.get("default", KEEP), tables.get("tensors", {})
    reasons = [
        f"unknown name `{n}`: expected `default` and `[tensors]`" for n in tables if n not in ("default", "tensors")
    ]
    if not isinstance(patterns, dict):
        reasons.append(f"`tensors`: expected a table of patterns, got `{patterns}`")
        patterns = {}
    given = {"default": default, **patterns}
    for name, value in given.items():
        if value not in known:
            hint = nearest(str(value), known)
            reason = f"`{name}`: expected one of {', '.join(known)}, got `{value}`"
            reasons.append(f"{reason} ({hint})" if hint else reason)
    if reasons:
        raise CompileError(reasons, place=place)
    return Policy(default, patterns)


def split_kinds(program: Program, choose: Callable[[str], str]) -> Program:
    """The same program, layers of a kind for which `choose` differs in some weight being kinds of their own."""
    graphs = {g.name: g for g in program.kinds}
    kinds: dict[tuple[str, ...], Graph] = {}
    layers = []
    for i, name in enumerate(program.layers):
        key = (name, *(choose(f"{i}.{w.name[2:]}") for w in graphs[name].weights))
        if key not in kinds:
            taken = {g.name for g in kinds.values()} | (graphs.keys() - {name})
            numbered = (f"{name}_{n}" for n in range(2, len(program.layers) + len(taken) + 2))
            kinds[key] = replace(graphs[name], name=next(n for n in (name, *numbered) if n not in taken))
        layers.append(kinds[key].name)
    return replace(program, kinds=tuple(kinds.values()), layers=tuple(layers)).verify()


def schemes(program: Program, policy: Policy) -> dict[str, dict[str, str]]:
    """By graph and weight, of a program that was split by this policy."""
    found: dict[str, dict[str, str]] = {}
    for graph, layer in program.sections():
        prefix = f"{layer}." if layer >= 0 else ""
        found.setdefault(graph.name, {w.name: policy.scheme(prefix + w.name[2:]) for w in graph.weights})
    return found


def expect_matches(program: Program, policy: Policy) -> None:
    """CompileError for patterns that name no matrix."""
    keys = [
        (f"{layer}." if layer >= 0 else "") + w.name[2:]
        for graph, layer in program.sections()
        for w in graph.weights
        if len(w.tensor.shape) > 1
    ]
    wrong = policy.unmatched(keys)
    if wrong:
        reasons = [f"--quant: pattern `{p}` names no matrix" for p in wrong]
        raise CompileError(reasons, hint=f"names are like {', '.join(f'`{k}`' for k in (keys[0], keys[1], keys[-1]))}")
