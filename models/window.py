"""A bounded cache for a model that was not made for one: a window over layers without one, sinks kept under windows.

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) found that a model which sees only its last tokens falls apart once
the first ones leave the cache, and does not where a few of them, its attention sinks, are kept. There, positions
count within the cache. Here every token keeps its true position, as in LM-Infinite's mask (Han et al. 2023, arXiv
2308.16137) and in any framework that is given the mask "first n, or in the window": no key is rotated anew, the
meaning is the model's own attention under that mask, and no distance is one the model was not trained on, since the
compiled context never exceeds the trained one.
"""

from __future__ import annotations

import dataclasses

from ..ir.errors import UsageError
from ..ir.graph import Graph, Program
from ..ir.limits import PAGE_TOKENS
from ..ir.types import CacheType, Value


def with_window(program: Program, window: int, sinks: int) -> Program:
    """The program, its drafter's too, whose layers without a window see the last `window` positions (0: all, as they
    are), and whose windowed layers see the first `sinks` besides. UsageError for sizes that no layer can have."""
    reasons = []
    if window < 0:
        reasons.append(f"--window: expected at least 1 token, got {window}")
    if not 0 <= sinks <= PAGE_TOKENS:
        reasons.append(f"--sinks: expected 0 to {PAGE_TOKENS} tokens (one page of the cache), got {sinks}")
    caches = [graph.cache.cache for graph in program.graphs if graph.cache is not None]
    if sinks and not window and not any(cache.window for cache in caches):
        reasons.append(f"--sinks: expected a layer with a window, got `{program.name}`, whose layers see everything")
    if reasons:
        raise UsageError(reasons, hint="StreamingLLM is --window 1024 --sinks 4")
    return program.map(lambda graph: _bounded(graph, window, sinks)).verify() if window or sinks else program


def _bounded(graph: Graph, window: int, sinks: int) -> Graph:
    values = {v.name: _with_cache(v, window, sinks) for v in (*graph.params, *(op.out for op in graph.ops))}
    ops = tuple(dataclasses.replace(op.with_operands(values), out=values[op.out.name]) for op in graph.ops)
    params, results = (tuple(values[v.name] for v in of) for of in (graph.params, graph.results))
    return dataclasses.replace(graph, params=params, ops=ops, results=results)


def _with_cache(value: Value, window: int, sinks: int) -> Value:
    kind = value.type
    if not isinstance(kind, CacheType):
        return value
    window = kind.window or window
    return Value(value.name, dataclasses.replace(kind, window=window, sinks=sinks if window else 0))
