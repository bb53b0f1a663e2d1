"""Machine code of a compiled kernel: its instructions, which body each belongs to, its loops.

An instruction is attributed to a body by line information: the outermost line it was inlined at is the line of the
table loop that calls the body. The code is the one that ships, since line information does not change it. Compiling
a body alone would measure other code: registers and unrolling are chosen for the kernel as a whole.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

from ...codegen.triton.build import run_tool
from ...ir.errors import HostError

GENERATED = "<onelaunch_step_"  # how line information names the generated module
MATRIX = ("HMMA", "HGMMA", "QMMA", "IMMA", "UTCHMMA")  # tensor-core instructions
BRANCHES = ("BRA", "BRX", "BRXU")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LINE = re.compile(r'\s*//## File "([^"]*)", line (\d+)(?: inlined at "([^"]*)", line (\d+))?')
_LABEL = re.compile(r"(\.L_\w+):")


@dataclass(frozen=True)
class Instruction:
    """`lines` are those of the generated module: of the instruction, then of the calls it was inlined by."""

    address: int
    text: str  # opcode and operands
    predicated: bool
    lines: tuple[int, ...]
    targets: tuple[str, ...] = ()  # the labels a branch may go to

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    def leaves(self) -> bool:
        """It never goes on to the next one. A branch may have its condition as an operand before its label."""
        if self.name == "BRA":
            return not self.predicated and re.match(r"\S+\s+`", self.text) is not None
        return self.name in (*BRANCHES, "EXIT", "RET") and not self.predicated

    def load_bits(self) -> int:
        """Bits one thread reads from memory, or copies from global to shared memory; 0: it does neither."""
        if self.name not in ("LDG", "LDGSTS", "LDS"):
            return 0
        words = self.opcode.split(".")[1:]
        sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        return next((sizes[w] for w in words if w in sizes), 32)


@dataclass(frozen=True)
class Loop:
    """Instructions that can all reach each other, in address order, less those of loops inside."""

    code: tuple[Instruction, ...]

    @property
    def kind(self) -> str:
        """`matrix` where it computes on tensor cores, else `vector`."""
        return "matrix" if any(i.name in MATRIX for i in self.code) else "vector"


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in address order, and the addresses of its labels."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def loops(self) -> list[Loop]:
        """All of them; an instruction is in the innermost loop that repeats it."""
        flow = self._flow()
        innermost: dict[int, int] = {}
        for number, nodes in enumerate(_nested(flow, flow)):
            innermost |= dict.fromkeys(nodes, number)
        code: dict[int, list[Instruction]] = {}
        for i, instruction in enumerate(self.instructions):
            if i in innermost:
                code.setdefault(innermost[i], []).append(instruction)
        return [Loop(tuple(found)) for found in code.values()]

    def _flow(self) -> nx.DiGraph:
        """Which instruction may follow which, by index. Reconvergence is where the code continues anyway."""
        index = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.instructions)))
        for i, instruction in enumerate(self.instructions):
            graph.add_edges_from((i, index[self.labels[label]]) for label in instruction.targets)
            if not instruction.leaves() and i + 1 < len(self.instructions):
                graph.add_edge(i, i + 1)
        return graph.subgraph({0} | nx.descendants(graph, 0)).copy()


def _nested(part: nx.DiGraph, flow: nx.DiGraph) -> Iterator[set[int]]:
    """Cycles of a part of the flow, each before those that stay in it when its entries are taken out."""
    for nodes in nx.strongly_connected_components(part):
        first = next(iter(nodes))
        if len(nodes) > 1 or part.has_edge(first, first):
            yield nodes
            entries = {n for n in nodes if any(before not in nodes for before in flow.predecessors(n))}
            yield from _nested(part.subgraph(nodes - entries).copy(), flow)


def disassemble(cubin: bytes) -> Code:
    """The code of the one kernel in a cubin; HostError where the cubin has no line information."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.cubin")
        path.write_bytes(cubin)
        listing = run_tool("nvdisasm", "-c", "-gi", str(path))
    instructions, labels = parse_listing(listing.splitlines())
    if not any(i.lines for i in instructions):
        raise HostError("cubin: expected line information of the generated module, got none")
    return Code(tuple(instructions), labels)


def parse_listing(lines: Iterable[str]) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of nvdisasm's listing with inlining information, and the address of every label."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    chain: list[tuple[str, int]] = []
    complete = True
    for text in lines:
        if named := _LINE.match(text):
            chain = [] if complete else chain
            chain.append((named[1], int(named[2])))
            complete = named[3] is None
        elif label := _LABEL.match(text):
            waiting.append(label[1])
        elif code := _INSTRUCTION.match(text):
            address = int(code[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            found.append(_instruction(address, code[2], chain))
    return found, labels


def _instruction(address: int, text: str, chain: list[tuple[str, int]]) -> Instruction:
    ours = tuple(line for file, line in chain if file.startswith(GENERATED))
    guard = re.match(r"@!?U?P\w+\s+", text)
    plain = text[guard.end() :] if guard else text
    targets = re.findall(r"\.L_\w+", plain) if plain.split()[0].split(".")[0] in BRANCHES else []
    return Instruction(address, plain, guard is not None, ours, tuple(targets))
