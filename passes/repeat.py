"""Which work on rows every worker does for itself when there are few rows: cheaper than sharing it and joining."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..ir.graph import Graph, Program
from ..ir.types import TensorType
from .allocate import places

Key = tuple[str, str]  # graph, phase
EVERYBODY = ("rows", "attend")  # phases that every worker takes part in, as in drains over experts


def repeated(program: Program) -> set[Key]:
    """The (graph, phase) of `rows` phases that every worker runs on all rows, each into a copy of its own.

    Nobody waits for such a phase; its workers wait for what it reads. It is the largest set for which

    - a place that one of them writes is written by no phase outside: what others compute would reach one copy only.
      Places are those of `allocate.storage`, so the running activation is one from the first section to the last;
    - a shared place that one of them reads is written by one phase: a worker that has no tiles in the phases after
      may read it late, when others have gone on;
    - before the next layer writes it, some phase of the layer has every worker take part and so waits for the late.

    Gemma adds to its running activation in `rows` phases alone; where epilogues of matrices add to it, none is
    repeated.
    """
    touched = {(g.name, p.name): places(g, p, program.model_of(g).running) for g in program.graphs for p in g.phases}
    writers = Counter(place for _, writes in touched.values() for place in writes)
    found = {
        (g.name, p.name)
        for g in program.graphs
        for p in g.phases
        if p.anchor_kind == "rows" and all(isinstance(op.out.type, TensorType) for op in p.ops)
    }
    while True:
        shared = {place for key in touched.keys() - found for place in touched[key][1]}
        lasting = {place for place in shared if writers[place] == 1}
        lasting -= {place for g in program.graphs for place in _overtaken(g, found, touched)}
        kept = {key for key in found if touched[key][0] & shared <= lasting and not touched[key][1] & shared}
        if kept == found:
            return found
        found = kept


def _overtaken(graph: Graph, found: set[Key], touched: Mapping[Key, tuple[set[str], set[str]]]) -> set[str]:
    """Places that the next layer may write while a phase of `found` still reads them in this one."""
    keys = [(graph.name, p.name) for p in graph.phases]
    everybody = [p.anchor_kind in EVERYBODY or p.is_drain for p in graph.phases]
    meetings = [i for i, key in enumerate(keys) if everybody[i] and key not in found]
    return {
        place
        for writer, maker in enumerate(keys)
        for reader in range(writer + 1, len(keys))
        for place in touched[maker][1] & touched[keys[reader]][0]
        if keys[reader] in found and all(writer < i < reader for i in meetings)
    }
