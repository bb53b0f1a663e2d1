"""The weight stream: the bytes of the weights that each worker reads, in order, cut into chunks.

What a worker reads never depends on an activation, so an executor may have several chunks on their way at any time:
across tiles, across records, and while a join holds the worker. A chunk is up to so many blocks of 32 k of one tile,
contiguous in memory; only the last of a tile may be shorter. Matrices of experts are left out: which of them a step
reads does depend on activations, and an executor reads them itself.

    chunks = streams(schedule, weights, chunk_blocks)   # int64 [workers, chunks]: offset and size in PIECEs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import expect
from .formats import BLOCK_K, FORMATS, TILE_ROWS, packed_body_bytes, packed_bytes
from .graph import Graph
from .op import Op
from .phases import Phase
from .record import STREAM_PADDING
from .schedule import Schedule, Task, packed_name, padded, part_name, parts, phase_of, unit_bytes, unit_rows
from .types import OUTPUTS

if TYPE_CHECKING:
    from .table import WeightPlan

Stream = NDArray[np.int64]
ChunkBlocks = Callable[[str], int]  # of a weight format's name: most blocks of 32 k in a chunk
PIECE = 16  # bytes; what one thread asks for at a time
SIZE_BITS = 16  # of an entry: its low bits hold the pieces, the others the offset


def matrix_part(graph: Graph, task: Task) -> tuple[Phase, tuple[Op, ...]] | None:
    """The matrix a task multiplies with, None if it is of another kind."""
    phase = phase_of(graph, task.phase)
    if phase.anchor_kind != "linear" or task.body.startswith("pack."):
        return None
    return phase, next(p for p in parts(phase) if part_name(p) == task.body)


def chunk_count(graph: Graph, task: Task, chunk_blocks: ChunkBlocks) -> int:
    """Chunks of one task."""
    found = matrix_part(graph, task)
    if found is None:
        return 0
    phase, part = found
    weight = part[0].operands[1].tensor
    per_tile = -(-padded(weight.width) // (BLOCK_K * chunk_blocks(weight.dtype)))
    return (task.last - task.first) * unit_rows(phase, part) // TILE_ROWS * per_tile


def streams(schedule: Schedule, weights: WeightPlan, chunk_blocks: ChunkBlocks) -> Stream:
    """Every worker's chunks, int64 [workers, longest + STREAM_PADDING]: offset << SIZE_BITS | size, both in PIECEs."""
    queues = [_worker(schedule, weights, chunk_blocks, w) for w in range(schedule.workers)]
    longest = max(map(len, queues)) + STREAM_PADDING
    return np.stack([np.pad(queue, (0, longest - len(queue))) for queue in queues])


def _worker(schedule: Schedule, weights: WeightPlan, chunk_blocks: ChunkBlocks, worker: int) -> NDArray[np.int64]:
    found, ended = [np.zeros(0, np.int64)], False
    for graph, layer in schedule.program.sections():
        for task in schedule.section(graph.name).queues[worker]:
            matrix = matrix_part(graph, task)
            if matrix is None:
                continue
            phase, part = matrix
            # A step without output rows leaves these chunks where they are: none that is needed may lie behind. With
            # a draft model it passes them by (linear.py.j2): there are rows behind.
            outputs = part[0].out.tensor.shape[0] == OUTPUTS and not schedule.program.passes
            expect(outputs or not ended, f"phase `{phase.name}` reads weights after one for output rows alone")
            ended |= outputs
            start = weights.offset(packed_name(part), layer) + task.first * unit_bytes(phase, part)
            tiles = (task.last - task.first) * unit_rows(phase, part) // TILE_ROWS
            found.append(_tile_chunks(part, start, tiles, chunk_blocks))
    return np.concatenate(found)


def _tile_chunks(part: tuple[Op, ...], start: int, tiles: int, chunk_blocks: ChunkBlocks) -> NDArray[np.int64]:
    """The chunks of consecutive tiles from byte `start` on."""
    weight = part[0].operands[1].tensor
    fmt, most = FORMATS[weight.dtype], chunk_blocks(weight.dtype) * BLOCK_K
    # A trailer is a few bytes of a tile: its reader loads them where they are.
    tile, body, chunk = (
        packed_bytes(fmt, TILE_ROWS, weight.width),
        *(packed_body_bytes(fmt, k) for k in (weight.width, most)),
    )
    inside = np.arange(0, body, chunk)
    offsets = start + np.arange(tiles)[:, None] * tile + inside
    sizes = np.broadcast_to(np.minimum(body - inside, chunk), offsets.shape)
    for what, values in (("offset", offsets), ("size", sizes)):
        expect(not (values % PIECE).any(), f"weight `{packed_name(part)}`: {what} of a chunk is no multiple of {PIECE}")
    expect(chunk // PIECE < 1 << SIZE_BITS, f"format {fmt.name}: a chunk of {chunk} bytes is too large")
    return (offsets // PIECE << SIZE_BITS | sizes // PIECE).reshape(-1)
