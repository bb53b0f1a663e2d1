"""The weights of a checkpoint as the reference executor takes them: float32, rounded as a program's formats say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...ir.formats import FORMATS, decode
from ...ir.graph import Program
from ...models.importer import Imported
from ..weights import read_rows, read_vector

KEEP_BYTES = 4 << 30  # of decoded weights kept between uses


class ReferenceWeights(Mapping[str, torch.Tensor]):
    """Weights by the importer's keys, float32, rounded to the formats of `program`; decoded when asked for."""

    def __init__(self, imported: Imported, program: Program) -> None:
        self.imported = imported
        self.formats = {
            (f"{layer}." if layer >= 0 else "") + w.name[2:]: w.tensor.dtype
            for graph, layer in program.sections()
            for w in graph.weights
        }
        self._kept: dict[str, torch.Tensor] = {}
        self._room = KEEP_BYTES

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._kept:
            value = self._decode(key)
            self._room -= value.nbytes
            if self._room < 0:
                return value
            self._kept[key] = value
        return self._kept[key]

    def _decode(self, key: str) -> torch.Tensor:
        source, name = self.imported.sources[key], self.formats.get(key, "f32")
        if len(source.shape) == 1:
            return torch.from_numpy(read_vector(source, self.imported))
        rows = read_rows(source, self.imported, name)
        return torch.from_numpy(decode(FORMATS[name], rows, source.shape[-1]).reshape(source.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.imported.sources)

    def __len__(self) -> int:
        return len(self.imported.sources)
