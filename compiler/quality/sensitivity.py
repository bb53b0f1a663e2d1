"""What quantising each matrix alone costs: the divergence from the unquantised model, by the reference executor.

One matrix (or all of a name, or of a layer) is rounded, everything else is as stored, in float32 and without the
rounding of activations that kernels add: what is ranked is the rounding of weights. Layers before the first rounded one
are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ...ir.errors import CompileError
from ...ir.formats import FORMATS
from ...ir.graph import Program
from ...models.importer import Imported
from ..check.reference_weights import ReferenceWeights
from .layerwise import LayerRun
from .perplexity import Tally, Window

GROUPS = ("tensor", "name", "layer")  # what is rounded together
SHARE = 0.5  # of the summed divergence that a policy gives the better scheme

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sensitivity:
    """A pattern of names as a policy has them, what rounding its matrices costs, and the bytes on disk it saves."""

    pattern: str
    matrices: int
    kl: float
    kl_99: float
    same_top: float
    perplexity: float
    bytes_saved: int

    @property
    def kl_per_mb(self) -> float:
        return self.kl / (self.bytes_saved / 1e6) if self.bytes_saved else 0.0


class _Mixed(Mapping[str, Any]):
    """Weights as stored, but of some keys as rounded."""

    def __init__(self, stored: ReferenceWeights, rounded: ReferenceWeights, keys: frozenset[str]) -> None:
        self._stored, self._rounded, self._keys = stored, rounded, keys

    def __getitem__(self, key: str) -> torch.Tensor:
        return (self._rounded if key in self._keys else self._stored)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Base:
    """One window as stored: what every layer reads, and the logits."""

    def __init__(self, program: Program, window: Window, weights: ReferenceWeights) -> None:
        self.window, self.run = window, LayerRun(program, window.tokens, window.scored)
        self.inputs = [self.run.enter(weights)]
        for layer in range(len(program.layers)):
            self.inputs.append(self.run.layer(layer, self.inputs[-1], weights))
        self.logits = self.run.logits(self.inputs[-1], weights)

    def with_weights(self, weights: Mapping[str, Any], first: int) -> torch.Tensor:
        """Logits with other weights in layers from `first` on; -1: from the embedding on."""
        x = self.run.enter(weights) if first < 0 else self.inputs[first]
        for layer in range(max(first, 0), len(self.inputs) - 1):
            x = self.run.layer(layer, x, weights)
        return self.run.logits(x, weights)


def sensitivities(
    imported: Imported, rounded: Program, found: Sequence[Window], by: str, progress: Progress
) -> list[Sensitivity]:
    """What each group of matrices costs, the dearest first. `rounded`: the program with the formats to try.

    CompileError if the formats are the same: nothing would be rounded.
    """
    stored, other = ReferenceWeights(imported, imported.program), ReferenceWeights(imported, rounded)
    groups = _groups(stored, other, by)
    if not groups:
        raise CompileError("--sensitivity: expected matrices that the format changes, got none")
    tallies = {pattern: Tally() for pattern in groups}
    for i, window in enumerate(found):
        base = _Base(imported.program, window, stored)
        for j, (pattern, keys) in enumerate(groups.items()):
            mixed = _Mixed(stored, other, frozenset(keys))
            logits = base.with_weights(mixed, min(_first_use(imported.program, key) for key in keys))
            tallies[pattern].add(logits.numpy(), window.targets, base.logits.numpy())
            progress(f"chunk {i + 1} of {len(found)}, {j + 1} of {len(groups)}: {pattern}")
    rows = [_result(pattern, keys, tallies[pattern], stored, other) for pattern, keys in groups.items()]
    return sorted(rows, key=lambda row: -row.kl)


def _groups(stored: ReferenceWeights, other: ReferenceWeights, by: str) -> dict[str, list[str]]:
    """Keys by the pattern that names them, of all matrices that have another format."""
    groups: dict[str, list[str]] = {}
    for key, name in other.formats.items():
        if stored.formats[key] != name:
            layer, dot, own = key.rpartition(".")
            pattern = {"tensor": key, "name": f"*.{own}", "layer": f"{layer}.*"}[by] if dot else key
            groups.setdefault(pattern, []).append(key)
    return groups


def _first_use(program: Program, key: str) -> int:
    """The layer a weight is first read in: -1 is the entry, the number of layers the exit."""
    layer, dot, _ = key.partition(".")
    if dot:
        return int(layer)
    return -1 if any(w.name == f"w.{key}" for w in program.entry.weights) else len(program.layers)


def _result(
    pattern: str, keys: list[str], tally: Tally, stored: ReferenceWeights, other: ReferenceWeights
) -> Sensitivity:
    score = tally.score()
    assert score.kl is not None
    assert score.kl_99 is not None
    assert score.same_top is not None
    saved = sum(_bytes(stored, key) - _bytes(other, key) for key in keys)
    return Sensitivity(pattern, len(keys), score.kl, score.kl_99, score.same_top, score.perplexity, saved)


def _bytes(weights: ReferenceWeights, key: str) -> int:
    shape = weights.imported.sources[key].shape
    return prod(shape[:-1]) * FORMATS[weights.formats[key]].row_bytes(shape[-1])


def policy_text(rows: Sequence[Sensitivity], scheme: str, better: str) -> str:
    """A policy file: `better` for the dearest that make up half of the summed divergence, `scheme` for the rest."""
    total, so_far, lines = sum(row.kl for row in rows), 0.0, []
    for row in rows:
        if so_far >= SHARE * total:
            break
        lines.append(f'"{row.pattern}" = "{better}"  # KL {row.kl:.2e} alone')
        so_far += row.kl
    return "\n".join([f'default = "{scheme}"', "[tensors]", *lines, ""])
