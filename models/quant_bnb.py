"""bitsandbytes' four bits: one flat row of codes, the first of a byte in its high nibble, scales per block of 64."""

from __future__ import annotations

import json

import numpy as np

from ..ir.records import NF4
from .quant_module import Array, Made, Module, rows_of

STATE = "weight.quant_state.bitsandbytes__"
BLOCK = 64


def nf4(m: Module) -> Made | str | None:
    """Of type nf4, whose stored table must be the one we know; nested scales are what they decode to."""
    if "weight.absmax" not in m:
        return None
    state = next((leaf for leaf in m.tensors if leaf.startswith(STATE)), "")
    if state != STATE + "nf4":
        return f"`{m.base}`: expected bitsandbytes' 4 bits of type nf4, got `{state.removeprefix(STATE) or 'none'}`"
    found = json.loads(m.read(state).tobytes())
    shape, block = found.get("shape"), found.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not isinstance(block, int) or block % BLOCK:
        return f"`{m.base}`: expected a matrix in blocks of a multiple of {BLOCK}, got {shape} in {block}"
    n, k = shape
    if k % block or m.whole("weight.absmax") != n * k // block:
        return f"`{m.base}`: expected rows of whole blocks of {block}, got {shape}"
    if not np.array_equal(m.floats("weight.quant_map").reshape(-1), np.array(NF4, np.float32)):
        return f"`{m.base}.weight.quant_map`: expected the table of nf4, got another one"

    def load() -> Array:
        codes = np.ascontiguousarray(m.read("weight")).view(np.uint8).reshape(n, k // 2)
        return rows_of(codes, np.repeat(_scales(m, found).reshape(n, -1), block // BLOCK, axis=1))

    used = tuple(leaf for leaf in m.tensors if leaf == "weight" or leaf.startswith("weight."))
    return Made("nf4", (n, k), load, used)


def _scales(m: Module, state: dict[str, object]) -> Array:
    scales = m.read("weight.absmax").reshape(-1)
    if "weight.nested_absmax" not in m:
        return scales.astype("<f4")
    outer = np.repeat(m.floats("weight.nested_absmax").reshape(-1), int(state["nested_blocksize"]))[: len(scales)]  # type: ignore[call-overload]
    return m.floats("weight.nested_quant_map").reshape(-1)[scales] * outer + np.float32(state["nested_offset"])  # type: ignore[arg-type]
