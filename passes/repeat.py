"""Which work on rows every worker does for itself when there are few rows: cheaper than sharing it and joining."""

from __future__ import annotations

from collections import Counter

from ..ir.graph import Program
from ..ir.types import TensorType
from .allocate import places


def repeated(program: Program) -> set[tuple[str, str]]:
    """The (graph, phase) of `rows` phases that every worker runs on all rows, each into a copy of its own.

    Nobody waits for such a phase; its workers wait for what it reads. It is the largest set for which

    - a place that one of them writes is written by no phase outside: what others compute would reach one copy only.
      Places are those of `allocate.storage`, so the running activation is one from the first section to the last;
    - a shared place that one of them reads is written by one phase: a worker that has no tiles in the phases after
      may read it late, when others have gone on.

    Gemma adds to its running activation in `rows` phases alone; where epilogues of matrices add to it, none is
    repeated.
    """
    running = program.entry.results[0].name
    touched = {(g.name, p.name): places(g, p, running) for g in program.graphs for p in g.phases}
    writers = Counter(place for _, writes in touched.values() for place in writes)
    found = {
        (g.name, p.name)
        for g in program.graphs
        for p in g.phases
        if p.anchor_kind == "rows" and all(isinstance(op.out.type, TensorType) for op in p.ops)
    }
    while True:
        shared = {place for key in touched.keys() - found for place in touched[key][1]}
        moved = shared & {place for place, count in writers.items() if count > 1}
        kept = {key for key in found if not touched[key][0] & moved and not touched[key][1] & shared}
        if kept == found:
            return found
        found = kept
