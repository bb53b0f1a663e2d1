"""Inline PTX for one block of 32 k: four rows of packed codes times rows of int8 activations.

A thread holds the four neighbouring rows of a block that one 16-byte word of each plane has. Codes are unpacked
once for all activations: one or two instructions for four codes, and a product one dp4a for four. The result is a
whole number: exact, whatever the order. Codes and scales come from shared memory, where the block's chunk is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .formats import PANEL_WORDS, WORD, Reader, Scale

QUAD = 4  # rows of one thread: a 16-byte load
ELEMENT_BYTES = {"tl.float16": 2, "tl.uint8": 1, "tl.int8": 1}
PANEL = ("x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "d", "s0", "s1", "t")  # words of 32 activations
FLOATS = ("d", "t")
WHOLE = tuple(name for name in PANEL if name not in FLOATS)  # what products are made of


def load_asm() -> tuple[str, str, str]:
    """PTX, constraints and types: the address of a block's activations to its PANEL words."""
    lines = [
        f"ld.global.v4.b32 {{{', '.join(f'${i}' for i in range(at, at + 4))}}}, [${PANEL_WORDS}+{WORD * at}];"
        for at in range(0, PANEL_WORDS, 4)
    ]
    kinds = ["=f" if name in FLOATS else "=r" for name in PANEL]
    types = ["tl.float32" if name in FLOATS else "tl.int32" for name in PANEL]
    return "\n".join(lines), ",".join([*kinds, "l"]), ", ".join(types)


@dataclass(frozen=True)
class Dots:
    """The products of one block with `rows` of activations, which are in registers already or `loaded` here.

    As the template writes them: names of outputs, operands and types of the assembly.
    """

    fmt: Reader
    rows: tuple[int, ...]
    loaded: bool

    @property
    def _parts(self) -> int:
        return len(self.fmt.scale)

    @cached_property
    def _outputs(self) -> list[tuple[str, bool]]:
        """Name of each result, and whether it is a float."""
        dots = [(f"dots{i}_{p}_{j}", False) for p in self.rows for i in range(self._parts) for j in range(QUAD)]
        scales = [(f"{s.name}_{j}", True) for s in self.fmt.scales for j in range(QUAD)]
        panel = [(f"{name}{p}", True) for p in self.rows for name in ("scale", "whole")]
        return dots + scales + (panel if self.loaded else [])

    @cached_property
    def _addresses(self) -> list[tuple[bool, int, int]]:
        """Distinct (in the tail, bytes of a half, bytes of a quad) by which planes and scales lie."""
        planes = [(False, WORD * p.half, WORD * QUAD) for p in self.fmt.planes]
        return list(dict.fromkeys([*planes, *(_place(s) for s in self.fmt.scales)]))

    def names(self, p: int, j: int) -> str:
        """What `read` gives, and `add` takes, of row j of a quad and activations p."""
        found = [f"dots{i}_{p}_{j}" for i in range(self._parts)] + [f"{s.name}_{j}" for s in self.fmt.scales]
        return ", ".join(found)

    @property
    def outputs(self) -> str:
        return ", ".join(name for name, _ in self._outputs)

    @property
    def types(self) -> str:
        return ", ".join("tl.float32" if is_float else "tl.int32" for _, is_float in self._outputs)

    @property
    def inputs(self) -> str:
        at = [f"{'tail' if tail else 'at'} + half * {half} + quad * {quad}" for tail, half, quad in self._addresses]
        return ", ".join([*at, *([f"x{p}" for p in self.rows] if self.loaded else WHOLE)])

    @property
    def constraints(self) -> str:
        inputs = ["r"] * len(self._addresses)
        inputs += ["l"] * len(self.rows) if self.loaded else ["r"] * len(WHOLE)
        return ",".join([*("=&f" if is_float else "=&r" for _, is_float in self._outputs), *inputs])

    @property
    def asm(self) -> str:
        registers = [f"{p.name}_{j}" for p in self.fmt.planes for j in range(QUAD)]
        lines = ["{", f".reg .b32 {', '.join(registers)}, a, b, e0, e1;", ".reg .b16 h0, h1, h2, h3;"]
        for plane in self.fmt.planes:
            four = ", ".join(f"{plane.name}_{j}" for j in range(QUAD))
            at = self._at(False, WORD * plane.half, WORD * QUAD)
            lines.append(f"ld.shared.v4.b32 {{{four}}}, [{at}+{WORD * plane.first}];")
        for scale in self.fmt.scales:
            lines += self._scale(scale)
        lines += self._activations()
        for j in range(QUAD):
            for g in range(8):
                lines += self._products(j, g)
        return "\n".join([*lines, "}"])

    def _operand(self, name: str) -> str:
        return f"${[n for n, _ in self._outputs].index(name)}"

    def _at(self, *place: object) -> str:
        return f"${len(self._outputs) + [tuple(a) for a in self._addresses].index(place)}"  # type: ignore[arg-type]

    def _scale(self, scale: Scale) -> list[str]:
        """The four scales of a kind, as float32."""
        size = ELEMENT_BYTES[scale.dtype]
        at = f"[{self._at(*_place(scale))}+{size * scale.first}]"
        outs = [self._operand(f"{scale.name}_{j}") for j in range(QUAD)]
        if size == 2:
            load = f"ld.shared.v4.b16 {{h0, h1, h2, h3}}, {at};"
            return [load, *(f"cvt.f32.f16 {out}, h{j};" for j, out in enumerate(outs))]
        kind = "u8" if scale.dtype == "tl.uint8" else "s8"
        word = f"ld.shared.b32 e0, {at};"
        picked = [
            [f"bfe.{kind[0]}32 e1, e0, {8 * j}, 8;", f"cvt.rn.f32.{kind[0]}32 {out}, e1;"] for j, out in enumerate(outs)
        ]
        return [word, *(line for lines in picked for line in lines)]

    def _activations(self) -> list[str]:
        """x*_p, and s*_p: what the zero point takes from a sum of products with unsigned codes."""
        lines = []
        for i, p in enumerate(self.rows):
            lines.append(f".reg .b32 {', '.join(f'{name}_{p}' for name in PANEL)};")
            first = len(self._outputs) + len(self._addresses)
            if self.loaded:
                for at in range(0, PANEL_WORDS, 4):
                    four = ", ".join(f"{name}_{p}" for name in PANEL[at : at + 4])
                    lines.append(f"ld.global.v4.b32 {{{four}}}, [${first + i}+{WORD * at}];")
                for name, word in ((f"scale{p}", "d"), (f"whole{p}", "t")):
                    lines.append(f"mov.b32 {self._operand(name)}, {word}_{p};")
            else:
                lines += [f"mov.b32 {name}_{p}, ${first + n};" for n, name in enumerate(WHOLE)]
            if self._parts == 1:
                lines += [f"add.s32 s0_{p}, s0_{p}, s1_{p};", f"mul.lo.s32 s0_{p}, s0_{p}, {-self.fmt.zero};"]
            else:
                lines += [f"mul.lo.s32 s{i}_{p}, s{i}_{p}, {-self.fmt.zero};" for i in range(self._parts)]
        return lines

    def _products(self, j: int, g: int) -> list[str]:
        part = g * self._parts // 8
        codes, lines = self._unpack(j, g)
        for p in self.rows:
            total = self._operand(f"dots{part}_{p}_{j}")
            begin = f"s{part}_{p}" if g % (8 // self._parts) == 0 else total
            lines.append(f"dp4a.u32.s32 {total}, {codes}, x{g}_{p}, {begin};")
        return lines

    def _unpack(self, j: int, g: int) -> tuple[str, list[str]]:
        """The register with row j's codes of group g, and the instructions that put them there."""
        if any(p.name == "w4" for p in self.fmt.planes):
            return f"w{g}_{j}", []
        word = f"w{g % 4}_{j}"
        lines = [f"and.b32 a, {word}, 0x0F0F0F0F;"]
        if g >= 4:
            lines = [f"shr.u32 a, {word}, 4;", "and.b32 a, a, 0x0F0F0F0F;"]
        if self.fmt.upper:
            plane, shift, mask = self.fmt.upper[g]
            moved = f"shl.b32 b, {plane}_{j}, {shift};" if shift >= 0 else f"shr.u32 b, {plane}_{j}, {-shift};"
            lines += [moved, f"lop3.b32 a, b, {mask}, a, 0xEA;"]  # (b & mask) | a
        return "a", lines


def _place(scale: Scale) -> tuple[bool, int, int]:
    size = ELEMENT_BYTES[scale.dtype]
    return scale.in_tail, 16 * size, QUAD * size
