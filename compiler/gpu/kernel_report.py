"""What a compiled kernel of the GPU step uses and what its main loops cost, against what the machine has.

A branch is what the table loop calls for one or several bodies. Its main loops are those that read codes of weights:
the generated source marks such a load with CODES. The cost of a loop is the instructions of one iteration times the
threads of the block over the weights it reads, with every path through the loop counted as taken.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...codegen.triton.build import REGISTERS, Kernel
from ...ir.formats import FORMATS
from ...ir.graph import Program
from ...ir.schedule import part_name, part_weight, parts
from .machines import Machine
from .sass import Instruction, Loop, disassemble

CODES = "# codes"  # ends every line of generated source that loads codes of weights
LOCAL = ("STL", "LDL")
Formats = dict[str, str]  # title of a body that reads a matrix -> weight format


@dataclass(frozen=True)
class MainLoop:
    """One loop over codes, in the code of a function of the generated module.

    kind: `matrix` where products are made on tensor cores, else `vector`. widths: bits per thread and load of codes ->
    loads in the loop. bytes: of codes that the block reads in one iteration. per_weight: thread-instructions.
    """

    function: str
    kind: str
    instructions: int
    widths: dict[int, int]
    bytes: int
    per_weight: float
    mix: dict[str, int]

    @property
    def narrow(self) -> bool:
        """Loads of codes read less than 16 bytes, on tensor cores, where operands are small tiles, less than 4."""
        return any(bits < (32 if self.kind == "matrix" else 128) for bits in self.widths)


@dataclass(frozen=True)
class Branch:
    """What the table loop calls: a function, the titles of its bodies, their weight format ('' = no matrix).

    local: its instructions that access the stack.
    """

    function: str
    titles: tuple[str, ...]
    format: str
    instructions: int
    local: int
    loops: tuple[MainLoop, ...]


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel. Stack, shared memory and `spills` in bytes; a stack may hold arrays that no spill made.

    loop: instructions of the table loop itself, with its waits and signals.
    """

    arch: str
    entry: str
    warps: int
    registers: int
    stack: int
    spills: int
    static_shared: int
    shared: int
    mix: dict[str, int]
    loop: int
    branches: tuple[Branch, ...]


def body_formats(program: Program) -> Formats:
    """The weight format of every body that reads a matrix, by its title `GRAPH.PHASE.BODY`."""
    return {
        f"{graph.name}.{phase.name}.{part_name(part)}": part_weight(part).tensor.dtype
        for graph in program.graphs
        for phase in graph.phases
        if phase.reads_matrix
        for part in parts(phase)
    }


def report(kernel: Kernel, source: str, formats: Formats) -> KernelReport:
    """Disassemble a kernel and count; `source` is the generated module it was compiled from."""
    code, text = disassemble(kernel.cubin), _Source(source, kernel.entry)
    loops = code.loops()
    owners = Counter(text.branch(i) for i in code.instructions)
    local = Counter(text.branch(i) for i in code.instructions if i.name in LOCAL)
    branches = []
    for line, (function, titles) in sorted(text.branches.items()):
        fmt = next((formats[t] for t in titles if t in formats), "")
        found = _main_loops(text, loops, line, 32 * kernel.warps, FORMATS[fmt].bits) if fmt else ()
        branches.append(Branch(function, titles, fmt, owners[line], local[line], found))
    mix = Counter(i.name for i in code.instructions)
    return KernelReport(
        kernel.arch, kernel.entry, kernel.warps, kernel.registers, kernel.stack, kernel.spills,
        kernel.static_shared, kernel.shared, dict(mix.most_common()), owners[0],
        tuple(branches),
    )  # fmt: skip


class _Source:
    """The generated module by lines: branches of one kernel's table loop, marked loads, functions."""

    def __init__(self, text: str, entry: str) -> None:
        lines, tree = text.splitlines(), ast.parse(text)
        self.functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
        kernel = next(f for f in self.functions if f.name == entry)
        self.branches: dict[int, tuple[str, tuple[str, ...]]] = {}
        for number in range(kernel.lineno, kernel.end_lineno or 0):
            test = re.match(r"\s+(?:el)?if .*\bbody ==.*:\s*# (.+)", lines[number - 1])
            if test and (called := re.search(r"(\w+)\(", lines[number])):
                self.branches[number + 1] = called[1], tuple(test[1].split(", "))
        ends = {i for i, line in enumerate(lines, 1) if line.rstrip().endswith(CODES)}
        simple = [n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.Return)]
        spans = [range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in simple]
        self.marked = {line for span in spans if ends & set(span) for line in span}

    def branch(self, instruction: Instruction) -> int:
        """The line of the table loop that called an instruction's branch; 0: it is the loop's own."""
        call = instruction.lines[-1] if instruction.lines else 0
        return call if call in self.branches else 0

    def function(self, loop: Loop, loads: list[Instruction]) -> str:
        """The innermost function that has all of a loop's loads, and all but a few of its instructions."""
        chains = [self.chain(i) for i in loop.code]
        found = ""
        for depth, name in enumerate(self.chain(loads[0])):
            inside = sum(chain[depth : depth + 1] == [name] for chain in chains)
            if inside < 0.8 * len(chains) or any(self.chain(i)[depth : depth + 1] != [name] for i in loads):
                break
            found = name
        return found

    def chain(self, instruction: Instruction) -> list[str]:
        """Names of functions, the kernel first."""
        return [self._at(line) for line in reversed(instruction.lines)]

    def _at(self, line: int) -> str:
        return next((f.name for f in self.functions if f.lineno <= line <= (f.end_lineno or 0)), "")


def _main_loops(text: _Source, loops: list[Loop], line: int, threads: int, bits: int) -> tuple[MainLoop, ...]:
    """The shortest loop of each function that loads codes, one with products if there is any.

    First loads, made before a loop, are in those around it.
    """
    found: list[tuple[Loop, list[Instruction]]] = []
    seen: set[tuple[str, ...]] = set()
    for loop in sorted(loops, key=lambda loop: (loop.kind != "matrix", len(loop.code))):
        loads = [i for i in loop.code if text.branch(i) == line and i.lines[0] in text.marked and i.load_bits()]
        # A statement that reads codes from the ring reads scales and activations as well: narrower, or from afar.
        ring = [i for i in loads if i.name == "LDS" and i.load_bits() == 128]
        loads = ring or [i for i in loads if i.name != "LDS"]
        chains = {tuple(text.chain(i)) for i in loads}
        if not chains <= seen:
            found.append((loop, loads))
            seen |= chains
    return tuple(_main_loop(text.function(loop, loads), loop, loads, threads, bits) for loop, loads in found)


def _main_loop(function: str, loop: Loop, loads: list[Instruction], threads: int, bits: int) -> MainLoop:
    read = threads * sum(i.load_bits() for i in loads)
    return MainLoop(
        function,
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
    where = f"{found.arch} {found.entry}"
    checks = [
        ("spilled bytes", found.spills, 0),
        ("local memory instructions where matrices are read", sum(b.local for b in found.branches if b.format), 0),
        ("registers per thread", found.registers, REGISTERS),
        (f"registers of {blocks} blocks", blocks * threads * found.registers, machine.registers_per_sm),
        (f"threads of {blocks} blocks", blocks * threads, machine.threads_per_sm),
        ("dynamic shared bytes", found.shared, machine.shared_bytes_per_block),
        (f"shared bytes of {blocks} blocks", blocks * shared, machine.shared_bytes_per_sm),
    ]
    reasons = [f"{where}: {what}: expected at most {most}, got {got}" for what, got, most in checks if got > most]
    for branch in found.branches:
        if branch.format and not branch.loops:
            reasons.append(f"{where}: `{branch.function}`: expected a loop with a load marked `{CODES}`, got none")
        for loop in branch.loops:
            if loop.narrow:
                widths = ", ".join(f"{n} of {bits} bits" for bits, n in sorted(loop.widths.items()))
                reasons.append(f"{where}: `{loop.function}`: expected 16-byte loads of codes, got {widths}")
    return reasons


def budget(branch: Branch, machine: Machine) -> float:
    """Thread-instructions per weight at which a branch's issue takes as long as its reading."""
    return machine.issue_budget(FORMATS[branch.format].packed_bits)


def only(source: str, entry: str, functions: Collection[str]) -> str:
    """The generated module with some branches left in a kernel's table loop: what do the others cost in registers?"""
    return ast.unparse(_Only(entry, functions).visit(ast.parse(source)))


class _Only(ast.NodeTransformer):
    def __init__(self, entry: str, functions: Collection[str]) -> None:
        self.entry, self.functions = entry, functions

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return self.generic_visit(node) if node.name == self.entry else node

    def visit_If(self, node: ast.If) -> Any:
        if not any(isinstance(n, ast.Name) and n.id == "body" for n in ast.walk(node.test)):
            return self.generic_visit(node)
        rest = [self.visit(inner) for inner in node.orelse]
        node.orelse = [s for inner in rest for s in (inner if isinstance(inner, list) else [inner])]
        match node.body:
            case [ast.Expr(value=ast.Call(func=ast.Name(id=name)))] | [
                ast.Assign(value=ast.Call(func=ast.Name(id=name)))
            ] if name in self.functions:
                return node
        return node.orelse or ast.Pass()
