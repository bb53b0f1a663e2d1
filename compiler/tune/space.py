"""What may be chosen for a program on a target, and why the rest of CHOICES may not.

A degree is one key of a Tuning and the values that are worth trying. Rules prune by what the program, the target and
the limits are; each says why, for `--explain`. `clash` refuses combinations that no single value shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...codegen.triton.build import stages
from ...codegen.triton.formats import CHUNK_BYTES, DenseReader, reader
from ...ir.errors import CompileError
from ...ir.formats import BLOCK_K, FORMATS, packed_body_bytes
from ...ir.graph import Program
from ...ir.limits import Limits
from ...ir.phases import Phase
from ...ir.schedule import part_bytes, part_weight, parts, unit_rows
from ...ir.stream import PIECE
from ...ir.tuning import CHOICES, CPU, GPU, Choice, Tuning
from ..build import Level
from ..gpu.machines import Machine

PANEL_USUAL = {2: 6, 1: 2, 0: 2}  # rows that the registers of a level hold (linear_act.h)
GATHERED = 32  # rows that experts gather at a time


@dataclass(frozen=True)
class Degree:
    """One choice and its values, the default first; `pruned`: value to the rule that leaves it out.

    keys: of a Tuning that are set together; the first names the degree.
    """

    keys: tuple[str, ...]
    choice: Choice
    values: tuple[int, ...]
    pruned: Mapping[int, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.keys[0]

    @property
    def default(self) -> int:
        return self.choice.default


def space(program: Program, limits: Limits, place: Level | Machine, workers: Sequence[int] = ()) -> list[Degree]:
    """Every degree of freedom of a fused and tiled program on a processor or a GPU; those with one value as well.

    workers: the thread counts of a processor to choose from.
    """
    kind = CPU if isinstance(place, Level) else GPU
    found = []
    for choice in CHOICES.values():
        if choice.target not in (kind, "both") or not _felt(program, choice):
            continue
        groups = _phase_keys(choice.name, program) if choice.home == "phase" else [((choice.name,), None)]
        for keys, phase in groups:
            pruned = {v: why for v in choice.values if (why := _rule(choice, v, phase, program, limits, place))}
            if choice.name == "threads":
                pruned |= {v: f"compiled for {', '.join(map(str, workers))} threads" for v in choice.values
                           if v not in pruned and (v not in workers or len(workers) == 1)}  # fmt: skip
            pruned.pop(choice.default, None)
            left = [v for v in choice.values if v not in pruned and v != choice.default]
            found.append(Degree(keys, choice, (choice.default, *left), pruned))
    return found


def _felt(program: Program, choice: Choice) -> bool:
    return any(p.anchor_kind in choice.anchors for g in program.graphs for p in g.phases)


def _phase_keys(name: str, program: Program) -> list[tuple[tuple[str, ...], Phase | None]]:
    """The keys of each distinct body: phases of one shape, format and layout are chosen for together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    first: dict[tuple[object, ...], Phase] = {}
    for graph in program.graphs:
        for phase in (p for p in graph.phases if p.reads_matrix):
            shape = (phase.layout, *((part_weight(x).tensor, unit_rows(phase, x)) for x in parts(phase)))
            groups.setdefault(shape, []).append(f"{name} {graph.name}.{phase.name}")
            first.setdefault(shape, phase)
    return [(tuple(keys), first[shape]) for shape, keys in groups.items()]


def _rule(
    choice: Choice, value: int, phase: Phase | None, program: Program, limits: Limits, place: Level | Machine
) -> str:
    """Why a value is left out; empty: it is not."""
    if choice.name == "few_rows":
        return _few_rows(value, limits, place)
    if choice.name == "split" and value > limits.context:
        return f"a context of {limits.context} tokens is less than one split"
    if isinstance(place, Level):
        return _cpu_rule(choice.name, value, phase, program)
    return _gpu_rule(choice.name, value, program, place)


def _few_rows(value: int, limits: Limits, place: Level | Machine) -> str:
    if isinstance(place, Machine):
        return "the model is of one row, and knows no price of the others" if value else ""
    if value and value <= limits.drafts:
        return f"{limits.drafts} drafts and the token before them are to be among the few"
    if value == limits.few_rows or value > limits.rows:
        return f"compiled for {limits.few_rows} of {limits.rows} rows"
    return ""


def _cpu_rule(name: str, value: int, phase: Phase | None, program: Program) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if name == "threads" and value > cores:
        return f"this machine has {cores} cores: workers that share one wait for each other"
    if name == "block" and any(p.anchor_kind == "experts" for g in program.graphs for p in g.phases):
        return f"experts gather {GATHERED} rows at a time"
    if name == "fetch" and phase is not None:
        least = min(part_bytes(phase, part) for part in parts(phase)) // cores
        if value >= least:
            return f"a worker's share of the matrix is {least} bytes"
    return ""


def _gpu_rule(name: str, value: int, program: Program, machine: Machine) -> str:
    dense = [w for w in _linear_formats(program) if isinstance(reader(w), DenseReader)]
    if name in ("warps", "chunk") and dense and value != CHOICES[name].default:
        return f"lines of {', '.join(dense)} are dealt out to the threads of {CHOICES['warps'].default} warps"
    if name == "chunk" and (size := _chunk_limit(program, value)):
        return size
    if name in ("chunk", "ring"):
        chunk = value if name == "chunk" else CHOICES["chunk"].default
        room = ring_room(program, chunk, machine)
        least = 2 if name == "chunk" else value
        if room < least:
            return f"shared memory of {machine.name} has room for {room} chunks of {chunk} blocks"
    return ""


def _chunk_limit(program: Program, chunk: int) -> str:
    """A chunk that the generator would cut down is the same as a smaller one."""
    kept = {n: reader(n).chunk_blocks(chunk) for n in _linear_formats(program)}
    cut = [n for n, blocks in kept.items() if blocks < chunk and not isinstance(reader(n), DenseReader)]
    return f"{chunk} blocks of {', '.join(cut)} are more than a chunk holds ({CHUNK_BYTES >> 10} KiB)" if cut else ""


def _linear_formats(program: Program) -> list[str]:
    phases = (p for g in program.graphs for p in g.phases if p.anchor_kind == "linear")
    return list(dict.fromkeys(part_weight(part).tensor.dtype for p in phases for part in parts(p)))


def ring_room(program: Program, chunk: int, machine: Machine) -> int:
    """Chunks of up to so many blocks that fit into a machine's ring; 0: not even two do."""
    sizes = [packed_body_bytes(FORMATS[n], BLOCK_K * reader(n).chunk_blocks(chunk)) for n in _linear_formats(program)]
    try:
        return stages(-(-(max(sizes) + PIECE) // 128) * 128, machine.shared_bytes_per_block)
    except CompileError:
        return 0


def clash(tuning: Tuning, program: Program, limits: Limits, place: Level | Machine) -> str:
    """Why values that are each allowed are not together; empty: they are."""
    return next(_clashes(tuning, program, limits, place), "")


def _clashes(tuning: Tuning, program: Program, limits: Limits, place: Level | Machine) -> Iterator[str]:
    if isinstance(place, Level):
        panel = tuning["panel"] or (4 if place.number == 2 else 2)
        if tuning["block"] % panel or tuning["block"] <= max(panel, PANEL_USUAL[place.number]):
            yield f"a block of {tuning['block']} rows is not whole panels of {panel}"
        return
    lanes, threads = 8 * tuning["chunk"], 32 * tuning["warps"]
    if lanes < threads:
        yield f"a chunk of {tuning['chunk']} blocks is work for {lanes} threads, a block has {threads}"
    room = ring_room(program, tuning["chunk"], place)
    if tuning["ring"] > room and tuning["ring"] != CHOICES["ring"].default:
        yield f"shared memory of {place.name} has room for {room} chunks of {tuning['chunk']} blocks"


