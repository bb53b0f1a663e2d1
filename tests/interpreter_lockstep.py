"""The generated kernel and the Python VM side by side, one record of the task table at a time.

The kernel runs with one program and a table of one record; the VM runs the same record by the ops' own
`reference`. What the record wrote is compared, then both go on from the same values: errors do not add up, so each
body is held to what its own rounding may cost. A record must change nothing but its own buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from interpreter_step import InterpretedStep, set_rows

from onelaunch.ir.graph import Graph, Program
from onelaunch.ir.limits import PAGE_RUN, PAGE_TOKENS, PARTIAL_HEADER, Limits, partial_floats
from onelaunch.ir.ops import Append, Attend
from onelaunch.ir.phases import Phase
from onelaunch.ir.schedule import padded, panel_row_bytes, panel_rows
from onelaunch.ir.table import ARGS, END, FIELDS, RECORD_WORDS, Arg
from onelaunch.ir.types import OUTPUTS, Value
from onelaunch.ir.vm import VirtualMachine
from onelaunch.models.importer import Imported

PANEL_TYPES = {"bf16": ml_dtypes.bfloat16, "f32": np.float32}
# Arguments in whose buffers a body writes, besides `out.VALUE`.
WRITTEN = ("panel", "unit", "gather", "scratch", "out", "logits")
LN2 = math.log(2.0)


@dataclass(frozen=True)
class Compared:
    """How far a record's result is from the reference: the largest difference in a row over its largest value."""

    kind: str  # `pack.KIND`, `tiles`, `pairs`, `heads`, `append`, `attend`, `rows`
    title: str
    error: float


class Lockstep:
    """One model with one worker: `step` is the generated kernel, `machine` the VM. Caches start random, and alike."""

    def __init__(self, imported: Imported, limits: Limits, seed: int = 0) -> None:
        self.step = InterpretedStep(imported, limits, 1)
        self.machine = VirtualMachine(self.step.schedules, self.step.weights)
        self.limits = limits
        self.step.state.pages[:] = self.machine.state.pages
        random = torch.Generator().manual_seed(seed)
        for group, cache in enumerate(self.machine.caches):
            for half, pool in (("k", cache.keys), ("v", cache.values)):
                values = torch.randn(pool.shape, generator=random)
                pool.copy_(values.bfloat16().float() if cache.bf16 else values)
                for page in range(pool.shape[1]):
                    self._tile(group, page)[..., self._places(group, half)] = pool[:, page].transpose(1, 2).numpy()

    def set_rows(self, rows: list[tuple[int, int, int]], outputs: list[int]) -> None:
        """Begin a step: its rows, (token, slot, position) each, and which want logits; no value is left of the last."""
        for state in (self.step.state, self.machine.state):
            set_rows(state, rows, outputs)
        self.machine.space.poison()
        self.step.workspace[:] = np.nan
        for control in self.step.control.values():
            control[:] = 0

    def put_logits(self, logits: np.ndarray, model: Program | None = None) -> None:
        """Give both the logits [outputs, vocab] of the step, or of a model in it, and the VM the maxima of them."""
        model = model or self.machine.program
        last, value = model.exit, model.logits
        start, tiles = self._offset(last, value.name), padded(value.tensor.width) // 32
        n, width = logits.shape
        maxima = self.machine.space.rows(self._offset(last, f"{value.name}.max"), n, tiles, tiles)
        for floats in (self.step.workspace, self.machine.space.floats):
            pitch = padded(width)
            floats[start // 4 : start // 4 + n * pitch].reshape(n, pitch)[:, :width] = logits
        wide = np.pad(logits, ((0, 0), (0, tiles * 32 - width)), constant_values=-np.inf)
        maxima[:] = torch.from_numpy(wide.reshape(n, tiles, 32).max(-1))

    # ---- one record -------------------------------------------------------------------------

    def records(self) -> Iterator[tuple[int, str, str]]:
        """Number, anchor kind and body name of every record of the step that the rows ask for."""
        table = self.machine.tables[self.step.bucket]
        for i, record in enumerate(table.records[0].tolist()):
            if record[0] != END:
                _, phase, body, _ = table.bodies[record[0]]
                yield i, phase.anchor_kind, body

    def run_both(self, number: int) -> None:
        """A record on both; AssertionError if the kernel changes memory that is not its own."""
        theirs = self.machine.tables[self.step.bucket]
        graph, phase, body, named = theirs.bodies[theirs.records[0, number, 0]]
        if phase.anchor_kind == "attend":
            self._before_attend(graph, phase)
        before = self.step.workspace.view(np.uint32).copy()
        table = np.full((1, 2, RECORD_WORDS), END, np.int32)
        table[0, 0] = self.step.tables[self.step.bucket][0, number]
        table[0, 0, [FIELDS.index("wait0"), FIELDS.index("wait1")]] = -1  # whoever would signal may not have run
        self.step.run(table=table, whole=False)
        self.machine._run(theirs, theirs.records[0, number].tolist())
        changed = np.flatnonzero(self.step.workspace.view(np.uint32) != before)
        for name, arg in named.items():
            if name in WRITTEN or name.startswith("out."):
                buffer = self.step.schedules[self.step.bucket].buffer(graph.name, arg.name)
                inside = (changed >= buffer.offset // 4) & (changed < (buffer.offset + buffer.size) // 4)
                changed = changed[~inside]
        assert not changed.size, f"{graph.name}.{phase.name}.{body} wrote words {changed[:8]} that are not its own"

    def _before_attend(self, graph: Graph, phase: Phase) -> None:
        """Splits that no row has stay not-a-number; queries are what a bf16 kernel rounds them to."""
        op = phase.anchor[0]
        assert isinstance(op, Attend)
        buffer = self.step.schedules[self.step.bucket].buffer(graph.name, op.out.name)
        n, width = self._count(op.q), op.q.tensor.width
        for floats in (self.step.workspace, self.machine.space.floats):
            floats[buffer.offset // 4 : (buffer.offset + buffer.size) // 4] = np.nan
            if self.limits.kv_dtype == "bf16":
                start, scale = self._offset(graph, op.q.name) // 4, np.float32(op.scale / LN2)
                q = floats[start : start + n * padded(width)].reshape(n, -1)[:, :width]
                q[:] = (q * scale).astype(ml_dtypes.bfloat16).astype(np.float32) / scale

    def compare(self, number: int) -> list[Compared]:
        """What a record wrote against what it should have; the VM and the kernel then hold the same values."""
        theirs = self.machine.tables[self.step.bucket]
        record = theirs.records[0, number].tolist()
        graph, phase, body, named = theirs.bodies[record[0]]
        numbers = dict(zip(named, record[ARGS:], strict=False))
        found = []
        if body.startswith("pack."):
            found.append((body, self._panel(phase, body, graph, named["panel"])))
        elif phase.anchor_kind == "attend":
            found.append(("attend", self._partials(graph, phase, numbers)))
        for name in named:
            if name.startswith("out."):
                value = next(op.out for op in phase.ops if op.out.name == name[4:])
                kind = {"linear": phase.layout, "experts": "experts"}.get(phase.anchor_kind, "rows")
                found.append((kind, self._value(graph, value)))
        if "group" in named and phase.anchor_kind == "linear":
            half = self._half(phase, body)
            found.append(("append", self._appended(half, numbers["group"], record[FIELDS.index("layer")])))
        return [Compared(kind, f"{graph.name}.{phase.name}.{body}", error) for kind, error in found]

    # ---- what it wrote ----------------------------------------------------------------------

    def _count(self, value: Value) -> int:
        state = self.step.state
        return int((state.n_outputs if value.tensor.shape[0] == OUTPUTS else state.n_rows)[0])

    def _offset(self, graph: Graph, name: str) -> int:
        return self.step.schedules[self.step.bucket].buffer(graph.name, name).offset

    def _value(self, graph: Graph, value: Value) -> float:
        n, pitch = self._count(value) * panel_rows(value), padded(value.tensor.width)
        start = self._offset(graph, value.name) // 4
        got = self.step.workspace[start : start + n * pitch].reshape(n, pitch)[:, : value.tensor.width]
        wanted = self.machine.space.rows(start * 4, n, value.tensor.width).numpy()
        error = _error(got, wanted)
        got[:] = wanted
        return error

    def _panel(self, phase: Phase, body: str, graph: Graph, arg: Arg) -> float:
        """Rows, and zeros up to the next 32 columns: products with the padding of weights must be zero."""
        x, kind = phase.anchor[0].operands[0], body.removeprefix("pack.")
        n, width, pitch = self._count(x) * panel_rows(x), x.tensor.width, padded(x.tensor.width)
        start, size = self._offset(graph, arg.name), panel_row_bytes(kind, width)
        memory = self.step.workspace.view(np.uint8)[start:]
        if kind == "q8":
            got = _quantised(memory[: n * pitch // 32 * 48].reshape(n, pitch // 32, 48))
        else:
            got = memory.view(PANEL_TYPES[kind])[: n * pitch].reshape(n, pitch).astype(np.float32)
        wanted = self.machine.space.panel(start, size, n, width)
        wanted[wanted.isnan().all(-1)] = 0  # of experts that a row does not have: the kernel makes zeros
        self.machine.space.put_panel(start, size, range(n), torch.from_numpy(got[:, :width]))
        return _error(got, torch.nn.functional.pad(wanted, (0, pitch - width)).numpy())

    def _partials(self, graph: Graph, phase: Phase, numbers: dict[str, int]) -> float:
        """Maximum (the kernel's in base 2), sum and outputs of every live split."""
        op = phase.anchor[0]
        assert isinstance(op, Attend)
        d, start = op.kv.cache.head_dim, self._offset(graph, op.out.name) // 4
        count = self._count(op.out) * op.q.tensor.width // d * numbers["splits"]
        views = (x[start : start + count * partial_floats(d)].reshape(count, -1)
                 for x in (self.step.workspace, self.machine.space.floats))  # fmt: skip
        mine, theirs = ([x[:, 0], x[:, 1], x[:, PARTIAL_HEADER : PARTIAL_HEADER + d]] for x in views)
        error = max(_error(mine[0] * np.float32(LN2), theirs[0]), *map(_error, mine[1:], theirs[1:]))
        theirs[0][:], theirs[1][:], theirs[2][:] = mine[0] * np.float32(LN2), mine[1], mine[2]
        return error

    def _half(self, phase: Phase, body: str) -> str:
        append = next(op for op in phase.epilogue if isinstance(op, Append))
        made = {body} | {op.out.name for a in phase.anchor if a.out.name == body for op in phase.epilogue_of(a)}
        return "k" if append.k.name in made else "v"

    def _tile(self, group: int, page: int) -> np.ndarray:
        """A page's tiles in the kernel's pool: a view [layers, kv heads, elements]."""
        kind, layers = self.step.groups[group].type, len(self.step.groups[group].layers)
        pool = self.step.kv[group].view(ml_dtypes.bfloat16 if self.limits.kv_dtype == "bf16" else np.float32)
        size = 2 * PAGE_TOKENS * padded(kind.head_dim, 16)
        runs = pool.reshape(-1, layers, kind.kv_heads, PAGE_RUN, size)
        return runs[page // PAGE_RUN, :, :, page % PAGE_RUN]

    def _places(self, group: int, half: str) -> np.ndarray:
        """Where a tile of 64 tokens holds element d of token t, [t, d].

        f32: K [d][t], then V [t][d]. bf16, in words of two: K [d / 2][t][2], then V [t / 2][d][2].
        """
        head_dim = self.step.groups[group].type.head_dim
        dim, t, d = padded(head_dim, 16), np.arange(PAGE_TOKENS)[:, None], np.arange(head_dim)
        if self.limits.kv_dtype == "f32":
            return d * PAGE_TOKENS + t if half == "k" else PAGE_TOKENS * dim + t * dim + d
        if half == "k":
            return d // 2 * 2 * PAGE_TOKENS + t * 2 + d % 2
        return PAGE_TOKENS * dim + t // 2 * 2 * dim + d * 2 + t % 2

    def _appended(self, half: str, group: int, layer: int) -> float:
        """The whole layer's keys or values: what is there already must stay."""
        cache = self.machine.caches[group]
        wanted = (cache.keys if half == "k" else cache.values)[layer]
        places = self._places(group, half)
        tiles = [self._tile(group, page)[layer][..., places] for page in range(len(wanted))]
        got = np.stack(tiles).astype(np.float32).transpose(0, 2, 1, 3)
        error = _error(got.reshape(-1, got.shape[-1]), wanted.reshape(-1, got.shape[-1]).numpy())
        wanted.copy_(torch.from_numpy(got))
        return error


def _error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference in a row over the row's largest value; infinite where only one is not-a-number."""
    if not (np.isnan(got) == np.isnan(wanted)).all():
        return math.inf
    got, wanted = np.nan_to_num(got), np.nan_to_num(wanted)
    return float((np.abs(got - wanted).max(-1) / np.maximum(np.abs(wanted).max(-1), 1e-20)).max())


def _quantised(blocks: np.ndarray) -> np.ndarray:
    """Values of int8 panel rows [n, blocks, 48 bytes]: 32 codes, a float32 scale, what follows from these."""
    codes = blocks[..., :32].view(np.int8).astype(np.int32)
    scale = blocks[..., 32:36].copy().view(np.float32)
    halves = blocks[..., 36:44].copy().view(np.int32)
    assert (halves == codes.reshape(*codes.shape[:2], 2, 16).sum(-1)).all()
    assert (
        blocks[..., 44:48].copy().view(np.float32) == scale * halves.sum(-1, keepdims=True).astype(np.float32)
    ).all()
    return (codes * scale).astype(np.float32).reshape(len(blocks), -1)
