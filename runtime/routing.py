"""Which experts a mixture of experts uses: a file of JSON lines, written step by step.

The first line says what is routed: `{"routing": 1, "model": .., "layers": L, "experts": E, "choices": k}`. Each line
after it is a step: for every layer, for every row, the numbers of its experts in order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .state import State

VERSION = 1


class RoutingTrace:
    """Writes the routing that a step left in its state; `step` is called after each with its number of rows."""

    def __init__(self, path: Path, model: str, experts: int, state: State) -> None:
        self._state, self._file = state, path.open("w")
        layers, _, choices = state.routing.shape
        self._line({"routing": VERSION, "model": model, "layers": layers, "experts": experts, "choices": choices})

    def step(self, rows: int) -> None:
        used = self._state.routing[:, :rows].tolist()
        self._line([[[e for e in row if e >= 0] for row in layer] for layer in used])

    def close(self) -> None:
        self._file.close()

    def _line(self, value: Any) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")
