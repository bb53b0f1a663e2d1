"""Choose the format of every weight matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..ir.errors import expect
from ..ir.formats import BLOCK_K, FORMATS
from ..ir.graph import Graph
from ..ir.types import TensorType, Value

SCHEMES = {  # what --quant names
    "int4": "q4_0", "int8": "q8_0", "bf16": "bf16", "nvfp4": "nvfp4", "mxfp4": "mxfp4", "fp8": "fp8",
    "gptq-int4": "q4_0", "gptq-nvfp4": "nvfp4", "gptq-mxfp4": "mxfp4",
}  # fmt: skip
CALIBRATED = "gptq-"  # how schemes begin whose values a text chooses (compiler/quality/calibrate.py)
FLOATS = ("f32", "f16", "bf16")


def quantize(graph: Graph, scheme: str | Mapping[str, str] = "") -> Graph:
    """Give unquantised matrices the format `scheme` asks for (of SCHEMES; empty: as stored), or that of each weight.

    Matrices the checkpoint already holds quantised keep their format: rounding twice loses twice.

    before:
        graph f(x: f32[R, 64], w.up: bf16[32, 64], w.down: q8_0[64, 32]) -> (z) {
          y: f32[R, 32] = linear(x, w.up)
          z: f32[R, 64] = linear(y, w.down)
        }
    after(int4):
        graph f(x: f32[R, 64], w.up: q4_0[32, 64], w.down: q8_0[64, 32]) -> (z) {
          y: f32[R, 32] = linear(x, w.up)
          z: f32[R, 64] = linear(y, w.down)
        }
    """
    if not scheme:
        return graph
    wanted = scheme if isinstance(scheme, Mapping) else {p.name: scheme for p in graph.params}
    for name in set(wanted.values()) - {""}:
        expect(name in SCHEMES, f"--quant: expected one of {', '.join(SCHEMES)}, got `{name}`")
    replace = {p.name: _quantized(p, SCHEMES[wanted[p.name]]) for p in graph.params if p.is_weight and wanted[p.name]}
    params = tuple(replace.get(p.name, p) for p in graph.params)
    ops = tuple(op.with_operands(replace) for op in graph.ops)
    return dataclasses.replace(graph, params=params, ops=ops)


def _quantized(weight: Value, name: str) -> Value:
    kind = weight.tensor
    if len(kind.shape) < 2 or kind.dtype not in FLOATS:
        return weight
    fmt = FORMATS[name]
    if not fmt.dense and kind.width % max(fmt.disk_block, BLOCK_K * fmt.packed_blocks):
        return weight  # a row must be whole blocks; the report lists what stayed as it was
    return Value(weight.name, TensorType(name, kind.shape))
