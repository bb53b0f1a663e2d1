"""PTX instructions that the emulator computes wrongly, spelled out as others that mean the same.

The PTX ISA defines both below by what stands here; test_triton_step.py evaluates each alone, with and without.
"""

from __future__ import annotations

import re

# sm_100 and up: a is widened to float32 and c is one. The emulator reads the last suffix as the type of all three.
MIXED_ADD = re.compile(r"^(\s*)add\.rn\.f32\.bf16\s+(%r\d+), (%rs\d+), (%r\d+);", re.MULTILINE)
# sm_100a: without `.NaN` a lane that holds NaN is passed over, and Triton masks lanes with it. The emulator's
# maximum of a warp is NaN as soon as one lane's is; its max.f32 of two is right. Every lane takes part: no branch
# of the kernel diverges inside a warp outside the waits.
WARP_REDUCTION = re.compile(r"^(\s*)redux\.sync\.(min|max)\.f32\s+(%r\d+), (%r\d+), (%r\d+);", re.MULTILINE)


def spelled_out(ptx: str) -> str:
    """The same program without the instructions above."""
    ptx = MIXED_ADD.sub(r"\1{ .reg .b32 wide; cvt.f32.bf16 wide, \3; add.rn.f32 \2, wide, \4; }", ptx)
    return WARP_REDUCTION.sub(_butterfly, ptx)


def _butterfly(found: re.Match[str]) -> str:
    indent, op, out, value, lanes = found.groups()
    steps = (f"shfl.sync.bfly.b32 other, best, {d}, 31, {lanes}; {op}.f32 best, best, other;" for d in (16, 8, 4, 2, 1))
    return f"{indent}{{ .reg .b32 best, other; mov.b32 best, {value}; {' '.join(steps)} mov.b32 {out}, best; }}"
