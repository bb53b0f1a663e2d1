"""Small models of every family and format, and their GPU kernels, compiled as they ship: once per process."""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from onelaunch.codegen.triton.build import Kernel, compile_kernel, stages
from onelaunch.codegen.triton.render import render_kernel
from onelaunch.compiler.gpu.machines import machine_for
from onelaunch.compiler.weights import pack_one, packed_weights, weight_plan
from onelaunch.ir.formats import FORMATS, Format
from onelaunch.ir.limits import Limits
from onelaunch.ir.schedule import BUCKETS
from onelaunch.models.drafter import with_drafter
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.models.window import with_window
from onelaunch.passes import GRAPH_PASSES, SCHEDULE_PASSES, Options, schedule
from onelaunch.tests import small
from onelaunch.tests.checkpoints import save_random
from onelaunch.tests.moe_checkpoints import to_mxfp4

WORKERS = 4
ARCHS = (80, 90, 100, 120)
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
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
    "gpt_oss": ("gpt_oss", "fp8", torch.float32, "f32"),
}
# What their checkpoints have besides SIZES. The experts of gpt-oss are in MXFP4.
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_hidden_layers": 1, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_hidden_layers": 1, "num_experts": 20, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    "mixtral": {"num_hidden_layers": 1, "num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 5},
}  # fmt: skip
MORE_ROWS = ("qwen3", "qwen3_moe", "every block format and f16")  # whose kernels take eight rows at once, not four
DENSE = ("llama", "qwen2", "qwen3", "gemma3")
MIXED = ("every block format and f16", 90)
MOE = [("qwen2_moe", 80), ("gpt_oss", 90), ("mixtral", 100), ("qwen3_moe", 120)]


def each(cases, *buckets: str) -> pytest.MarkDecorator:
    """Parametrize by family, architecture and, where buckets are given, bucket.

    A family's tests share its checkpoint, its CPU target and its compiled kernels: they run in one process.
    """
    made = [
        pytest.param(family, arch, *bucket, id=" ".join([f"{family} sm_{arch}", *bucket]), marks=group(family))
        for family, arch in cases
        for bucket in ([(b,) for b in buckets] or [()])
    ]
    return pytest.mark.parametrize(("family", "arch", *(["bucket"] if buckets else [])), made)


def group(family: str) -> pytest.MarkDecorator:
    return pytest.mark.xdist_group(family)


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
    super_blocks = fmt.level("sub_d") is not None
    largest = 2.0 ** (fmt.bits - 1) * (32 if super_blocks else 1)
    records["d"] = random.uniform(1, 2, records.shape) * 2 * width**-0.5 / largest
    if fmt.has_min:
        records["m"] = records["d"] * (1 if super_blocks else -(2.0 ** (fmt.bits - 1)))
    if fmt.bits == 6:
        records["sub_d"] = random.integers(-32, 32, records["sub_d"].shape)
    data = records.view(np.uint8).reshape(rows, -1)
    writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[fmt.name.upper()])


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


def limits(family: str, drafts: int = 0, drafter: str = "ngram") -> Limits:
    room = {"outputs": 2 * LIMITS["outputs"], "drafts": drafts, "drafter": drafter} if drafts else {}
    few = Limits.few_rows if drafts or family in MORE_ROWS else 4
    return Limits(**{**LIMITS, **room}, few_rows=few, kv_dtype=FAMILIES[family][3])


class CompiledStep:
    """One model's kernels for one architecture, with all they are made from; `draft`: the family that drafts in it.

    `bounds`: a window and sinks, as `with_window` takes them.
    """

    def __init__(
        self, family: str, arch: int, drafts: int = 0, draft: str = "", bounds: tuple[int, int] = (0, 0)
    ) -> None:
        imported = import_checkpoint(open_checkpoint(checkpoint(family)))
        if draft:
            imported = with_drafter(imported, import_checkpoint(open_checkpoint(checkpoint(draft))), drafts)
        self.limits, self.arch = limits(family, drafts, "model" if draft else "ngram"), arch
        program = with_window(imported.program, *bounds)
        for _, change in GRAPH_PASSES:
            program = program.map(lambda g, c=change: c(g, Options(FAMILIES[family][1]))).verify()
        self.program, self.imported = program, imported
        self.schedules = {b: schedule(program, self.limits, b, WORKERS) for b in BUCKETS}
        for _, change in SCHEDULE_PASSES:
            self.schedules = {b: change(s) for b, s in self.schedules.items()}
        self.source = render_kernel(self.schedules)
        self.packed = packed_weights(program)
        self.plan = weight_plan(self.packed)
        size = self.source.slot_bytes
        self._kernels: dict[str, Kernel] = {}
        self.ring = (stages(size, machine_for(f"sm_{arch}").shared_bytes_per_block), size)

    @cached_property
    def weights(self) -> np.ndarray:
        return np.concatenate([pack_one(w, self.imported) for w in self.packed])

    def compile(self, text: str, bucket: str) -> Kernel:
        return compile_kernel(text, self.limits, self.source.kv_names, self.arch, bucket, self.ring)

    def kernel(self, bucket: str) -> Kernel:
        if bucket not in self._kernels:
            self._kernels[bucket] = self.compile(self.source.text, bucket)
        return self._kernels[bucket]


@cache
def compiled_step(family: str, arch: int) -> CompiledStep:
    return CompiledStep(family, arch)
