"""Inline PTX for one block of 32 k: four rows of packed codes times rows of int8 activations.

A thread holds the four neighbouring rows of a block that one 16-byte word of each plane has. Codes are unpacked
once for all activations: one or two instructions for four codes, and a product one dp4a for four. The result is a
whole number: exact, whatever the order. Codes and scales come from shared memory, where the block's chunk is, or,
where no ring holds the weight, from registers: they are then loaded a block ahead (`Ahead`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .formats import HALF_WORDS, PANEL_WORDS, WORD, Reader, Scale

QUAD = 4  # rows of one thread: a 16-byte load
CODES_PLACE = "at", WORD * HALF_WORDS, WORD * QUAD  # bytes, see `_addresses`
ELEMENT_BYTES = {"tl.float16": 2, "tl.bfloat16": 2, "tl.uint8": 1, "tl.int8": 1}
PANEL = ("x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "d", "s0", "s1", "t")  # words of 32 activations
FLOATS = ("d", "t")
HALVES = (("shl.b32", "16"), ("and.b32", "0xFFFF0000"))  # of a word, as the high one
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


def word_names(fmt: Reader) -> list[str]:
    return [f"{p.name}_{j}" for p in fmt.planes for j in range(QUAD)]


def scale_names(fmt: Reader) -> list[str]:
    return [f"{s.name}_{j}" for s in fmt.scales for j in range(QUAD)]


@dataclass(frozen=True)
class Ahead:
    """Loads of a block's codes and scales from device memory into registers, zeros where it is not `inside`.

    As the template writes them: names, operands and types of the assembly.
    """

    fmt: Reader

    @property
    def words(self) -> str:
        return ", ".join(word_names(self.fmt))

    @property
    def scales(self) -> str:
        return ", ".join(scale_names(self.fmt))

    @property
    def words_asm(self) -> str:
        count = len(word_names(self.fmt))
        lines = _where_inside(count, 1)
        for i, plane in enumerate(self.fmt.planes):
            four = ", ".join(f"${QUAD * i + j}" for j in range(QUAD))
            lines.append(f"@p ld.global.v4.b32 {{{four}}}, [${count}+{WORD * plane.first}];")
        return "\n".join([*lines, "}"])

    @property
    def words_inputs(self) -> str:
        return f"at + half * {HALF_WORDS} + quad * {QUAD}, inside.to(tl.int32)"

    @property
    def words_constraints(self) -> str:
        return ",".join(["=&r"] * len(word_names(self.fmt)) + ["l", "r"])

    @property
    def words_types(self) -> str:
        return ", ".join(["tl.int32"] * len(word_names(self.fmt)))

    @property
    def _places(self) -> list[tuple[str, int, int]]:
        return list(dict.fromkeys(_place(s) for s in self.fmt.scales))

    @property
    def scales_asm(self) -> str:
        count = len(scale_names(self.fmt))
        lines = [*_where_inside(count, len(self._places)), ".reg .b32 e0, e1;", ".reg .b16 h0, h1, h2, h3;"]
        for i, scale in enumerate(self.fmt.scales):
            at = f"[${count + self._places.index(_place(scale))}+{ELEMENT_BYTES[scale.dtype] * scale.first}]"
            found = scale_loads(scale, "global", at, [f"${QUAD * i + j}" for j in range(QUAD)])
            lines += [f"@p {line}" for line in found]
        return "\n".join([*lines, "}"])

    @property
    def scales_inputs(self) -> str:
        places = (f"{home} + half * {half // WORD} + quad * {quad // WORD}" for home, half, quad in self._places)
        return ", ".join([*places, "inside.to(tl.int32)"])

    @property
    def scales_constraints(self) -> str:
        return ",".join(["=&f"] * len(scale_names(self.fmt)) + ["l"] * len(self._places) + ["r"])

    @property
    def scales_types(self) -> str:
        return ", ".join(["tl.float32"] * len(scale_names(self.fmt)))


@dataclass(frozen=True)
class Dots:
    """The products of one block with `rows` of activations, which are in registers already or `loaded` here.

    held: codes and scales are in registers, and none of the results.
    As the template writes them: names of outputs, operands and types of the assembly.
    """

    fmt: Reader
    rows: tuple[int, ...]
    loaded: bool
    held: bool = False

    @property
    def _parts(self) -> int:
        return len(self.fmt.scale)

    @cached_property
    def _outputs(self) -> list[tuple[str, bool]]:
        """Name of each result, and whether it is a float."""
        dots = [(f"dots{i}_{p}_{j}", False) for p in self.rows for i in range(self._parts) for j in range(QUAD)]
        scales = [] if self.held else [(name, True) for name in scale_names(self.fmt)]
        panel = [(f"{name}{p}", True) for p in self.rows for name in ("scale", "whole")]
        return dots + scales + (panel if self.loaded else [])

    @cached_property
    def _addresses(self) -> list[tuple[str, int, int]]:
        """Distinct (home, bytes of a half, bytes of a quad) by which planes and scales lie."""
        if self.held:
            return []
        return list(dict.fromkeys([CODES_PLACE, *(_place(s) for s in self.fmt.scales)]))

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
        at = [f"{home} + half * {half} + quad * {quad}" for home, half, quad in self._addresses]
        at += word_names(self.fmt) if self.held else []
        return ", ".join([*at, *([f"x{p}" for p in self.rows] if self.loaded else WHOLE)])

    @property
    def constraints(self) -> str:
        inputs = ["r"] * (len(self._addresses) + self._words)
        inputs += ["l"] * len(self.rows) if self.loaded else ["r"] * len(WHOLE)
        return ",".join([*("=&f" if is_float else "=&r" for _, is_float in self._outputs), *inputs])

    @property
    def _words(self) -> int:
        return len(word_names(self.fmt)) if self.held else 0

    @property
    def asm(self) -> str:
        registers = [*word_names(self.fmt), *(("u0", "u1", "u2", "u3", "m") if self.fmt.table else ())]
        lines = ["{", f".reg .b32 {', '.join(registers)}, a, b, e0, e1;", ".reg .b16 h0, h1, h2, h3;"]
        lines += self._held() if self.held else self._read()
        lines += self._activations()
        for j in range(QUAD):
            for g in range(8):
                lines += self._products(j, g)
        return "\n".join([*lines, "}"])

    def _operand(self, name: str) -> str:
        return f"${[n for n, _ in self._outputs].index(name)}"

    def _at(self, *place: object) -> str:
        return f"${len(self._outputs) + [tuple(a) for a in self._addresses].index(place)}"  # type: ignore[arg-type]

    def _held(self) -> list[str]:
        return [f"mov.b32 {name}, ${len(self._outputs) + i};" for i, name in enumerate(word_names(self.fmt))]

    def _read(self) -> list[str]:
        """Codes, and scales as float32, from shared memory."""
        lines = []
        for plane in self.fmt.planes:
            four = ", ".join(f"{plane.name}_{j}" for j in range(QUAD))
            at = self._at(*CODES_PLACE)
            lines.append(f"ld.shared.v4.b32 {{{four}}}, [{at}+{WORD * plane.first}];")
        for scale in self.fmt.scales:
            at = f"[{self._at(*_place(scale))}+{ELEMENT_BYTES[scale.dtype] * scale.first}]"
            lines += scale_loads(scale, "shared", at, [self._operand(f"{scale.name}_{j}") for j in range(QUAD)])
        return lines

    def _activations(self) -> list[str]:
        """x*_p, and s*_p: what the zero point takes from a sum of products with unsigned codes."""
        lines = []
        for i, p in enumerate(self.rows):
            lines.append(f".reg .b32 {', '.join(f'{name}_{p}' for name in PANEL)};")
            first = len(self._outputs) + len(self._addresses) + self._words
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
        if self.fmt.width == 8:
            return f"w{g}_{j}", []
        word, shift = (f"w{g % 4}_{j}", g // 4 * 4) if self.fmt.width == 4 else (f"w{g // 4}_{j}", g % 4 * 2)
        if self.fmt.table:
            return ("a", self._looked_up(g, word)) if g < 4 else (f"u{g - 4}", [])
        mask = "0x0F0F0F0F" if self.fmt.width == 4 else "0x03030303"
        lines = [f"shr.u32 a, {word}, {shift};", f"and.b32 a, a, {mask};"] if shift else [f"and.b32 a, {word}, {mask};"]
        if self.fmt.upper:
            plane, shift, mask = self.fmt.upper[g]
            moved = f"shl.b32 b, {plane}_{j}, {shift};" if shift >= 0 else f"shr.u32 b, {plane}_{j}, {-shift};"
            lines += [moved, f"lop3.b32 a, b, {mask}, a, 0xEA;"]  # (b & mask) | a
        return "a", lines

    def _looked_up(self, g: int, word: str) -> list[str]:
        """What the table has for eight codes, zero added: those of group g in `a`, of g + 4 in a register of their own.

        A byte of a word has a code of both groups. A permutation looks four codes up by three bits of each and leaves
        their signs to a second table; by all four bits of 0x80 it gives 0x80 or, of negative ones, 0xFF: enough where
        no entry has that bit.
        """
        positive, negative = ([self.fmt.zero + v for v in half] for half in (self.fmt.table[:8], self.fmt.table[8:]))
        tables = [
            ", ".join(f"0x{int.from_bytes(bytes(t[i : i + 4]), 'little'):08X}" for i in (0, 4))
            for t in (positive, negative)
        ]
        wide = max(positive + negative) > 127
        whole = ["and.b32 e0, e0, 0x01010101;", "mul.lo.u32 e0, e0, 255;"] if wide else []
        lines = [f"and.b32 m, {word}, 0x77777777;", f"mov.b32 e1, {word};"]
        for out in ("a", "b"):
            if out == "b":
                lines += ["shr.u32 m, m, 16;", "shr.u32 e1, e1, 16;"]
            lines += [
                f"prmt.b32 {out}, {tables[0]}, m;",
                f"prmt.b32 u{g}, {tables[1]}, m;",
                "prmt.b32 e0, 0x80808080, 0x80808080, e1;",
                *whole,
                f"lop3.b32 {out}, {out}, u{g}, e0, 0xD8;",  # (out & ~e0) | (u & e0)
            ]
        return [*lines, f"prmt.b32 u{g}, a, b, 0x7531;", "prmt.b32 a, a, b, 0x6420;"]


def scale_loads(scale: Scale, memory: str, at: str, outs: list[str]) -> list[str]:
    """The four scales of a kind, as float32."""
    if scale.dtype == "tl.bfloat16":  # the high half of a float32
        halves = [f"{cut} {out}, e{j // 2}, {by};" for j, out in enumerate(outs) for cut, by in (HALVES[j % 2],)]
        return [f"ld.{memory}.v2.b32 {{e0, e1}}, {at};", *halves]
    if ELEMENT_BYTES[scale.dtype] == 2:
        load = f"ld.{memory}.v4.b16 {{h0, h1, h2, h3}}, {at};"
        return [load, *(f"cvt.f32.f16 {out}, h{j};" for j, out in enumerate(outs))]
    kind = "u32" if scale.dtype == "tl.uint8" else "s32"
    lines = [f"ld.{memory}.b32 e0, {at};"]
    for j, out in enumerate(outs):
        lines += [f"bfe.{kind} e1, e0, {8 * j}, 8;", f"cvt.rn.f32.{kind} {out}, e1;"]
    return lines


def _where_inside(outputs: int, addresses: int) -> list[str]:
    """The beginning of assembly that loads something only where its last operand is not zero."""
    lines = ["{", ".reg .pred p;", f"setp.ne.b32 p, ${outputs + addresses}, 0;"]
    return lines + [f"mov.b32 ${i}, 0;" for i in range(outputs)]


def _place(scale: Scale) -> tuple[str, int, int]:
    size = ELEMENT_BYTES[scale.dtype]
    return scale.home, HALF_WORDS * size, QUAD * size
