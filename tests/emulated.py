"""The compiled GPU step on the PTX emulator: what ships, run on the CPU with races and coverage recorded.

The emulator lies beside the repository (`../shared/ptxemu`); where it does not, the tests that need it skip.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from copy import copy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ptx_spelled import spelled_out

from onelaunch.codegen.triton.build import OPTIONS, WARPS, launch_shared, llvm_switches, load_module, signature
from onelaunch.codegen.triton.render import FAULT, STREAMED, render_kernel
from onelaunch.compiler.weights import pack_one, packed_weights, weight_plan
from onelaunch.ir.formats import FORMATS, Format
from onelaunch.ir.limits import Limits, kv_pool_bytes, kv_tile_bytes, state_bytes, state_fields
from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.stream import streams
from onelaunch.ir.table import cache_groups, lower
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.passes import GRAPH_PASSES, SCHEDULE_PASSES, Options, schedule
from onelaunch.tests import small
from onelaunch.tests.checkpoints import save_random
from onelaunch.tests.moe_checkpoints import to_mxfp4

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as codegen/triton/build.py compiles
EMULATOR = Path(__file__).resolve().parents[2] / "shared" / "ptxemu"
WORKERS = 4
STAGES = 3  # chunks of the weight stream in the ring
STALE = 0x47  # as bytes of float32 or bf16: about 51,000
ARCHS = (80, 90, 100, 120)
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
PROMPT = [5, 17, 200, 33, 8, 91, 4, 250, 77, 12, 100, 60]  # twelve rows: the first step takes the `many` bucket
LIMITS = {"rows": 16, "slots": 4, "context": 384, "outputs": 4}
FAMILIES = {  # type of the checkpoint (or `mixed`), --quant, type of its numbers, of the cache
    "llama": ("llama", "", torch.bfloat16, "f32"),
    "qwen2": ("qwen2", "int8", torch.float32, "f32"),
    "qwen3": ("qwen3", "int4", torch.float32, "bf16"),
    "gemma3": ("gemma3_text", "", torch.float32, "f32"),
    "every block format and f16": ("mixed", "", torch.float32, "f32"),
    "qwen2_moe": ("qwen2_moe", "int8", torch.float32, "f32"),
    "qwen3_moe": ("qwen3_moe", "int4", torch.float32, "f32"),
    "mixtral": ("mixtral", "", torch.bfloat16, "f32"),
    "gpt_oss": ("gpt_oss", "", torch.float32, "f32"),
}
# What their checkpoints have besides SIZES. The experts of gpt-oss are in MXFP4.
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 32, "num_hidden_layers": 1,
    },
    "qwen3_moe": {"num_experts": 20, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "num_hidden_layers": 1},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 48, "num_hidden_layers": 1},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 5},
}  # fmt: skip
DENSE = ("llama", "qwen2", "qwen3", "gemma3")
# sm_89's PTX is sm_90's but for how a bucket of many rows is tiled: one family of it, the one with a bf16 cache.
MOE = {"qwen2_moe": 80, "qwen3_moe": 120, "mixtral": 100, "gpt_oss": 90}  # one architecture of each
CASES = [*product(DENSE, ARCHS), ("qwen3", 89), ("every block format and f16", 90), *MOE.items()]
# A family's tests share its checkpoint, its CPU target and its compiled kernels: they run in one process.
each_step = pytest.mark.parametrize(
    ("family", "arch"), [pytest.param(f, a, id=f"{f} sm_{a}", marks=pytest.mark.xdist_group(f)) for f, a in CASES]
)


@cache
def emulator():
    if not EMULATOR.is_dir():
        pytest.skip(f"no PTX emulator at {EMULATOR}")
    sys.path.insert(0, str(EMULATOR))
    import ptxemu

    return ptxemu


def save_mixed(path: Path, layers: int = 2, width: int = 256, vocab: int = 300, seed: int = 0) -> Path:
    """A random llama in a GGUF whose matrices are of every block format and f16, no two of a layer alike."""
    formats = iter(
        ["q4_1", "q5_0", "q8_0", "q4_k", "q4_0", "q4_0", "q6_k"] + ["q5_k", "f16", "f16", "q4_1"] + ["q8_0"] * 3
    )
    random, writer = np.random.default_rng(seed), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(vocab)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    _add_random(writer, "token_embd", FORMATS["q6_k"], vocab, width, random)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", 1 + 0.2 * random.standard_normal(width).astype(np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            rows = width // 2 if name in ("attn_k", "attn_v") else width
            _add_random(writer, f"blk.{i}.{name}", FORMATS[next(formats)], rows, width, random)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_random(writer, name: str, fmt: Format, rows: int, width: int, random) -> None:
    """A matrix of random codes, its scales such that weights are about width ** -0.5."""
    if fmt.name == "f16":
        values = random.standard_normal((rows, width)).astype(np.float16) * np.float16(width**-0.5)
        writer.add_tensor(f"{name}.weight", values)
        return
    raw = random.integers(0, 256, (rows, width // fmt.disk_block, fmt.record.itemsize), np.uint8)
    records = raw.view(fmt.record)[..., 0]
    largest = 2.0 ** (fmt.bits - 1) * (32 if fmt.scale == "super" else 1)
    records["d"] = random.uniform(1, 2, records.shape) * 2 * width**-0.5 / largest
    if fmt.has_min:
        records["m"] = records["d"] * (1 if fmt.scale == "super" else -(2.0 ** (fmt.bits - 1)))
    if fmt.bits == 6:
        records["scales"] = random.integers(-32, 32, records["scales"].shape)
    data = records.view(np.uint8).reshape(rows, -1)
    writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[fmt.name.upper()])


class EmulatedStep:
    """One model's step for one architecture, with its state on the host."""

    def __init__(self, checkpoint: Path, limits: Limits, quant: str = "", arch: int = 90, warps: int = WARPS) -> None:
        imported, self.limits = import_checkpoint(open_checkpoint(checkpoint)), limits
        program = imported.program
        for _, change in GRAPH_PASSES:
            program = program.map(lambda g, c=change: c(g, Options(quant))).verify()
        self.schedules = {b: schedule(program, limits, b, WORKERS) for b in BUCKETS}
        for _, change in SCHEDULE_PASSES:
            self.schedules = {b: change(s) for b, s in self.schedules.items()}
        self.source = render_kernel(self.schedules)
        self.packed = packed_weights(program)
        self.plan = weight_plan(self.packed)
        self.weights = np.concatenate([pack_one(w, imported) for w in self.packed])
        chunks = self.source.chunk_blocks.get
        self.tables = {b: lower(s, self.source.bodies[b], self.plan, None, chunks) for b, s in self.schedules.items()}
        self.stream = streams(self.schedules[STREAMED], self.plan, self.source.chunk_blocks.get)
        groups = cache_groups(program.kinds, program.layers)
        vocab = program.logits.tensor.width
        fields = state_fields(limits, vocab, len(groups), program.routing)
        raw = np.zeros(state_bytes(fields), np.uint8)
        self.raw = raw
        self.state = {f.name: raw[f.offset : f.offset + f.nbytes].view(f.dtype).reshape(f.shape) for f in fields}
        words = max(s.workspace_bytes for s in self.schedules.values()) // 4
        self.workspace = np.full(words, np.nan, np.float32)
        self.control = {b: np.zeros(self.source.control_words, np.int32) for b in BUCKETS}
        pages = limits.slots * limits.pages
        sizes = [len(g.layers) * g.type.kv_heads * kv_tile_bytes(g.type.head_dim, limits) for g in groups]
        self.kv = [np.zeros(kv_pool_bytes(pages, size), np.uint8) for size in sizes]
        self.reset()
        self.arch, self.warps = arch, warps
        self.names = list(signature(limits, self.source.kv_names))
        self.kernels = {b: self._compiled(self.source.text, b) for b in BUCKETS}

    def _compiled(self, text: str, bucket: str):
        step = getattr(load_module(text), f"step_{bucket}")
        types = signature(self.limits, self.source.kv_names)
        with llvm_switches():
            constants = {"STAGES": STAGES}
            return emulator().compile_kernel(step, types, constants, arch=self.arch, num_warps=self.warps, **OPTIONS)

    def with_text(self, edit: Callable[[str], str]) -> EmulatedStep:
        """This step, sharing its memory, with the kernel of the decode bucket compiled from an edited text."""
        made = copy(self)
        made.kernels = {"few": self._compiled(edit(self.source.text), "few")}
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
        shared = launch_shared(kernel.metadata.shared, (STAGES, self.source.slot_bytes), bucket)
        return emulator().emulate(
            spelled_out(change(kernel.asm["ptx"])), kernel.metadata._replace(shared=shared), (len(table),),
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
def checkpoint(family: str) -> Path:
    """A tiny random model of one of FAMILIES."""
    kind, _, dtype, _ = FAMILIES[family]
    path = small.place() / "emulated" / kind
    path.parent.mkdir(exist_ok=True)
    if kind == "mixed":
        return save_mixed(path.with_suffix(".gguf"))
    hf = save_random(path, kind, dtype, **SIZES | EXPERTS.get(kind, {}))
    if kind == "gpt_oss":
        to_mxfp4(path, hf)
    return path


def limits_of(family: str) -> dict[str, int | str]:
    return {**LIMITS, "kv_dtype": FAMILIES[family][3]}


@cache
def emulated_step(family: str, arch: int) -> EmulatedStep:
    """Compiled once per process; `reset` it before use."""
    emulator()
    return EmulatedStep(checkpoint(family), Limits(**limits_of(family)), FAMILIES[family][1], arch)
