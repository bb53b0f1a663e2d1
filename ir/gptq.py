"""GPTQ: round a matrix so that its product errs least on the inputs of a calibration text, not its weights.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323),
its algorithm 1. With X the inputs [rows, K], the error of a row of weights is ||X (w - q)||^2, whose Hessian X^T X is
the same for all of them. Columns are rounded one after the other; what one loses is made up for by those that are still
to be rounded, by the rows of the upper Cholesky factor of the Hessian's inverse.

Any format that is a grid (quantizers.GRIDS) will do: a block's scale is chosen when its first column is due, of the
weights as they are by then.
"""

from __future__ import annotations

import numpy as np

from .errors import expect
from .format import Array, Format
from .quantizers import GRIDS, inverse

DAMPING = 0.01  # of the mean diagonal of the Hessian, added to it; the paper's


def gptq(fmt: Format, x: Array, hessian: Array) -> Array:
    """f32 [N, K] to disk rows u8 [N, row_bytes] of a format of GRIDS; hessian: X^T X of the inputs, [K, K].

    CompileError for a format that is no grid, or a Hessian that is not finite.
    """
    expect(fmt.name in GRIDS, f"gptq: expected one of {', '.join(GRIDS)}, got `{fmt.name}`")
    expect(np.isfinite(hessian).all(), "gptq: expected finite inputs of the matrix, got some that are not")
    grid, factor = GRIDS[fmt.name], inverse_factor(hessian)
    n, k = x.shape
    whole = grid.rows(x) if grid.rows else None
    left = np.array(x if whole is None else x / whole, np.float32, order="F")  # columns side by side
    codes = np.empty((n, k), np.uint8)
    scales = []
    for start in range(0, k, grid.block):
        block = slice(start, start + grid.block)
        stored = grid.search(left[:, block], np.diag(hessian)[block].astype(np.float32))[0]
        scales.append(stored)
        lost = _round_block(left[:, block], grid.widen(stored), factor[block, block], fmt.name, codes[:, block])
        left[:, block.stop :] -= lost @ factor[block, block.stop :]
    return grid.disk_rows(codes, np.stack(scales, axis=1), whole, fmt.record)


def _round_block(left: Array, scales: Array, factor: Array, name: str, codes: Array) -> Array:
    """Round columns [N, n] in order, each moving those behind it; fills `codes`, gives what each column lost [N, n]."""
    grid, per, lost = GRIDS[name], inverse(scales), np.empty_like(left)
    for i in range(left.shape[1]):
        codes[:, i] = grid.codes(left[:, i] * per)
        lost[:, i] = (left[:, i] - grid.values[codes[:, i]] * scales) / factor[i, i]
        left[:, i + 1 :] -= lost[:, i, None] * factor[i, i + 1 :]
    return lost


def inverse_factor(hessian: Array) -> Array:
    """The upper Cholesky factor U of the damped Hessian's inverse, U^T U = H^-1: f32 [K, K].

    An input that was always zero says nothing about its weights: they are rounded to nearest.
    """
    h = hessian.astype(np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0 if dead.all() else np.diag(h)[~dead].mean()
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    upper: Array = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)
    return np.ascontiguousarray(upper)
