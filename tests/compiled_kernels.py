"""Kernels of small models, compiled once per test run: for tests of machine code."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest

from onelaunch.codegen.triton.build import Kernel, compile_kernel, stages
from onelaunch.codegen.triton.render import Source, render_kernel
from onelaunch.compiler.machines import machine_for
from onelaunch.ir.limits import Limits
from onelaunch.ir.schedule import BUCKETS
from onelaunch.tests.tiny import Tiny, tiny

FAMILIES = {"llama": "q8_0", "qwen2": "q4_1", "qwen3": "q4_0", "gemma3": "q4_k"}  # each with a format of its own
ARCHS = (80, 89, 90, 100, 120)
LIMITS = Limits(rows=16, slots=2, context=512, outputs=4)
SIZES = {"hidden": 512, "ffn": 1024, "vocab": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "query_scale": 0.125}


def each(*buckets: str) -> pytest.MarkDecorator:
    """Parametrize by family, architecture and bucket; a family's tests run in one process, that compiles them once."""
    made = [
        pytest.param(family, arch, bucket, marks=pytest.mark.xdist_group(f"kernels of {family}"))
        for family, arch, bucket in product(FAMILIES, ARCHS, buckets)
    ]
    return pytest.mark.parametrize(("family", "arch", "bucket"), made)


@cache
def model(family: str) -> Tiny:
    return tiny(family, FAMILIES[family], **SIZES)


@cache
def source(family: str) -> Source:
    return render_kernel({b: model(family).schedule(b, 4, LIMITS) for b in BUCKETS})


def ring(family: str, arch: int) -> tuple[int, int]:
    """Chunks in the ring of a machine, and the bytes of a place for one."""
    size = source(family).slot_bytes
    return stages(size, machine_for(f"sm_{arch}").shared_bytes_per_block), size


@cache
def kernel(family: str, arch: int, bucket: str) -> Kernel:
    made = source(family)
    return compile_kernel(made.text, LIMITS, made.kv_names, arch, bucket, ring(family, arch))
