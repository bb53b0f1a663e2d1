"""Inline PTX for one block of 32 k: four rows of packed codes times one row of int8 activations.

A thread holds the planes of four neighbouring rows; the activations of the block, their scale and sums
(`PANEL_WORDS`) are loaded once for the four. Unpacking is one or two instructions for four codes, a product
one dp4a for four. The result is a whole number: exact, whatever the order.
"""

from __future__ import annotations

from .formats import Reader

ROWS = 4  # of one thread: a 16-byte load


def dot_asm(fmt: Reader) -> tuple[str, str]:
    """PTX and constraints: (planes..., address of the activations) to (sums of each part..., scale, scale x sum)."""
    parts = len(fmt.scale)
    outputs, planes = parts + 2, len(fmt.planes)
    address = f"${ROWS * (outputs + planes)}"
    place = {p.name: ROWS * (outputs + i) for i, p in enumerate(fmt.planes)}
    lines = [
        ".reg .b32 a, b, x<8>, s<2>, d, t;",
        f"ld.global.v4.b32 {{x0, x1, x2, x3}}, [{address}];",
        f"ld.global.v4.b32 {{x4, x5, x6, x7}}, [{address}+16];",
        f"ld.global.v4.b32 {{d, s0, s1, t}}, [{address}+32];",
        *_start(fmt, parts),
    ]
    for row in range(ROWS):
        for g in range(8):
            part = g * parts // 8
            total = f"${ROWS * part + row}"
            codes, unpack = _unpack(fmt, g, {name: f"${at + row}" for name, at in place.items()})
            begin = f"s{part}" if g % (8 // parts) == 0 else total
            lines += [*unpack, f"dp4a.u32.s32 {total}, {codes}, x{g}, {begin};"]
        lines += [f"mov.b32 ${ROWS * parts + row}, d;", f"mov.b32 ${ROWS * (parts + 1) + row}, t;"]
    kinds = ["=&r"] * (ROWS * parts) + ["=&f"] * (2 * ROWS) + ["r"] * (ROWS * planes) + ["l"] * ROWS
    return "\n".join(["{", *lines, "}"]), ",".join(kinds)


def _start(fmt: Reader, parts: int) -> list[str]:
    """s0 (and s1): what the zero point takes from a sum of products with unsigned codes."""
    if parts == 1:
        return ["add.s32 s0, s0, s1;", f"mul.lo.s32 s0, s0, {-fmt.zero};"]
    return [f"mul.lo.s32 s{p}, s{p}, {-fmt.zero};" for p in range(parts)]


def _unpack(fmt: Reader, g: int, registers: dict[str, str]) -> tuple[str, list[str]]:
    """The register with the codes of group g, and the instructions that put them there."""
    if "w4" in registers:
        return registers[f"w{g}"], []
    word = registers[f"w{g % 4}"]
    lines = [f"and.b32 a, {word}, 0x0F0F0F0F;"] if g < 4 else [f"shr.u32 a, {word}, 4;", "and.b32 a, a, 0x0F0F0F0F;"]
    if fmt.upper:
        plane, shift, mask = fmt.upper[g]
        moved = (
            f"shl.b32 b, {registers[plane]}, {shift};" if shift >= 0 else f"shr.u32 b, {registers[plane]}, {-shift};"
        )
        lines += [moved, f"lop3.b32 a, b, {mask}, a, 0xEA;"]  # (b & mask) | a
    return "a", lines
