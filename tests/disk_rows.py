"""Disk rows of any format, with scales of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onelaunch.ir.format import DTYPES, Format

Give = Callable[[str, str, tuple[int, ...]], np.ndarray]


def set_scales(fmt: Format, raw: np.ndarray, k: int, give: Give) -> None:
    """Replace the float scales of disk rows [N, row_bytes] by `give(field, dtype, shape)`."""
    split = fmt.body_bytes(k)
    if fmt.levels:
        body = np.ascontiguousarray(raw[:, :split])
        records = body.view(fmt.record)
        for level in fmt.levels:
            if level.field in ("d", "m"):
                records[level.field] = give(level.field, level.dtype, records[level.field].shape)
        raw[:, :split] = body
    if fmt.trailer:
        shape = len(raw), fmt.trailer_count(k)
        values = np.broadcast_to(give(fmt.trailer.field, fmt.trailer.dtype, shape), shape)
        raw[:, split:] = np.ascontiguousarray(values.astype(DTYPES[fmt.trailer.dtype])).view(np.uint8)
