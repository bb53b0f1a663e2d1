"""Where packed weights go, and packing them: checkpoint tensors to one file of tiles in the order of use.

The weight data is one byte range; offsets into it are what the task table holds. The file is a plain
safetensors file with one uint8 tensor per packed matrix, so that other tools can list it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..codegen.cpu.pack import pack
from ..ir.errors import LoadError, expect
from ..ir.formats import FORMATS, Format, decode, finite, packed_bytes, quantize
from ..ir.graph import Graph, Program
from ..ir.limits import ALIGN
from ..ir.ops import Embed
from ..ir.schedule import packed_name, padded, part_bytes, part_weight, parts, unit_rows
from ..ir.table import WeightPlan
from ..ir.types import TensorType
from ..models.importer import Imported, WeightSource

VECTOR_PAD = 64  # bytes after a vector, so that 16-lane loads of its end stay inside


@dataclass(frozen=True)
class PackedWeight:
    """One entry of the weight file: the matrices it is made of, its layout, and its size in bytes.

    `unit` output rows are padded to `unit_rows` packed ones; two matrices are interleaved by `unit` rows. Those of
    experts follow one another, expert by expert.
    """

    key: str
    weights: tuple[str, ...]  # keys of the importer's sources
    type: TensorType
    unit: int
    unit_rows: int
    size: int

    @property
    def experts(self) -> int:
        """Matrices that follow one another."""
        return int(self.type.shape[0]) if len(self.type.shape) == 3 else 1

    @property
    def is_vector(self) -> bool:
        return len(self.type.shape) == 1


def packed_weights(program: Program) -> list[PackedWeight]:
    """Every packed weight in the order a step reads them."""
    found: dict[str, PackedWeight] = {}
    embedded = {op.table.name for model in program.models for op in model.entry.ops if isinstance(op, Embed)}
    for graph, layer in program.sections():
        for weight in _graph_weights(graph, f"{layer}." if layer >= 0 else ""):
            if weight.key in found:
                same = (found[weight.key].unit, found[weight.key].unit_rows) == (weight.unit, weight.unit_rows)
                expect(same, f"weight `{weight.key}` is needed in two layouts", hint="untie the weight")
                found.pop(weight.key)
            found[weight.key] = weight
    # An embedding of its own is read a row at a time: keep it out of the stream.
    alone = [w for w in found.values() if f"w.{w.key}" in embedded]
    return [w for w in found.values() if w not in alone] + alone


def _graph_weights(graph: Graph, prefix: str) -> Iterator[PackedWeight]:
    for phase in graph.phases:
        matrices = set()
        for part in parts(phase) if phase.reads_matrix else ():
            names = tuple(part_weight((op,)).name for op in part)
            matrices |= set(names)
            yield PackedWeight(
                prefix + packed_name(part),
                tuple(prefix + n[2:] for n in names),
                part_weight(part).tensor,
                phase.unit,
                unit_rows(phase, part),
                part_bytes(phase, part),
            )
        for value in phase.weights:
            if value.name in matrices:
                continue
            key, kind = prefix + value.name[2:], value.tensor
            if len(kind.shape) == 1:
                size = padded(padded(4 * kind.width, VECTOR_PAD) + VECTOR_PAD, ALIGN)
                yield PackedWeight(key, (key,), kind, kind.width, kind.width, size)
            else:
                yield _table(key, kind)


def _table(key: str, kind: TensorType) -> PackedWeight:
    """An embedding table: plain tiles, as a tied head reads them."""
    rows = kind.shape[0]
    assert isinstance(rows, int)
    size = padded(packed_bytes(FORMATS[kind.dtype], padded(rows), kind.width), ALIGN)
    return PackedWeight(key, (key,), kind, 32, 32, size)


def weight_plan(weights: list[PackedWeight]) -> WeightPlan:
    """Offsets in file order."""
    offsets, top = {}, 0
    for weight in weights:
        offsets[weight.key] = top
        top += weight.size
    return WeightPlan(offsets, {w.key: w.size for w in weights})


def read_vector(source: WeightSource, imported: Imported) -> np.ndarray:
    """A one-dimensional weight as float32, changes applied."""
    if source.constant is not None:
        return source.constant.astype(np.float32)
    x = imported.checkpoint.read(source.tensors[0]).astype(np.float32).reshape(-1)
    for name, amount in source.changes:
        expect(name == "plus", f"weight change `{name}` does not apply to a vector")
        x = x + np.float32(amount)
    return x


def read_rows(source: WeightSource, imported: Imported, to: str) -> np.ndarray:
    """A matrix, or those of all experts, as the disk rows of format `to`: u8 [N, row_bytes]. Rounds only if the
    formats differ, to what was chosen by a calibration text if that was done."""
    if source.rounded is not None and source.rounded.format == to != source.format:
        return source.rounded.rows
    n, k = prod(source.shape[:-1]), source.shape[-1]
    each = [_tensor_rows(source, imported, name) for name in source.tensors]
    raw = np.concatenate(each) if len(each) > 1 else each[0]
    for name, amount in source.changes:
        expect(name == "unpermute", f"weight change `{name}` does not apply to a matrix")
        raw = _unpermute(raw, int(amount))
    if to != source.format:
        raw = quantize(FORMATS[to], decode(FORMATS[source.format], raw, k)).reshape(n, -1).view(np.uint8)
    return raw


def _tensor_rows(source: WeightSource, imported: Imported, name: str) -> np.ndarray:
    """The disk rows of one tensor, u8 [rows, row_bytes]."""
    k, fmt = source.shape[-1], FORMATS[source.format]
    raw = np.ascontiguousarray(imported.checkpoint.read(name)).view(np.uint8).reshape(-1, fmt.row_bytes(k))
    _refuse_nan(raw, fmt, name, k)
    return raw


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order for adjacent-pair rotary embedding: [h][d/2][2] back to [h][2][d/2]."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)


def _refuse_nan(raw: np.ndarray, fmt: Format, tensor: str, k: int) -> None:
    if not finite(fmt, raw, k):
        raise LoadError(
            f"tensor `{tensor}` holds values that are not finite",
            hint="the checkpoint is damaged or was not converted for inference",
        )


def pack_one(weight: PackedWeight, imported: Imported) -> np.ndarray:
    """The packed bytes of one entry, u8 [size]."""
    out = np.zeros(weight.size, np.uint8)
    sources = [imported.sources[w] for w in weight.weights]
    if weight.is_vector:
        x = read_vector(sources[0], imported).view(np.uint8)
        out[: len(x)] = x
        return out
    fmt, k = FORMATS[weight.type.dtype], weight.type.width
    rows = _arrange([read_rows(s, imported, fmt.name) for s in sources], weight)
    packed = pack(fmt, rows, len(rows), k)
    out[: len(packed)] = packed
    return out


def _arrange(matrices: list[np.ndarray], weight: PackedWeight) -> np.ndarray:
    """Rows in packed order: each unit of every matrix side by side, padded to whole tiles, expert by expert."""
    rows, width = matrices[0].shape
    experts = weight.experts
    n = rows // experts
    units = -(-n // weight.unit)
    if len(matrices) == 1 and weight.unit == weight.unit_rows and (experts == 1 or n % weight.unit == 0):
        return matrices[0]
    out = np.zeros((experts, units, weight.unit_rows, width), np.uint8)
    for i, matrix in enumerate(matrices):
        padded_rows = np.zeros((experts, units * weight.unit, width), np.uint8)
        padded_rows[:, :n] = matrix.reshape(experts, n, width)
        place = slice(i * weight.unit, (i + 1) * weight.unit)
        out[:, :, place] = padded_rows.reshape(experts, units, weight.unit, width)
    return out.reshape(-1, width)


def write_weights(
    path: Path, weights: list[PackedWeight], imported: Imported, progress: Callable[[int, int], None]
) -> str:
    """Pack everything into `path`, two tensors at a time; returns the file's sha256."""
    plan = weight_plan(weights)
    header = {
        w.key: {"dtype": "U8", "shape": [w.size], "data_offsets": [plan.offsets[w.key], plan.offsets[w.key] + w.size]}
        for w in weights
    }
    text = json.dumps({"__metadata__": {"format": "onelaunch packed tiles"}, **header}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    digest = hashlib.sha256()
    total, done = sum(w.size for w in weights), 0
    with path.open("wb") as file, ThreadPoolExecutor(2) as pool:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for packed in _ahead(pool, lambda w: pack_one(w, imported), weights):
            file.write(packed.data)
            digest.update(packed.data)
            done += len(packed)
            progress(done, total)
    return digest.hexdigest()


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[PackedWeight], np.ndarray], weights: list[PackedWeight]
) -> Iterator[np.ndarray]:
    """Results in order, never more than three entries in memory."""
    waiting = []
    for weight in weights:
        waiting.append(pool.submit(work, weight))
        if len(waiting) == 3:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
