"""`--quant gptq-..`: rounded weights chosen by what a text makes their matrices read.

Layer by layer the reference executor computes, of the text, what each matrix reads behind the layers that are rounded
already; from the sums of its products `ir/gptq.py` chooses the rounded weights. They take the place of rounding to
nearest (`WeightSource.rounded`), and nothing else knows of it: formats, packing and kernels are the same.

Not all matrices can be done so, these are rounded to nearest: an embedding, whose rows are looked up (a head tied to it
too), and those of experts, of which a short text reaches only some.

Why this and no library: llm-compressor runs on transformers' modules only and writes compressed-tensors only, where
this calibrates whatever is imported, a GGUF file too, to any format with a grid. What it writes can be compiled as is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...ir.errors import UsageError
from ...ir.formats import FORMATS
from ...ir.gptq import gptq
from ...ir.graph import Graph, Program
from ...ir.ops import Embed, Linear
from ...models.checkpoint import Checkpoint
from ...models.importer import Imported, Rounded
from ...passes.quantize import CALIBRATED
from ..check.reference_weights import ReferenceWeights
from .layerwise import LayerRun
from .text_file import checkpoint_tokenizer, read_text

PIECE = 512  # tokens of a sequence of the calibration text
PIECES = 16  # at most

Progress = Callable[[str, float, str], None]


def read_pieces(checkpoint: Checkpoint, path: Path) -> list[list[int]]:
    """The token ids of a calibration text in sequences. UsageError for a text that does not do."""
    tokenizer = checkpoint_tokenizer(checkpoint)
    tokens = tokenizer.encode(read_text(path, "--calibrate"))
    return pieces(tokens, checkpoint.hyper["context"], str(path), tokenizer.bos if tokenizer.add_bos else -1)


def pieces(tokens: Sequence[int], context: int, place: str, bos: int = -1) -> list[list[int]]:
    """A calibration text's tokens in sequences, each from the begin token on; UsageError if they are fewer than one.

    bos: what takes the place of the first token of each, -1: the model wants none.
    """
    size = min(PIECE, context)
    if len(tokens) < size:
        raise UsageError(
            f"--calibrate: expected at least {size} tokens, got {len(tokens)}", place=place,
            hint="thousands of tokens like those the model will read calibrate well",
        )  # fmt: skip
    found = [list(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)][:PIECES]
    return [[bos, *piece[1:]] for piece in found] if bos >= 0 else found


def calibrated(
    imported: Imported, rounded: Program, scheme: Callable[[str], str], texts: Sequence[Sequence[int]],
    progress: Progress,
) -> Imported:  # fmt: skip
    """The same model with `rounded` sources where `scheme` of a weight's key is a calibrated one.

    rounded: its program with the formats that --quant gives; texts: token ids, each a sequence of its own.
    """
    start = time.perf_counter()
    sources = dict(imported.sources)
    result = dataclasses.replace(imported, sources=sources)
    program, exact = imported.program, ReferenceWeights(imported, imported.program)
    after = ReferenceWeights(result, rounded)  # reads `sources` as they fill
    runs = [LayerRun(program, text, range(len(text))) for text in texts]
    chosen = 0

    running = [run.enter(after) for run in runs]

    def choose(graph: Graph, layer: int) -> int:
        keys = _keys(program, graph, layer, scheme, exact, after)
        read = (run.values(layer, x, exact) for run, x in zip(runs, running, strict=True))
        for key, hessian in _hessians(graph, keys, read).items():
            fmt = FORMATS[after.formats[key]]
            rows = gptq(fmt, exact[key].numpy(), hessian)
            sources[key] = dataclasses.replace(sources[key], rounded=Rounded(fmt.name, rows))
        return len(keys)

    for layer, name in enumerate(program.layers):
        chosen += choose(program.kind(name), layer)
        running = [run.layer(layer, x, after) for run, x in zip(runs, running, strict=True)]
    chosen += choose(program.exit, -1)
    progress("calibrate", time.perf_counter() - start, f"{chosen} matrices, {sum(map(len, texts))} tokens")
    return result


def _keys(
    program: Program, graph: Graph, layer: int, scheme: Callable[[str], str], exact: ReferenceWeights,
    after: ReferenceWeights,
) -> dict[str, str]:  # fmt: skip
    """Keys of the matrices to calibrate, each with its value's name in the graph."""
    prefix = f"{layer}." if layer >= 0 else ""
    embedded = {op.table.name for op in program.entry.ops if isinstance(op, Embed)}
    names = {op.weight.name for op in graph.ops if isinstance(op, Linear)} - (embedded if layer < 0 else set())
    keys = {prefix + name[2:]: name for name in sorted(names)}
    return {
        key: name
        for key, name in keys.items()
        if scheme(key).startswith(CALIBRATED) and exact.formats[key] != after.formats[key]
    }


def _hessians(graph: Graph, keys: dict[str, str], runs: Iterator[dict[str, Any]]) -> dict[str, np.ndarray]:
    """X^T X [K, K] of what each matrix reads, summed over runs; matrices that read the same value share it."""
    read = {op.weight.name: op.x.name for op in graph.ops if isinstance(op, Linear)}
    sums: dict[str, Tensor] = {}
    if keys:
        for values in runs:
            for name in {read[w] for w in keys.values()}:
                x = values[name]
                sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
    return {key: sums[read[name]].numpy() for key, name in keys.items()}
