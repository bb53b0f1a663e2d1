"""The compiled GPU step on the PTX emulator: what ships, run on the CPU with races and coverage recorded.

The emulator lies beside the repository (`../shared/ptxemu`); where it does not, the tests that need it skip.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled_kernels import (
    ARCHS,
    DENSE,
    FAMILIES,
    MIXED,
    MOE,
    CompiledStep,
    checkpoint,
    compiled_step,
    each,
    limits,
)
from ptx_spelled import spelled_out

from onelaunch.codegen.triton.build import signature
from onelaunch.codegen.triton.render import FAULT, STREAMED
from onelaunch.ir.limits import kv_pool_bytes, kv_tile_bytes, state_bytes, state_fields
from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.stream import streams
from onelaunch.ir.table import cache_groups, lower
from onelaunch.runtime import load
from onelaunch.tests.compiled import ArtifactCache

EMULATOR = Path(__file__).resolve().parents[2] / "shared" / "ptxemu"
STALE = 0x47  # as bytes of float32 or bf16: about 51,000
PROMPT = [5, 17, 200, 33, 8, 91, 4, 250, 77, 12, 100, 60]  # twelve rows: the first step takes the `many` bucket
# sm_89's PTX is sm_90's but for how a bucket of many rows is tiled: one family of it, the one with a bf16 cache.
each_step = each([*product(DENSE, ARCHS), ("qwen3", 89), MIXED, *MOE])
# What does not hang on how an architecture's instructions are chosen: each family on one, each architecture once.
each_family = each([*zip(DENSE, ARCHS, strict=True), MIXED, *MOE])


@cache
def emulator():
    if not EMULATOR.is_dir():
        pytest.skip(f"no PTX emulator at {EMULATOR}")
    sys.path.insert(0, str(EMULATOR))
    import ptxemu

    return ptxemu


def cpu_text(compiled: ArtifactCache, family: str, count: int, window: int = 0, sinks: int = 0) -> list[int]:
    """What the CPU target says after PROMPT."""
    bounds = {"window": window, "sinks": sinks}
    artifact = compiled(checkpoint(family), quant=FAMILIES[family][1], limits=limits(family).as_dict(), **bounds)
    with load(artifact) as cpu:
        return list(cpu.generate(PROMPT, max_new_tokens=count, stop_tokens=[]).tokens)


class EmulatedStep:
    """One model's step for one architecture, with its state on the host."""

    def __init__(self, step: CompiledStep, buckets: Sequence[str] = BUCKETS) -> None:
        self.compiled, self.source, self.plan = step, step.source, step.plan
        self.schedules, self.packed, self.weights, self.limits = step.schedules, step.packed, step.weights, step.limits
        self.kernels = {b: step.kernel(b) for b in buckets}
        chunks = self.source.chunk_blocks.get
        self.tables = {b: lower(s, self.source.bodies[b], self.plan, None, chunks) for b, s in self.schedules.items()}
        self.stream = streams(self.schedules[STREAMED], self.plan, chunks)
        groups = cache_groups(step.program)
        fields = state_fields(self.limits, step.program.logits.tensor.width, len(groups), step.program.routing)
        self.raw = np.zeros(state_bytes(fields), np.uint8)
        self.state = {f.name: self.raw[f.offset : f.offset + f.nbytes].view(f.dtype).reshape(f.shape) for f in fields}
        words = max(s.workspace_bytes for s in self.schedules.values()) // 4
        self.workspace = np.full(words, np.nan, np.float32)
        self.control = {b: np.zeros(self.source.control_words, np.int32) for b in BUCKETS}
        pages = self.limits.slots * self.limits.pages
        sizes = [len(g.layers) * g.type.kv_heads * kv_tile_bytes(g.type.head_dim, self.limits) for g in groups]
        self.kv = [np.zeros(kv_pool_bytes(pages, size), np.uint8) for size in sizes]
        self.names = list(signature(self.limits, self.source.kv_names))
        self.reset()

    def with_text(self, edit: Callable[[str], str]) -> EmulatedStep:
        """This step, sharing its memory, with the kernel of the decode bucket compiled from an edited text."""
        made = copy(self)
        made.kernels = {"few": self.compiled.compile(edit(self.source.text), "few")}
        return made

    def reset(self) -> None:
        """As a long-running process starts sequences: a cache full of others' values, pages out of order."""
        limits, state = self.limits, self.state
        self.raw[:] = 0
        for control in self.control.values():
            control[:] = 0
        for kv in self.kv:
            kv[:] = STALE
        for slot in range(limits.slots):
            state["pages"][:, slot] = np.arange(limits.pages)[::-1] * limits.slots + slot
        state["slot_limit"][:], state["slot_stop"][:] = limits.context, -1
        state["slot_top_p"][:] = state["slot_penalty"][:] = 1

    def set_rows(self, rows: list[tuple[int, int, int]], outputs: list[int]) -> None:
        """The rows of the next step, (token, slot, position) each, and which of them want logits."""
        n, m, s = len(rows), len(outputs), self.state
        s["n_rows"][0], s["n_outputs"][0] = n, m
        s["row_token"][:n], s["row_slot"][:n], s["row_position"][:n] = np.array(rows, np.int32).reshape(-1, 3).T
        s["row_output"][:n] = -1
        s["output_row"][:m] = outputs
        s["row_output"][outputs] = np.arange(m)

    def prompt(self, tokens: list[int], slot: int = 0) -> None:
        """Make a prompt the rows of the next step."""
        self.set_rows([(token, slot, i) for i, token in enumerate(tokens)], [len(tokens) - 1])

    @property
    def bucket(self) -> str:
        return "few" if self.state["n_rows"][0] <= self.limits.few_rows else "many"

    def logits(self, outputs: int) -> np.ndarray:
        """The last step's, [outputs, vocab]."""
        program = self.schedules[self.bucket].program
        width = program.logits.tensor.width
        start = self.schedules[self.bucket].buffer(program.exit.name, program.logits.name).offset // 4
        pitch = -(-width // 32) * 32
        return self.workspace[start : start + outputs * pitch].reshape(outputs, pitch)[:, :width].copy()

    def memory(self) -> dict[str, np.ndarray]:
        """A copy of all that a launch may change."""
        kept = {"state": self.raw, "workspace": self.workspace.view(np.uint32)}
        kept |= {f"kv{i}": kv for i, kv in enumerate(self.kv)} | {f"control {b}": c for b, c in self.control.items()}
        return {name: array.copy() for name, array in kept.items()}

    def faulted(self) -> bool:
        """Did a worker's wait run out of time?"""
        return any(control[FAULT] for control in self.control.values())

    def run(self, seed: int, table: np.ndarray | None = None, change: Callable[[str], str] = str, whole: bool = True):
        """One launch; the emulator's report. `change` edits the compiled PTX.

        whole: a step of its own, in which whatever is read of the workspace must have been written.
        """
        bucket = self.bucket
        table = self.tables[bucket] if table is None else table
        kv_type = torch.bfloat16 if self.limits.kv_dtype == "bf16" else torch.float32
        arrays = [table.reshape(-1), self.control[bucket], self.weights.view(np.int32), self.workspace]
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays[:1]]
        tensors += [torch.from_numpy(a) for a in (*arrays[1:], self.raw.view(np.int32))]
        tensors += [torch.from_numpy(a).view(kv_type) for a in self.kv]
        tensors += [torch.from_numpy(self.stream)]
        kernel = self.kernels[bucket]
        return emulator().emulate(
            spelled_out(change(kernel.ptx)), {"num_warps": kernel.warps, "shared": kernel.shared}, (len(table),),
            [*tensors, table.shape[1], self.stream.shape[1]],
            names=self.names, seed=seed, readonly=["weights", "table", "stream"],
            poisoned=["workspace"] if whole else [],
        )  # fmt: skip

    def generate(self, prompt: list[int], count: int, first_seed: int = 0):
        """Greedy (or sampled) tokens and the report of every step."""
        self.reset()
        self.prompt(prompt)
        tokens, reports = [], []
        for i in range(count):
            reports.append(self.run(first_seed + i))
            tokens.append(int(self.state["output_token"][0]))
        return tokens, reports


@cache
def emulated_step(family: str, arch: int) -> EmulatedStep:
    """Compiled once per process; `reset` it before use."""
    emulator()
    return EmulatedStep(compiled_step(family, arch))
