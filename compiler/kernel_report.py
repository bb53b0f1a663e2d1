"""What the compiled GPU step uses and what its main loops cost, against what the machine has.

A body's main loops are those that read codes of weights: the generated source marks such a load with CODES. The
cost of a loop is the instructions of one iteration times the threads of the block over the weights it reads, all
paths through the loop counted as taken.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..codegen.triton.build import REGISTERS, Kernel
from ..ir.formats import FORMATS
from ..ir.graph import Program
from ..ir.schedule import part_name, parts
from .machines import Machine
from .sass import Instruction, Loop, disassemble

CODES = "# codes"  # ends every line of generated source that loads codes of weights
SPILLS = ("STL", "LDL")
SYSTEM_SHARED = 1024  # bytes of static shared memory that the system takes from sm_90 on
Formats = dict[str, str]  # title of a body that reads a matrix -> weight format


@dataclass(frozen=True)
class MainLoop:
    """One loop over codes. `kind` is `matrix` where products are made on tensor cores (several rows), else `vector`.

    widths: bits per thread and load of codes -> loads in the loop. bytes: of codes that the block reads in one
    iteration. per_weight: thread-instructions.
    """

    kind: str
    instructions: int
    widths: dict[int, int]
    bytes: int
    per_weight: float
    mix: dict[str, int]

    @property
    def wide(self) -> bool:
        """Every load of codes reads 16 bytes or more."""
        return all(bits >= 128 for bits in self.widths)


@dataclass(frozen=True)
class BodyReport:
    """`instructions` are those of its SASS code; `format` is empty where it reads no matrix."""

    number: int
    title: str
    format: str
    instructions: int
    loops: tuple[MainLoop, ...]


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel. Shared memory in bytes; `spills` counts spill bytes, `local` SASS accesses of the stack."""

    arch: str
    warps: int
    registers: int
    stack: int
    spills: int
    local: int
    static_shared: int
    shared: int
    mix: dict[str, int]
    unattributed: int
    bodies: tuple[BodyReport, ...]


def body_formats(program: Program) -> Formats:
    """The weight format of every body that reads a matrix, by its title `GRAPH.PHASE.BODY`."""
    return {
        f"{graph.name}.{phase.name}.{part_name(part)}": part[0].operands[1].tensor.dtype
        for graph in program.graphs
        for phase in graph.phases
        if phase.anchor_kind == "linear"
        for part in parts(phase)
    }


def report(kernel: Kernel, source: str, formats: Formats) -> KernelReport:
    """Disassemble a kernel and count; `source` is the generated module it was compiled from."""
    code = disassemble(kernel.cubin)
    calls, titles, marked = _calls(source), _titles(source), _marked(source)
    loops = code.loops()
    owner = [calls.get(i.call, -1) for i in code.instructions]
    bodies = tuple(
        _body(number, titles[number], formats.get(titles[number], ""), owner, loops, calls, marked, kernel.warps)
        for number in sorted(titles)
    )
    mix = Counter(i.name for i in code.instructions)
    return KernelReport(
        kernel.arch, kernel.warps, kernel.registers, kernel.stack, kernel.spills, sum(mix[n] for n in SPILLS),
        kernel.static_shared, kernel.shared, dict(mix.most_common()), owner.count(-1), bodies,
    )  # fmt: skip


def _calls(source: str) -> dict[int, int]:
    """Line of the dispatcher -> number of the body it calls."""
    return {i: int(m[1]) for i, m in enumerate(_matches(r"\s+body_(\d+)\(", source), 1) if m}


def _titles(source: str) -> dict[int, str]:
    """Number of a body -> its title, which the dispatcher gives as a comment."""
    found = [m for m in _matches(r"\s+(?:el)?if body == (\d+):\s*# (\S+)", source) if m]
    return {int(m[1]): m[2] for m in found}


def _marked(source: str) -> set[int]:
    """Lines of the statements that load codes; one that spans lines counts with all of them."""
    ends = {i for i, line in enumerate(source.splitlines(), 1) if line.rstrip().endswith(CODES)}
    simple = (ast.Assign, ast.AugAssign, ast.Expr)
    spans = [
        range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in ast.walk(ast.parse(source)) if isinstance(n, simple)
    ]
    return ends | {line for span in spans if ends & set(span) for line in span}


def _matches(pattern: str, source: str) -> list[re.Match[str] | None]:
    return [re.match(pattern, line) for line in source.splitlines()]


def _body(
    number: int, title: str, fmt: str, owner: list[int], loops: list[Loop],
    calls: dict[int, int], marked: set[int], warps: int,
) -> BodyReport:  # fmt: skip
    loads = {
        loop: [i for i in loop.code if i.line in marked and calls.get(i.call) == number and i.load_bits()]
        for loop in (loops if fmt else ())
    }
    reading = [loop for loop, found in loads.items() if found]
    # What a pipelined loop loads ahead of its first iteration is in the loop around it.
    inner = [loop for loop in reading if not any(loop.number in other.outer for other in reading)]
    found = [_main_loop(loop, loads[loop], 32 * warps, FORMATS[fmt].bits) for loop in inner]
    return BodyReport(number, title, fmt, owner.count(number), tuple(found))


def _main_loop(loop: Loop, loads: list[Instruction], threads: int, bits: int) -> MainLoop:
    read = threads * sum(i.load_bits() for i in loads)
    return MainLoop(
        loop.kind,
        len(loop.code),
        dict(Counter(i.load_bits() for i in loads)),
        read // 8,
        len(loop.code) * threads * bits / read,
        dict(Counter(i.name for i in loop.code).most_common()),
    )


def problems(found: KernelReport, machine: Machine, blocks: int = 1) -> list[str]:
    """Why a kernel may not run as planned with `blocks` blocks on each SM of a machine; empty: it may."""
    threads, shared = 32 * found.warps, found.shared + found.static_shared
    checks = [
        ("spilled bytes", found.spills, 0),
        ("stack bytes", found.stack, 0),
        ("local memory instructions", found.local, 0),
        ("registers per thread", found.registers, REGISTERS),
        (f"registers of {blocks} blocks", blocks * threads * found.registers, machine.registers_per_sm),
        (f"threads of {blocks} blocks", blocks * threads, machine.threads_per_sm),
        ("dynamic shared bytes", found.shared, machine.shared_bytes_per_block),
        (f"shared bytes of {blocks} blocks", blocks * shared, machine.shared_bytes_per_sm),
    ]
    reasons = [f"{found.arch}: {what}: expected at most {most}, got {got}" for what, got, most in checks if got > most]
    for body in found.bodies:
        if body.format and not body.loops:
            reasons.append(f"{found.arch}: body `{body.title}`: expected a loop with a load marked `{CODES}`, got none")
        for loop in body.loops:
            if not loop.wide:
                widths = ", ".join(f"{n} of {bits} bits" for bits, n in sorted(loop.widths.items()))
                reasons.append(f"{found.arch}: body `{body.title}`: expected 16-byte loads of codes, got {widths}")
    return reasons


def budget(body: BodyReport, machine: Machine) -> float:
    """Thread-instructions per weight at which a body's issue takes as long as its reading."""
    return machine.issue_budget(FORMATS[body.format].packed_bits)


def alone(source: str, number: int) -> str:
    """The generated module with one body left in its dispatcher: what the others cost it in registers."""
    return ast.unparse(_Alone(number).visit(ast.parse(source)))


class _Alone(ast.NodeTransformer):
    def __init__(self, number: int) -> None:
        self.number = number

    def visit_If(self, node: ast.If) -> Any:
        match node.test:
            case ast.Compare(left=ast.Name(id="body"), comparators=[ast.Constant(value=value)]):
                if value == self.number:
                    return node.body
                kept = [statement for inner in node.orelse for statement in _listed(self.visit(inner))]
                return kept or ast.Pass()
        return self.generic_visit(node)


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]
