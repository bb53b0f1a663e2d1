"""Tiny models of any weight format, and their generated step with its memory on the host, interpreted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from interpreter import load_interpreted
from interpreter_grid import launch

from onelaunch.codegen.triton.render import STREAMED, Source, render_kernel
from onelaunch.compiler.check.reference_weights import ReferenceWeights
from onelaunch.compiler.weights import pack_one, packed_weights, weight_plan
from onelaunch.ir.formats import FORMATS, Format, decode, planes, quantize
from onelaunch.ir.graph import Graph, Program
from onelaunch.ir.limits import Limits, kv_pool_bytes, kv_tile_bytes, state_fields
from onelaunch.ir.ops import Attend
from onelaunch.ir.reference import Slot
from onelaunch.ir.schedule import BUCKETS, Schedule
from onelaunch.ir.stream import streams
from onelaunch.ir.table import CacheGroup, cache_groups, lower
from onelaunch.ir.vm.memory import State
from onelaunch.models.importer import Imported, family_text, import_checkpoint
from onelaunch.models.random import random_checkpoint
from onelaunch.passes import GRAPH_PASSES, SCHEDULE_PASSES, Options, schedule
from onelaunch.tests.disk_rows import set_scales

FAMILY_HYPER: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "tied": False},
    "gemma3": {
        "qk_norm": True, "norm_plus_one": True, "activation": "gelu_tanh", "embed_scale": 8.0, "window": 24,
        "layer_kinds": ("local", "global"),
    },
    "qwen2_moe": {"qkv_bias": True, "experts": 6, "experts_used": 3, "norm_topk": 0},
    "qwen3_moe": {"qk_norm": True, "experts": 12, "experts_used": 2},
    "mixtral": {"experts": 3, "experts_used": 3},
    "gpt_oss": {"experts": 5, "experts_used": 3, "window": 24, "layer_kinds": ("local", "global")},
}  # fmt: skip
SIZES = {
    "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 96, "vocab": 120, "moe_ffn": 96,
    "shared_ffn": 64,
}  # fmt: skip
K_SIZES = {
    "hidden": 256,
    "head_dim": 64,
    "ffn": 256,
    "moe_ffn": 256,
    "shared_ffn": 256,
}  # formats whose blocks share scales need these
STALE = 0x47  # as bytes of float32 or bf16: about 51,000
GAIN = 3.0  # of matrices that follow a norm: attention looks somewhere, and greedy text does not settle


@cache
def random_model(family: str, fmt: str = "f32", seed: int = 0, softcap: float = 0.0, **sizes: Any) -> Imported:
    """A model whose matrices the checkpoint holds in `fmt`, all values random."""
    least = max(FORMATS[fmt].disk_block, 32 * FORMATS[fmt].packed_blocks)
    wide = K_SIZES if least > 64 else {"ffn": 128, "moe_ffn": 128} if least > 32 else {}
    made = random_checkpoint(family_text(family), {**FAMILY_HYPER[family], **SIZES, **wide, **sizes}, seed)
    tensors = {n: dataclasses.replace(t, format=fmt) if len(t.shape) > 1 else t for n, t in made.tensors.items()}
    number = {name: i for i, name in enumerate(tensors)}

    def read(name: str) -> np.ndarray:
        info, values = tensors[name], made.read(name)
        if len(info.shape) == 1:
            return values
        values = values * np.float32(GAIN) if "proj" in name else values
        return stored(FORMATS[fmt], values, np.random.default_rng([seed, number[name]]))

    imported = import_checkpoint(dataclasses.replace(made, tensors=tensors, read=read))
    if not softcap:
        return imported

    def capped(graph: Graph) -> Graph:
        change = {op: dataclasses.replace(op, softcap=softcap) for op in graph.ops if isinstance(op, Attend)}
        return dataclasses.replace(graph, ops=tuple(change.get(op, op) for op in graph.ops))

    return dataclasses.replace(imported, program=imported.program.map(capped))


def stored(fmt: Format, values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Values [.., N, K] as the checkpoint holds them; where no quantizer exists, random codes of the same spread."""
    if values.ndim == 3:
        return np.stack([stored(fmt, v, random) for v in values])
    n, k = values.shape
    if fmt.dense and not fmt.trailer:
        return values.astype(fmt.record)
    if fmt.name in ("q4_0", "q8_0"):
        return quantize(fmt, values)
    raw = random.integers(0, 256, (n, fmt.row_bytes(k)), np.uint8)
    if fmt.dense and not fmt.floats:
        elements = random.standard_normal((n, k)).astype(fmt.record)
        raw[:, : fmt.body_bytes(k)] = elements.view(np.uint8)
    ones = {"e8m0": 127, "e4m3": 0x38}
    set_scales(fmt, raw, k, lambda field, dtype, shape: np.full(shape, 0 if field == "m" else ones.get(dtype, 1)))
    found = decode(fmt, raw, k)
    step, below = values.std() / found.std(), -found.mean() * values.std() / found.std()
    if fmt.level("sub_m"):
        below /= -planes(fmt, raw, k).scales["sub_m"].mean()

    def give(field: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        if dtype == "e8m0":
            return 127 + np.log2(step).round() + random.integers(-1, 2, shape)
        if dtype == "e4m3":
            return random.integers(0x30, 0x40, shape)
        return np.full(shape, below) if field == "m" else step * random.uniform(0.8, 1.2, shape)

    set_scales(fmt, raw, k, give)
    return raw


def fused(program: Program) -> Program:
    for _, change in GRAPH_PASSES:
        program = program.map(lambda g, c=change: c(g, Options())).verify()
    return program


def schedules(program: Program, limits: Limits, workers: int) -> dict[str, Schedule]:
    """Every bucket's schedule of a fused program."""
    made = {b: schedule(program, limits, b, workers) for b in BUCKETS}
    for _, change in SCHEDULE_PASSES:
        made = {b: change(s) for b, s in made.items()}
    return made


class InterpretedStep:
    """The generated step of one model and its memory, as a host sees them.

    To plant faults: `broken` schedules in place of the compiler's, an `edit` of the generated text; `tables` may be
    replaced afterwards.
    """

    def __init__(
        self,
        imported: Imported,
        limits: Limits,
        workers: int,
        broken: dict[str, Schedule] | None = None,
        edit: Callable[[str], str] = str,
    ) -> None:
        self.imported, self.limits, self.workers = imported, limits, workers
        program = fused(imported.program)
        self.schedules = broken or schedules(program, limits, workers)
        self.weights = ReferenceWeights(imported, program)
        self.source: Source = render_kernel(self.schedules)
        self.module = load_interpreted(edit(self.source.text))
        packed = packed_weights(program)
        plan = weight_plan(packed)
        self.packed = np.concatenate([pack_one(w, imported) for w in packed])
        chunks = self.source.chunk_blocks.get
        self.tables = {b: lower(s, self.source.bodies[b], plan, None, chunks) for b, s in self.schedules.items()}
        self.stream = streams(self.schedules[STREAMED], plan, self.source.chunk_blocks.get)
        self.groups = cache_groups(program)
        self.state = State(state_fields(limits, program.logits.tensor.width, len(self.groups), program.routing))
        self.workspace = np.zeros(max(s.workspace_bytes for s in self.schedules.values()) // 4, np.float32)
        self.control = {b: np.zeros(self.source.control_words, np.int32) for b in BUCKETS}
        self.kv = [np.zeros(self._kv_bytes(g), np.uint8) for g in self.groups]
        self.reset()

    def _kv_bytes(self, group: CacheGroup) -> int:
        page = len(group.layers) * group.type.kv_heads * kv_tile_bytes(group.type.head_dim, self.limits)
        return kv_pool_bytes(self.limits.slots * self.limits.pages, page)

    def reset(self) -> None:
        """Memory as a long-running process has it: a cache full of another sequence's values, pages out of order."""
        self.state.bytes[:] = 0
        for control in self.control.values():
            control[:] = 0
        for kv in self.kv:
            kv[:] = STALE
        pages, slots = self.limits.pages, self.limits.slots
        for slot in range(slots):
            self.state.pages[:, slot] = np.arange(pages)[::-1] * slots + slot
        for slot in range(slots):
            start_slot(self.state, slot, Slot(limit=self.limits.context), self.limits)

    @property
    def bucket(self) -> str:
        return "few" if self.state.n_rows[0] <= self.limits.few_rows else "many"

    def prompt(self, tokens: list[int], slot: int = 0) -> None:
        """Make a prompt the rows of the next step."""
        set_rows(self.state, [(t, slot, i) for i, t in enumerate(tokens)], [len(tokens) - 1])

    def run(self, seed: int = 0, table: np.ndarray | None = None, whole: bool = True) -> None:
        """One launch. `whole`: a step of its own, in which whatever is read of the workspace must be written."""
        bucket = self.bucket
        table = np.ascontiguousarray(self.tables[bucket] if table is None else table)
        if whole:
            self.workspace[:] = np.nan
        kv_type = torch.bfloat16 if self.limits.kv_dtype == "bf16" else torch.float32
        arguments: dict[str, torch.Tensor | int] = {
            "table": torch.from_numpy(table.reshape(-1)),
            "control": torch.from_numpy(self.control[bucket]),
            "weights": torch.from_numpy(self.packed.view(np.int32)),
            "workspace": torch.from_numpy(self.workspace),
            "state": torch.from_numpy(self.state.bytes.view(np.int32)),
        }
        for name, kv in zip(self.source.kv_names, self.kv, strict=True):
            arguments[name] = torch.from_numpy(kv).view(kv_type)
        arguments |= {"stream": torch.from_numpy(self.stream), "records": table.shape[1]}
        arguments |= {"chunks": self.stream.shape[1], "STAGES": 0}  # interpreted, weights are read where they are
        fresh = ("workspace",) if whole else ()
        kernel = getattr(self.module, f"step_{bucket}")
        launch(kernel, arguments, len(table), seed, constant=("table", "stream", "weights"), fresh=fresh)

    def generate(self, prompt: list[int], count: int, first_seed: int = 0) -> list[int]:
        """Greedy tokens of slot 0 from its start."""
        self.reset()
        self.prompt(prompt)
        tokens = []
        for i in range(count):
            self.run(first_seed + i)
            tokens.append(int(self.state.output_token[0]))
        return tokens


def start_slot(state: State, slot: int, how: Slot, limits: Limits) -> None:
    """Begin a sequence in a slot of a step state."""
    sampling = how.sampling
    state.slot_finished[slot] = state.slot_count[slot] = 0
    state.slot_limit[slot] = min(how.limit, limits.context)
    state.slot_stop[slot] = -1
    state.slot_stop[slot, : len(how.stop)] = sorted(how.stop)
    state.slot_temperature[slot], state.slot_top_k[slot] = sampling.temperature, sampling.top_k
    state.slot_top_p[slot], state.slot_min_p[slot] = sampling.top_p, sampling.min_p
    state.slot_penalty[slot], state.slot_seed[slot] = sampling.repetition_penalty, sampling.seed
    state.slot_stream[slot] = sampling.stream
    state.slot_seen[slot] = 0
    for token in how.seen:
        state.slot_seen[slot, token // 32] |= np.uint32(1 << token % 32)


def set_rows(state: State, rows: list[tuple[int, int, int]], outputs: list[int]) -> None:
    """The rows of the next step, (token, slot, position) each, and which of them want logits."""
    n, m = len(rows), len(outputs)
    state.n_rows[0], state.n_outputs[0] = n, m
    state.row_token[:n], state.row_slot[:n], state.row_position[:n] = np.array(rows, np.int32).T
    state.row_output[:n] = -1
    if hasattr(state, "row_draft"):
        state.row_draft[:n] = 0
    state.output_row[:m] = outputs
    state.row_output[outputs] = np.arange(m)
