"""Floats of four and eight bits: NVFP4 (compressed-tensors, ModelOpt), MXFP4, FP8 in every granularity, MXFP8.

Every part of a fused projection keeps its own scale of the whole matrix: our rows each have one. That scale is a
divisor in compressed-tensors and a multiplier in ModelOpt; of the divisor we keep the reciprocal, so a weight may
differ from compressed-tensors' own arithmetic, which divides first, in its last bit.
"""

from __future__ import annotations

import numpy as np

from ..ir.formats import FORMATS
from .quant_module import Array, Made, Module, halves, nibbles, rows_of

E8M0 = ("U8", "F8_E8M0")
MX_SINCE = (0, 14)  # of compressed-tensors: before 0.14, MXFP4 scales were stored two lower than the standard has them


def fp4(m: Module) -> Made | str | None:
    """A matrix of two codes per byte, the first in the low nibble."""
    leaf = "weight_packed" if "weight_packed" in m else "weight"
    if m.dtype(leaf) not in ("U8", "F4") or len(m.shape(leaf)) != 2 or "weight_scale" not in m:
        return None
    n, k = m.shape(leaf)[0], m.shape(leaf)[1] * (2 if m.dtype(leaf) == "U8" else 1)
    if m.dtype("weight_scale") == "F8_E4M3" and m.shape("weight_scale") == (n, k // 16):
        return _nvfp4(m, leaf, n, k)
    if m.dtype("weight_scale") in E8M0 and m.shape("weight_scale") == (n, k // 32):
        return _mxfp4(m, leaf, n, k)
    got = f"{m.dtype('weight_scale')} {list(m.shape('weight_scale'))}"
    return f"`{m.base}.weight_scale`: expected F8_E4M3 [{n}, {k // 16}] or E8M0 [{n}, {k // 32}], got {got}"


def _nvfp4(m: Module, leaf: str, n: int, k: int) -> Made | str:
    whole = [w for w in ("weight_global_scale", "weight_scale_2") if w in m]
    if len(whole) != 1 or m.whole(whole[0]) != 1 or m.dtype(whole[0]) != "F32":
        return f"`{m.base}`: expected one F32 scale of the whole matrix, got {[list(m.shape(w)) for w in whole]}"

    def load() -> Array:
        records = np.empty((n, k // 64), FORMATS["nvfp4"].record)
        records["qs"] = halves(nibbles(m.read(leaf)), 16).reshape(n, -1, 32)
        records["d"] = m.read("weight_scale").reshape(n, -1, 4)
        scale = m.floats(whole[0]).reshape(())
        row = np.float32(1) / scale if whole[0] == "weight_global_scale" else scale
        return rows_of(records, np.full((n, 1), row, "<f4"))

    return Made("nvfp4", (n, k), load, (leaf, "weight_scale", whole[0]))


def _mxfp4(m: Module, leaf: str, n: int, k: int) -> Made | str:
    if m.settings.method == "compressed-tensors":
        version = str(m.settings.fields.get("version", ""))
        parts = tuple(int(p) for p in version.split(".")[:2] if p.isdigit())
        if parts < MX_SINCE:
            return (
                f"`{m.base}`: MXFP4 of compressed-tensors {version or 'without a version'} may have its scales stored "
                "two lower than the standard; save it again with 0.14 or newer"
            )

    def load() -> Array:
        records = np.empty((n, k // 32), FORMATS["mxfp4"].record)
        records["qs"] = halves(nibbles(m.read(leaf)), 32)
        records["d"] = m.read("weight_scale").view(np.uint8).reshape(n, -1)
        return rows_of(records)

    return Made("mxfp4", (n, k), load, (leaf, "weight_scale"))


def fp8(m: Module) -> Made | str | None:
    """A matrix of E4M3 with scales that multiply, `weight_scale_inv` too: the name lies."""
    if m.dtype("weight") != "F8_E4M3" or len(m.shape("weight")) != 2:
        return None
    n, k = m.shape("weight")
    found = [leaf for leaf in ("weight_scale", "weight_scale_inv", "scale") if leaf in m]
    if len(found) != 1:
        return f"`{m.base}`: expected one scale of a matrix in F8_E4M3, got {found or 'none'}"
    leaf = found[0]
    if m.whole(leaf) == 1 and m.settings.block is None:
        return _rows(m, leaf, "fp8", lambda scale: np.broadcast_to(scale.reshape(1, 1), (n, 1)))
    if m.shape(leaf) in ((n,), (n, 1)) and m.settings.block is None:
        return _rows(m, leaf, "fp8", lambda scale: scale.reshape(n, 1))
    if m.dtype(leaf) in E8M0 and m.shape(leaf) == (n, -(-k // 32)):
        return _rows(m, leaf, "mxfp8", None)
    return _blocks(m, leaf, n, k)


def _blocks(m: Module, leaf: str, n: int, k: int) -> Made | str:
    """A scale per block of rows and columns; the last blocks may be parts of one."""
    block = m.settings.block
    if block is None:
        return f"`{m.base}.{leaf}`: expected `weight_block_size` for {list(m.shape(leaf))} scales of [{n}, {k}]"
    rows, columns = block
    expected = (-(-n // rows), -(-k // columns)) if rows and columns else ()
    if m.shape(leaf) != expected or columns % 32:
        return f"`{m.base}.{leaf}`: expected {list(expected)} scales of blocks {list(block)}, got {list(m.shape(leaf))}"
    every = 128 if columns % 128 == 0 else 32
    count = -(-k // every)

    def spread(scale: Array) -> Array:
        whole = np.repeat(scale, columns // every, axis=1)[:, :count]
        return np.repeat(whole, rows, axis=0)[:n]

    return _rows(m, leaf, f"fp8_{every}", spread)


def _rows(m: Module, leaf: str, name: str, spread) -> Made:  # type: ignore[no-untyped-def]
    """Elements as they are, scales as `spread` has them (None: bytes of E8M0)."""

    def load() -> Array:
        if spread is None:
            return rows_of(m.read("weight"), m.read(leaf).view(np.uint8))
        scale = m.read(leaf).view(np.uint8) if m.dtype(leaf) == "F8_E8M0" else m.floats(leaf)
        if m.dtype(leaf) == "F8_E8M0":
            scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
        return rows_of(m.read("weight"), spread(scale).astype("<f4"))

    n, k = m.shape("weight")
    return Made(name, (n, k), load, ("weight", leaf))
