"""Compare every phase of every layer with its ops' reference, on the inputs the compiled step gave it.

The step's table for one worker is cut into phases, and each piece runs as a step of its own: between two pieces
all values that phases exchange lie in the workspace, where they are compared. A phase's reference starts from
the compiled values of its inputs, so errors do not add up and the phase that is wrong is the one named. What
the kernel rounds by design (activations to 8 bits or bf16 before a matrix) the reference rounds as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ...codegen.cpu.render import render_step
from ...ir.access import stored
from ...ir.bodies import attend_splits
from ...ir.graph import Graph, Program
from ...ir.limits import PAGE_RUN, PAGE_TOKENS, PARTIAL_HEADER, partial_floats
from ...ir.op import Op
from ...ir.ops import Append, Attend, MatrixOp
from ...ir.phases import STATE_WRITERS, Phase
from ...ir.reference import KvCache, RowBatch
from ...ir.schedule import BUCKETS, Schedule, panel_kind
from ...ir.table import END, FIELDS, cache_groups, lower
from ...ir.types import OUTPUTS, CacheType, TensorType, Value
from ...runtime import Artifact
from ...runtime.cache import Cache, page_counts
from ...runtime.cpu import CpuBackend
from ...runtime.memory import Memory
from ..artifact import stack_tables
from ..driver import silent
from ..lowering import Dump, lower_program
from ..reports.artifact import sources
from ..weights import packed_weights, weight_plan
from .reference_weights import ReferenceWeights
from .rounding import has_bf16_dot, rounded
from .verify import Check, closeness

# Most relative error of a phase by its anchor: an int8 code that rounds the other way costs the matrix behind it up
# to 2e-3; attention reads queries and probabilities as bf16 when the cache is.
LIMITS = {"rows": 1e-5, "linear": 5e-3, "experts": 5e-3}
ATTEND_LIMITS = {"bf16": 1e-2, "f32": 1e-4}
MANY_ROWS = 5  # rows beyond `few_rows` that the second bucket is tried with
WAITS = [FIELDS.index(name) for name in ("wait0", "wait1", "signal")]

Piece = tuple[Graph, int, Phase, int, int]  # graph, layer, phase, records first..last-1


@torch.no_grad()
def check_phases(artifact: Artifact, program: Program, weights: ReferenceWeights, tokens: list[int]) -> Check:
    """Both row buckets, every layer. Not done if this version would generate other code for the artifact."""
    manifest = artifact.manifest
    target = artifact.pick_target()
    lowered = lower_program(program, manifest.limits, [1], Dump(), silent)
    assert lowered is not None
    schedules = lowered.schedules[1]
    source = render_step(schedules, target.level)
    now = {f"kernels/{target.name}/{name}.cpp": text for name, text in source.units.items()}
    if not now.items() <= dict(sources(artifact)).items():
        return Check("phases", None, "this onelaunch would generate other code: compile again to compare phases")
    plan = weight_plan(packed_weights(program))
    tables = {b: lower(s, source.bodies[b], plan) for b, s in schedules.items()}
    rows: list[dict[str, Any]] = []
    for bucket, schedule in schedules.items():
        count = _row_count(schedule, len(tokens))
        if count:
            stepper = Stepper(artifact, schedules, tables, bucket, (tokens * count)[:count])
            rows += _Comparison(stepper, schedule, weights, has_bf16_dot(target)).run()
            stepper.close()
    return _verdict(rows, {**LIMITS, "attend": ATTEND_LIMITS[manifest.limits.kv_dtype]})


def _row_count(schedule: Schedule, available: int) -> int:
    """Rows to try a bucket with; 0 if it is never used."""
    limits = schedule.limits
    few = min(limits.few_rows, limits.rows, limits.context)
    if schedule.bucket == BUCKETS[0]:
        return min(few, max(2, available))
    wanted = min(limits.rows, limits.context, limits.few_rows + MANY_ROWS)
    return wanted if wanted > limits.few_rows else 0


def _verdict(rows: list[dict[str, Any]], limits: Mapping[str, float]) -> Check:
    bad = [r for r in rows if not r["relative_rmse"] <= limits[r["anchor"]]]
    worst = {kind: max((r["relative_rmse"] for r in rows if r["anchor"] == kind), default=0.0) for kind in limits}
    listed = ", ".join(f"{kind} {error:.1e} (at most {limits[kind]:.0e})" for kind, error in worst.items())
    detail = f"{len(rows)} values compared; worst relative error: {listed}"
    if bad:
        r = bad[0]
        place = f"`{r['section']}.{r['phase']}`" + (f" of layer {r['layer']}" if r["layer"] >= 0 else "")
        detail += f"; {len(bad)} wrong, first `{r['value']}` of {place}, {r['bucket']} rows: {r['relative_rmse']:.3f}"
    return Check("phases", not bad, detail, rows)


class Stepper:
    """An artifact's kernels on one worker, one phase at a time, over rows of slot 0 from position 0."""

    def __init__(
        self,
        artifact: Artifact,
        schedules: Mapping[str, Schedule],
        tables: Mapping[str, np.ndarray],
        bucket: str,
        tokens: list[int],
    ) -> None:
        self.schedule, self.tokens = schedules[bucket], tokens
        self.index, self.table = BUCKETS.index(bucket), tables[bucket][0].copy()
        self.table[:, WAITS] = -1  # one worker in order has nothing to wait for
        manifest, target = artifact.manifest, artifact.pick_target()
        counts = page_counts(manifest.caches, manifest.limits, max(64, len(tokens)))
        self.memory = Memory.allocate(manifest, stack_tables(dict(tables)), artifact.verify(), counts)
        self.backend = CpuBackend(artifact.library(target), target, manifest, self.memory)
        cache = Cache(manifest.caches, counts, self.backend.state.pages, manifest.limits.context)
        cache.take(0, len(tokens))
        self.outputs = min(len(tokens), manifest.limits.outputs)
        self._write_rows()

    def _write_rows(self) -> None:
        state, n, m = self.backend.state, len(self.tokens), self.outputs
        state.row_token[:n], state.row_slot[:n], state.row_position[:n] = self.tokens, 0, np.arange(n)
        state.row_output[:n] = -1
        state.row_output[n - m : n] = np.arange(m)
        state.output_row[:m] = np.arange(n - m, n)
        state.slot_top_p[0] = state.slot_penalty[0] = 1.0
        state.slot_stop[0] = -1
        state.n_rows[0], state.n_outputs[0] = n, m

    @property
    def batch(self) -> RowBatch:
        n = len(self.tokens)
        return RowBatch.of([(t, 0, i) for i, t in enumerate(self.tokens)], range(n - self.outputs, n))

    def pieces(self) -> Iterator[Piece]:
        """The records of the table phase by phase, as `ir/table.py` lists them."""
        record, program = 0, self.schedule.program
        for graph, layer in program.sections():
            if program.model_of(graph) is not program:
                return  # a draft model decides no text, and its rows are not those of the step
            tasks = [task.phase for task in self.schedule.section(graph.name).queues[0]]
            for phase in graph.phases:
                yield graph, layer, phase, record, record + tasks.count(phase.name)
                record += tasks.count(phase.name)

    def run(self, first: int, last: int) -> None:
        """Run records first..last-1 as a step."""
        table = self.memory.tables[self.index, 0]
        table[: last - first] = self.table[first:last]
        table[last - first, 0] = END
        self.backend.step()

    def value(self, graph: Graph, value: Value, known: Mapping[str, Any]) -> np.ndarray:
        """What the workspace holds of a value, [rows or outputs, .., width]; `known`: weights by name, for sinks."""
        count = self.outputs if value.tensor.shape[0] == OUTPUTS else len(self.tokens)
        buffer = self.schedule.buffer(graph.name, value.name)
        raw = self.memory.workspace[buffer.offset : buffer.offset + count * buffer.row_bytes].view(np.float32)
        op = graph.producer(value)
        if isinstance(op, Attend):
            return self._combined(op, raw.reshape(count, -1), known[op.sinks.name].numpy() if op.sinks else None)
        rows = raw.reshape(count, *map(int, value.tensor.shape[1:-1]), -1)
        return rows[..., : value.tensor.width].copy()

    def keys_values(self, kind: CacheType, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """What the cache holds of the rows, both [rows, kv_heads, head_dim]; tiles as codegen's kv_cache.h has them."""
        program, memory = self.schedule.program, self.memory
        groups = cache_groups(program)
        g = next(i for i, group in enumerate(groups) if layer in group.layers)
        dtype, per = (ml_dtypes.bfloat16, 2) if self.schedule.limits.kv_dtype == "bf16" else (np.float32, 1)
        pages = self.backend.state.pages[g, 0, : -(-len(self.tokens) // PAGE_TOKENS)]
        pool = memory.pool(g, len(groups[g].layers) * kind.kv_heads)
        first = groups[g].layers.index(layer) * kind.kv_heads
        tiles = pool[:, first : first + kind.kv_heads][pages // PAGE_RUN, :, pages % PAGE_RUN]  # [pages, heads, bytes]
        tiles = np.ascontiguousarray(tiles).view(dtype).astype(np.float32)
        k, v = np.split(tiles, 2, axis=2)
        shape = (len(pages), kind.kv_heads)
        k = k.reshape(*shape, -1, PAGE_TOKENS, per).transpose(0, 3, 1, 2, 4)
        v = v.reshape(*shape, PAGE_TOKENS // per, -1, per).transpose(0, 2, 4, 1, 3)
        n, d = len(self.tokens), kind.head_dim
        return tuple(x.reshape(-1, kind.kv_heads, k.shape[3] * per)[:n, :, :d].copy() for x in (k, v))  # type: ignore[return-value]

    def _combined(self, op: Attend, rows: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
        """Attention partials divided by their sums; positions are below one split, so each row has one."""
        cache = op.kv.cache
        splits = attend_splits(self.schedule.limits, cache.window, self.schedule.bucket)
        size = partial_floats(cache.head_dim)
        parts = rows.reshape(len(rows), -1, splits, size)[:, :, 0]
        total = parts[:, :, 1:2]
        if sinks is not None:  # powers of two, as the scores were
            total = total + np.exp2(sinks[:, None] / np.log(np.float32(2)) - parts[:, :, :1])
        values = parts[:, :, PARTIAL_HEADER : PARTIAL_HEADER + cache.head_dim] / total
        return values.reshape(len(rows), -1)

    def close(self) -> None:
        self.backend.close()


@dataclass
class _Comparison:
    """Runs the pieces and evaluates each phase beside it."""

    stepper: Stepper
    schedule: Schedule
    weights: ReferenceWeights
    bf16_dot: bool

    def run(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        carried: dict[str, Any] = {"rows": self.stepper.batch}
        values: dict[str, Any] = {}
        before = ("", -1)
        for graph, layer, phase, first, last in self.stepper.pieces():
            if (graph.name, layer) != before:
                values = self._begin(graph, layer, carried, values)
                before = (graph.name, layer)
            self.stepper.run(first, last)
            if phase.anchor_kind in ("sample", *STATE_WRITERS):
                continue
            found += self._compare(graph, layer, phase, values)
            if graph.name == self.schedule.program.entry.name:
                carried |= {r.name: values[r.name] for r in graph.results if r.name in values}
        return found

    def _begin(self, graph: Graph, layer: int, carried: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """The values a section starts with: the running activation, what the entry left, weights, an empty cache."""
        values = dict(carried)
        free = [p for p in graph.params if isinstance(p.type, TensorType) and not p.is_weight]
        previous = self._section_before(graph, layer)
        if free and previous is not None:
            values[free[0].name] = before[previous.results[0].name]
        if graph.cache is not None:
            bf16 = self.schedule.limits.kv_dtype == "bf16"
            values[graph.cache.name] = KvCache.empty(graph.cache.cache, 1, len(self.stepper.tokens), bf16)
        prefix = f"{layer}." if layer >= 0 else ""
        return values | {w.name: self.weights[prefix + w.name[2:]] for w in graph.weights}

    def _section_before(self, graph: Graph, layer: int) -> Graph | None:
        program = self.schedule.program
        if graph.name == program.entry.name:
            return None
        index = layer if layer >= 0 else len(program.layers)
        return program.kind(program.layers[index - 1]) if index else program.entry

    def _compare(self, graph: Graph, layer: int, phase: Phase, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Evaluate a phase; what it stored is replaced by the compiled values for the phases that follow."""
        kept, found = stored(graph, phase), []
        for op in phase.ops:
            values[op.out.name] = op.reference(*self._operands(op, values))
        place = {"bucket": self.schedule.bucket, "section": graph.name, "layer": layer, "phase": phase.name}
        place["anchor"] = phase.anchor_kind
        for op in phase.ops:
            name = op.out.name
            if isinstance(op, Append):
                cache, (k, v) = values[name], self.stepper.keys_values(op.kv.cache, layer)
                found.append({**place, "value": f"{name}.k", **closeness(k, cache.keys[0].numpy())})
                found.append({**place, "value": f"{name}.v", **closeness(v, cache.values[0].numpy())})
                values[name] = KvCache(torch.from_numpy(k)[None], torch.from_numpy(v)[None], cache.bf16)
            elif name in kept and op.out.tensor.dtype == "f32":
                got = self.stepper.value(graph, op.out, values)
                found.append({**place, "value": name, **closeness(got, values[name].numpy())})
                values[name] = torch.from_numpy(got)
        return found

    def _operands(self, op: Op, values: Mapping[str, Any]) -> list[Any]:
        found = [values[v.name] for v in op.operands]
        if isinstance(op, MatrixOp):
            found[0] = rounded(found[0], panel_kind(op.weight), self.bf16_dot)
        return found
