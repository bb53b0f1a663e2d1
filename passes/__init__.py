"""The passes, in order. One pass is one file and one line here.

Graph passes map every graph of the program; schedule passes map every schedule (one per worker count and
row bucket). `Options` is all that a pass may depend on besides its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir.graph import Graph
from ..ir.schedule import Schedule
from ..ir.tuning import UNTUNED, Tuning
from .allocate import allocate
from .canonicalize import canonicalize
from .fuse import fuse
from .prefetch import prefetch
from .quantize import quantize
from .schedule import schedule
from .sync import sync
from .tile import tile


@dataclass(frozen=True)
class Options:
    """What the user asked of the passes: `quant` is a scheme for all matrices, empty for formats as stored, or by
    graph and weight one for each; `tuning`: what was chosen for the machine."""

    quant: str | Mapping[str, Mapping[str, str]] = ""
    tuning: Tuning = UNTUNED

    def schemes(self, graph: Graph) -> str | Mapping[str, str]:
        return self.quant if isinstance(self.quant, str) else self.quant[graph.name]


GRAPH_PASSES: tuple[tuple[str, Callable[[Graph, Options], Graph]], ...] = (
    ("canonicalize", lambda graph, options: canonicalize(graph)),
    ("quantize", lambda graph, options: quantize(graph, options.schemes(graph))),
    ("fuse", lambda graph, options: fuse(graph)),
    ("tile", lambda graph, options: tile(graph, options.tuning)),
)
SCHEDULE_PASSES: tuple[tuple[str, Callable[[Schedule], Schedule]], ...] = (
    ("prefetch", prefetch),
    ("sync", sync),
    ("allocate", allocate),
)
PIPELINE = (
    "import",
    *(name for name, _ in GRAPH_PASSES),
    "schedule",
    *(name for name, _ in SCHEDULE_PASSES),
    "validate",
    "codegen",
    "pack",
)

__all__ = ["GRAPH_PASSES", "PIPELINE", "SCHEDULE_PASSES", "Options", "schedule"]
