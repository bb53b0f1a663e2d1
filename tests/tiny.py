"""Tiny programs of every family, from the family texts, with random weights: seconds, not checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from onelaunch.ir.formats import FORMATS, decode, quantize
from onelaunch.ir.graph import Graph, Program
from onelaunch.ir.limits import Limits
from onelaunch.ir.reference import KvCache, RowBatch, Slot, Slots
from onelaunch.ir.schedule import Schedule
from onelaunch.ir.text import parse
from onelaunch.ir.types import CacheType, TensorType, Type
from onelaunch.models.importer import FAMILIES, family_text
from onelaunch.models.instantiate import evaluate_number, instantiate
from onelaunch.passes import GRAPH_PASSES, SCHEDULE_PASSES, Options, schedule

torch.set_num_threads(1)  # tiny tensors: more threads only cost
FAMILY_NAMES = sorted(p.stem for p in FAMILIES.glob("*.ol"))
MOE = tuple(name for name in FAMILY_NAMES if "expert_linear" in (FAMILIES / f"{name}.ol").read_text())
HYPER = {
    "vocab": 96, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96, "eps": 1e-5,
    "query_scale": 0.25, "rope_factor": 1.0, "window": 24, "embed_scale": 1.5, "norm_offset": 0.0,
    "layer_kinds": ("local", "global", "local"), "experts": 6, "experts_used": 2, "moe_ffn": 64, "shared_ffn": 32,
    "norm_topk": 1, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
}  # fmt: skip
LIMITS = Limits(rows=12, slots=2, context=128, outputs=4, few_rows=4, kv_dtype="f32")


@dataclass(frozen=True)
class Tiny:
    """A model: its program (not yet fused); `weights` are made when first asked for."""

    program: Program
    formats: dict[str, TensorType]  # of each weight, by `name` or `LAYER.name`
    seed: int

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Dequantised, by `name` or `LAYER.name`."""
        random = torch.Generator().manual_seed(self.seed)
        return {key: _random(key.rpartition(".")[2], kind, random) for key, kind in self.formats.items()}

    @cached_property
    def lowered(self) -> Program:
        """Fused and tiled: what schedules are made of."""
        program = self.program
        for _, run in GRAPH_PASSES:
            program = program.map(lambda graph, run=run: run(graph, Options()))
        return program.verify()

    def schedule(self, bucket: str, workers: int, limits: Limits = LIMITS) -> Schedule:
        """Through every pass that makes a schedule."""
        made = schedule(self.lowered, limits, bucket, workers)
        for _, run in SCHEDULE_PASSES:
            made = run(made)
        return made


def tiny(family: str, fmt: str = "q8_0", seed: int = 0, **changes: Any) -> Tiny:
    """A random model of a family; `changes` replace hyper-parameters, `fmt` is the format of matrices."""
    hyper, text = {**HYPER, **changes}, family_text(family)
    formats: dict[str, TensorType] = {}
    types: dict[str, tuple[str, TensorType]] = {}
    for owner, group in text.weights:
        for layer in range(len(hyper["layer_kinds"])) if owner else (-1,):
            for w in group:
                shape = tuple(int(evaluate_number(s, hyper)) for s in w.shape)
                key = w.name if layer < 0 else f"{layer}.{w.name}"
                kind = TensorType(fmt if len(shape) > 1 else "f32", shape)
                types[key] = (w.otherwise or w.name, kind)  # heads are tied where they can be
                if not w.otherwise:
                    formats[key] = kind
    program = instantiate(text, hyper, lambda name, i: types[name if i < 0 else f"{i}.{name}"])
    return Tiny(program, formats, seed)


def two_layers(layer: str) -> Program:
    """A program of 64 wide rows around the text of `graph layer`, which takes x and gives the next x."""
    program = parse(f"""
        program small {{
          graph entry(rows: rows, w.embed: q8_0[64, 64]) -> (x) {{ x: f32[R, 64] = embed(rows, w.embed) }}
          {layer}
          layers layer*2
          graph exit(x: f32[R, 64], rows: rows, slots: slots, w.embed: q8_0[64, 64]) -> (slots1) {{
            s: f32[L, 64] = select(x, rows)
            logits: f32[L, 64] = linear(s, w.embed)
            token: i32[L] = sample(logits, rows, slots)
            slots1: slots = commit(token, rows, slots)
          }}
        }}""")
    assert isinstance(program, Program)
    return program


def _random(name: str, kind: TensorType, random: torch.Generator) -> torch.Tensor:
    """Values that keep activations near one, rounded as the format does."""
    shape, fmt = tuple(int(n) for n in kind.shape), kind.dtype
    if name.startswith("inv_freq"):
        base = 10000.0 if name == "inv_freq" else 100.0
        return base ** (-torch.arange(shape[0], dtype=torch.float32) / shape[0])
    values = torch.randn(shape, generator=random)
    if len(shape) == 1:
        return 1 + 0.2 * values if "norm" in name else 0.2 * values
    values *= 2.0 * shape[-1] ** -0.5
    if fmt not in ("q4_0", "q8_0", "f32", "f16", "bf16"):
        return values  # only its shape matters to schedules
    flat = quantize(FORMATS[fmt], values.numpy().reshape(-1, shape[-1]))
    return torch.from_numpy(decode(FORMATS[fmt], flat, shape[-1]).reshape(shape))


ROWS, OUTPUTS, SLOTS, POSITIONS = 5, 2, 2, 16  # of `random_inputs`


def shape_of(kind: TensorType) -> tuple[int, ...]:
    """A type's shape with the row counts of `random_inputs` filled in."""
    known = {"R": ROWS, "L": OUTPUTS}
    return tuple(known[d] if isinstance(d, str) else d for d in kind.shape)


def random_inputs(graph: Graph, seed: int = 0) -> dict[str, Any]:
    """A value for every parameter: 5 rows of 2 slots, 2 outputs, caches with something in them."""
    random = torch.Generator().manual_seed(seed)
    return {p.name: _input(p.type, random) for p in graph.params}


def _input(kind: Type, random: torch.Generator) -> Any:
    if isinstance(kind, TensorType):
        if kind.dtype == "i32":
            return torch.randint(0, 8, shape_of(kind), generator=random, dtype=torch.int32)
        return torch.randn(shape_of(kind), generator=random)
    if isinstance(kind, CacheType):
        shape = (SLOTS, POSITIONS, kind.kv_heads, kind.head_dim)
        return KvCache(torch.randn(shape, generator=random), torch.randn(shape, generator=random))
    if kind.name == "rows":
        return RowBatch.of([(1, 0, 4), (2, 0, 5), (3, 0, 6), (4, 1, 9), (5, 1, 10)], [2, 4])
    return Slots((Slot(),) * SLOTS)
