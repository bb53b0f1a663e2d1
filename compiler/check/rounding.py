"""What the kernels round by design, for references that are to round alike: activations in front of a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ...ir.graph import Graph, Program
from ...ir.op import Op
from ...ir.ops import ExpertLinear, Linear, MatrixOp
from ...ir.schedule import panel_kind
from ...ir.types import Value
from ...passes.policy import split_kinds
from ...runtime.manifest import Target


def has_bf16_dot(target: Target) -> bool:
    """Whether bf16 matrices read bf16 activations; elsewhere they read float32."""
    return "avx512_bf16" in target.isa


def rounded(x: torch.Tensor, kind: str, bf16: bool) -> torch.Tensor:
    """An activation as a matrix reads it: int8 by blocks of 32 (`q8`), bf16 where the level has its dot, or exact."""
    if kind == "bf16":
        return x.bfloat16().float() if bf16 else x
    if kind != "q8":
        return x
    pad = -x.shape[-1] % 32
    padded = torch.nn.functional.pad(x, (0, pad))
    blocks = padded.reshape(*padded.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0).round()
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


class _Rounded(MatrixOp):
    """A matrix op whose reference rounds its activation first."""

    bf16 = False

    def reference(self, x: Any, *others: Any) -> Any:
        return super().reference(rounded(x, panel_kind(self.weight), self.bf16), *others)


class _RoundedLinear(_Rounded, Linear):
    pass


class _RoundedExperts(_Rounded, ExpertLinear):
    pass


class _RoundedLinearBf16(_RoundedLinear):
    bf16 = True


class _RoundedExpertsBf16(_RoundedExperts):
    bf16 = True


def rounded_program(program: Program, formats: Mapping[str, str], bf16: bool) -> Program:
    """The same program for the reference executor, its matrices reading rounded activations.

    formats: of every weight as it is packed, by `NAME` or `LAYER.NAME`; layers that differ become kinds of their own.
    """
    program = split_kinds(program, lambda key: formats.get(key, ""))
    linear, experts = (_RoundedLinearBf16, _RoundedExpertsBf16) if bf16 else (_RoundedLinear, _RoundedExperts)

    def change(op: Op, prefix: str) -> Op:
        if not isinstance(op, Linear | ExpertLinear):
            return op
        packed = dataclasses.replace(op.weight.tensor, dtype=formats[prefix + op.weight.name[2:]])
        weight = Value(op.weight.name, packed)
        if isinstance(op, Linear):
            return linear(op.out, op.x, weight)
        return experts(op.out, op.x, op.gates, weight, op.bias, op.k)

    def graph_ops(graph: Graph) -> Graph:
        layers = program.kind_layers(graph.name)
        prefix = f"{layers[0]}." if layers else ""
        return dataclasses.replace(graph, ops=tuple(change(op, prefix) for op in graph.ops))

    return program.map(graph_ops)
