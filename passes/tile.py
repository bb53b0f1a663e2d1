"""Choose the tile of every phase that reads matrices."""

from __future__ import annotations

import dataclasses

from ..ir.errors import expect
from ..ir.graph import Graph
from ..ir.ops import Append, HeadNorm, Rope
from ..ir.phases import Phase
from ..ir.tuning import CHOICES, UNTUNED, Tuning

TILE_ROWS = 32  # output rows of one packed weight tile
PAIR_ROWS = 16  # of each matrix where two are interleaved


def tile(graph: Graph, tuning: Tuning = UNTUNED) -> Graph:
    """Set `unit`, the outputs one task computes at least: a packed tile, or a whole head where one is
    needed, and what was chosen for the phase.

    before:
        graph f(x: f32[R, 64], w.up: q4_0[96, 64]) -> (y) {
          phase up linear(layout=plain) {
            anchor {
              y: f32[R, 96] = linear(x, w.up)
            }
          }
        }
    after:
        graph f(x: f32[R, 64], w.up: q4_0[96, 64]) -> (y) {
          phase up linear(layout=plain, unit=32) {
            anchor {
              y: f32[R, 96] = linear(x, w.up)
            }
          }
        }
    """
    phases = tuple(_tiled(p, _fetch(tuning, graph, p)) if p.reads_matrix else p for p in graph.phases)
    return dataclasses.replace(graph, phases=phases)


def _fetch(tuning: Tuning, graph: Graph, phase: Phase) -> int:
    """0 where the phase is as everywhere, so that phases nobody chose for look alike."""
    chosen = tuning.of_phase("fetch", graph.name, phase.name)
    return chosen if chosen != CHOICES["fetch"].default else 0


def _tiled(phase: Phase, fetch: int) -> Phase:
    unit = {"plain": TILE_ROWS, "pairs": PAIR_ROWS, "heads": 0}[phase.layout] or _head_size(phase)
    return dataclasses.replace(phase, unit=unit, fetch=fetch)


def _head_size(phase: Phase) -> int:
    sizes = set()
    for op in phase.epilogue:
        match op:
            case Rope():
                sizes.add(op.angles.tensor.width)
            case HeadNorm():
                sizes.add(op.weight.tensor.width)
            case Append():
                sizes.add(op.kv.cache.head_dim)
    expect(len(sizes) == 1, f"phase `{phase.name}`: expected one head size, got {sorted(sizes)}")
    return int(sizes.pop())
