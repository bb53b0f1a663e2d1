"""The compiled GPU step on the PTX emulator: what ships, run on the CPU with races and coverage recorded.

The emulator lies beside the repository (`../shared/ptxemu`); where it does not, the tests that need it skip.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from onelaunch.codegen.triton.build import OPTIONS, WARPS, llvm_switches, load_module, signature
from onelaunch.codegen.triton.render import render_kernel
from onelaunch.compiler.weights import pack_one, packed_weights, weight_plan
from onelaunch.ir.formats import FORMATS, Format
from onelaunch.ir.limits import Limits, kv_pool_bytes, kv_tile_bytes, state_bytes, state_fields
from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.table import cache_groups, lower
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.passes import GRAPH_PASSES, SCHEDULE_PASSES, Options, schedule

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as codegen/triton/build.py compiles
EMULATOR = Path(__file__).resolve().parents[2] / "shared" / "ptxemu"
WORKERS = 4


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
        self.tables = {b: lower(s, self.source.bodies[b], self.plan) for b, s in self.schedules.items()}
        groups = cache_groups(program.kinds, program.layers)
        vocab = program.logits.tensor.width
        fields = state_fields(limits, vocab, len(groups))
        raw = np.zeros(state_bytes(fields), np.uint8)
        self.raw = raw
        self.state = {f.name: raw[f.offset : f.offset + f.nbytes].view(f.dtype).reshape(f.shape) for f in fields}
        words = max(s.workspace_bytes for s in self.schedules.values()) // 4
        self.workspace = np.full(words, np.nan, np.float32)  # whoever reads before writing finds nonsense
        self.control = {b: np.zeros(self.source.control_words, np.int32) for b in BUCKETS}
        pages = limits.slots * limits.pages
        sizes = [len(g.layers) * g.type.kv_heads * kv_tile_bytes(g.type.head_dim, limits) for g in groups]
        self.kv = [np.zeros(kv_pool_bytes(pages, size), np.uint8) for size in sizes]
        for slot in range(limits.slots):  # pages out of order, as a long-running cache has them
            self.state["pages"][:, slot] = np.arange(limits.pages)[::-1] * limits.slots + slot
        self.state["slot_limit"][:], self.state["slot_stop"][:] = limits.context, -1
        self.state["slot_top_p"][:] = self.state["slot_penalty"][:] = 1
        types = signature(limits, self.source.kv_names)
        module = load_module(self.source.text)
        with llvm_switches():
            self.kernels = {
                b: emulator().compile_kernel(
                    getattr(module, f"step_{b}"), types, {}, arch=arch, num_warps=warps, **OPTIONS
                )
                for b in BUCKETS
            }
        self.names = list(types)

    def prompt(self, tokens: list[int], slot: int = 0) -> None:
        """Make a prompt the rows of the next step."""
        n, s = len(tokens), self.state
        s["row_token"][:n], s["row_slot"][:n], s["row_position"][:n] = tokens, slot, np.arange(n)
        s["row_output"][:n] = -1
        s["row_output"][n - 1] = 0
        s["output_row"][0], s["n_rows"][0], s["n_outputs"][0] = n - 1, n, 1
        for token in tokens:
            s["slot_seen"][slot, token // 32] |= np.uint32(1 << token % 32)

    def run(self, seed: int, table: np.ndarray | None = None, change: Callable[[str], str] = str):
        """One step; the emulator's report. `change` edits the compiled PTX."""
        bucket = "few" if self.state["n_rows"][0] <= self.limits.few_rows else "many"
        table = self.tables[bucket] if table is None else table
        kv_type = torch.bfloat16 if self.limits.kv_dtype == "bf16" else torch.float32
        arrays = [table.reshape(-1), self.control[bucket], self.weights.view(np.int32), self.workspace]
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays[:1]]
        tensors += [torch.from_numpy(a) for a in (*arrays[1:], self.raw.view(np.int32))]
        tensors += [torch.from_numpy(a).view(kv_type) for a in self.kv]
        kernel = self.kernels[bucket]
        return emulator().emulate(
            change(kernel.asm["ptx"]), kernel.metadata, (len(table),), [*tensors, table.shape[1]],
            names=self.names, seed=seed, readonly=["weights", "table"],
        )  # fmt: skip

    def generate(self, prompt: list[int], count: int, first_seed: int = 0):
        """Greedy (or sampled) tokens and the report of every step."""
        self.prompt(prompt)
        tokens, reports = [], []
        for i in range(count):
            reports.append(self.run(first_seed + i))
            tokens.append(int(self.state["output_token"][0]))
        return tokens, reports
