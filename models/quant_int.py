"""Whole numbers of four and eight bits: compressed-tensors, GPTQ, AWQ, W8A8; exact, groups of more than 32 repeated.

GPTQ stores a zero point less one (v1) or as it is (v2), and files say v1 and are v2. Where all are 7 or all are 8 of
a symmetric matrix, both mean 8; else we believe `checkpoint_format`. A v1 zero of 15 means 16 here: nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ir.formats import FORMATS
from .quant_module import Array, Made, Module, halves, nibbles, rows_of

SCALES = {"F16": ("q4_0", "int4_z"), "BF16": ("int4", "int4_bz")}  # formats without and with zero points
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds each of its eight columns


def packed_int(m: Module) -> Made | str | None:
    """compressed-tensors `pack-quantized`: rows of words, stored codes are the signed ones plus half the range."""
    if m.dtype("weight_packed") != "I32" or "weight_scale" not in m or "weight_shape" not in m:
        return None
    n, k = (int(v) for v in m.read("weight_shape").reshape(-1)[:2])
    bits = {w.get("num_bits") for w in m.settings.weights()} or {None}
    widths = [b for b in (4, 8) if m.shape("weight_packed") == (n, -(-k * b // 32)) and b in bits]
    if len(widths) != 1 or len(m.shape("weight_packed")) != 2:
        got = f"{', '.join(map(str, bits))} bits in {list(m.shape('weight_packed'))}"
        return f"`{m.base}`: expected codes of 4 or 8 bits, got {got}"
    if widths == [8]:
        return _packed_8(m, n, k)
    used: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
    zeros = None
    if "weight_zero_point" in m:
        zeros = lambda: nibbles(np.ascontiguousarray(m.read("weight_zero_point").T))[:, :n].T  # noqa: E731
        used += ("weight_zero_point",)
    order, fits = _order(m, "weight_g_idx", k, m.shape("weight_scale")[-1])
    if not fits:
        return f"`{m.base}.weight_g_idx`: expected groups of one size"
    used += ("weight_g_idx",) if "weight_g_idx" in m else ()
    codes = lambda: nibbles(m.read("weight_packed"))[:, :k]  # noqa: E731
    return _groups(m, (n, k), "weight_scale", lambda: m.read("weight_scale"), codes, zeros, order, used)


def _packed_8(m: Module, n: int, k: int) -> Made | str:
    if "weight_zero_point" in m or "weight_g_idx" in m:
        return f"`{m.base}`: zero points or an order of columns with codes of 8 bits are not supported"
    if m.shape("weight_scale") != (n, 1):
        return f"`{m.base}.weight_scale`: expected a scale per row of codes of 8 bits, got {m.shape('weight_scale')}"

    def load() -> Array:
        codes = np.ascontiguousarray(m.read("weight_packed")).view(np.uint8)[:, :k] ^ np.uint8(0x80)
        return rows_of(codes, m.floats("weight_scale"))

    return Made("int8", (n, k), load, ("weight_packed", "weight_scale", "weight_shape"))


def gptq(m: Module) -> Made | str | None:
    """`qweight` [K / 8, N] packed along K, `qzeros` [G, N / 8] along N, `scales` [G, N]."""
    if m.dtype("qweight") != "I32" or "g_idx" not in m:
        return None
    fields = m.settings.fields
    form = fields.get("checkpoint_format", "gptq")
    if fields.get("bits") != 4 or form not in ("gptq", "gptq_v2"):
        return f"`{m.base}`: expected GPTQ of 4 bits in the format gptq or gptq_v2, got {fields.get('bits')} in {form}"
    (words, n), k = m.shape("qweight"), m.shape("qweight")[0] * 8
    if m.shape("qzeros") != (m.shape("scales")[0], n // 8) or m.shape("scales")[1:] != (n,) or m.shape("g_idx") != (k,):
        return f"`{m.base}`: expected qzeros, scales and g_idx that fit qweight [{words}, {n}]"
    order, fits = _order(m, "g_idx", k, m.shape("scales")[0])
    if not fits:
        return f"`{m.base}.g_idx`: expected groups of one size"
    stored = nibbles(m.read("qzeros"))
    zeros: Callable[[], Array] | None = lambda: (nibbles(m.read("qzeros")) + (form == "gptq")).T  # noqa: E731
    if fields.get("sym", True) and np.ptp(stored) == 0 and stored.flat[0] in (7, 8):
        zeros = None
    codes = lambda: np.ascontiguousarray(nibbles(np.ascontiguousarray(m.read("qweight").T)))  # noqa: E731
    used = ("qweight", "qzeros", "scales", "g_idx")
    return _groups(m, (n, k), "scales", lambda: m.read("scales").T, codes, zeros, order, used)


def awq(m: Module) -> Made | str | None:
    """`qweight` [K, N / 8], `qzeros` [K / g, N / 8], both packed along N in an order of their own."""
    if m.dtype("qweight") != "I32" or "g_idx" in m:
        return None
    fields = m.settings.fields
    version = str(fields.get("version", "gemm")).lower()
    if fields.get("bits", fields.get("w_bit")) != 4 or version != "gemm":
        return f"`{m.base}`: expected AWQ of 4 bits in the version gemm, got {fields.get('bits')} in {version}"
    k, n = m.shape("qweight")[0], m.shape("qweight")[1] * 8
    groups = m.shape("scales")[0] if m.shape("scales") else 0
    if m.shape("scales") != (groups, n) or m.shape("qzeros") != (groups, n // 8):
        return f"`{m.base}`: expected scales and qzeros that fit qweight [{k}, {n // 8}]"

    def columns(leaf: str) -> Array:
        words = nibbles(m.read(leaf))
        return words.reshape(len(words), -1, 8)[:, :, AWQ_ORDER].reshape(len(words), -1).T

    codes, zeros = (lambda: columns("qweight")), (lambda: columns("qzeros"))
    used = ("qweight", "qzeros", "scales")
    return _groups(m, (n, k), "scales", lambda: m.read("scales").T, codes, zeros, None, used)


def int8(m: Module) -> Made | str | None:
    """Codes of 8 bits with a scale per row: compressed-tensors W8A8, ModelOpt's SmoothQuant, bitsandbytes' int8."""
    if m.dtype("weight") != "I8" or len(m.shape("weight")) != 2:
        return None
    n, k = m.shape("weight")
    leaf = "SCB" if "SCB" in m else "weight_scale"
    if m.shape(leaf) not in ((n,), (n, 1)):
        return f"`{m.base}`: expected codes of 8 bits with a scale per row, got {list(m.shape(leaf)) or 'none'}"
    if "weight_zero_point" in m and np.any(m.read("weight_zero_point")):
        return f"`{m.base}`: zero points with codes of 8 bits are not supported"
    if "weight_format" in m and np.any(m.read("weight_format")):
        return f"`{m.base}`: expected bitsandbytes' weight format 0 (row by row)"

    def load() -> Array:
        scale = m.floats(leaf).reshape(n, 1)
        return rows_of(m.read("weight"), scale / np.float32(127) if leaf == "SCB" else scale)

    extra = tuple(leaf for leaf in ("weight_zero_point", "weight_format") if leaf in m)
    return Made("int8", (n, k), load, ("weight", leaf, *extra))


def _order(m: Module, leaf: str, k: int, groups: int) -> tuple[Array | None, bool]:
    """The columns group by group if they do not lie so already, and whether groups are of one size."""
    if leaf not in m:
        return None, True
    index = m.read(leaf).reshape(-1)
    if len(index) != k or k % groups or np.any(np.bincount(index.clip(0), minlength=groups) != k // groups):
        return None, bool(np.all(index == -1))  # compressed-tensors before it is calibrated
    order = np.argsort(index, kind="stable")
    return (None if np.array_equal(order, np.arange(k)) else order), True


def _groups(
    m: Module,
    shape: tuple[int, int],
    leaf: str,
    scales: Callable[[], Array],
    codes: Callable[[], Array],
    zeros: Callable[[], Array] | None,
    order: Array | None,
    used: tuple[str, ...],
) -> Made | str:
    """Codes [N, K], scales [N, G] and zero points [N, G] as blocks of 32."""
    (n, k), groups = shape, m.whole(leaf) // shape[0]
    if m.dtype(leaf) not in SCALES:
        return f"`{m.base}.{leaf}`: expected scales in F16 or BF16, got {m.dtype(leaf)}"
    if not groups or k % groups or k // groups % 32 or m.whole(leaf) % n:
        return f"`{m.base}.{leaf}`: expected groups of a multiple of 32 columns of {k}, got {m.shape(leaf)} scales"
    name = SCALES[m.dtype(leaf)][zeros is not None]

    def load() -> Array:
        each, found = k // groups // 32, codes()
        records = np.empty((n, k // 32), FORMATS[name].record)
        records["qs"] = halves(np.ascontiguousarray(found if order is None else found[:, order]), 32)
        records["d"] = np.repeat(scales(), each, axis=1)
        if zeros is not None:
            records["z"] = np.repeat(zeros(), each, axis=1)
        return rows_of(records)

    return Made(name, shape, load, used, order)
