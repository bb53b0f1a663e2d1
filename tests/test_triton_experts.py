"""What the GPU kernel's experts have of their own: routers, rows with few experts or none, tiles without a ring."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from emulated import emulator
from interpreter_lockstep import Lockstep
from test_triton_bodies import LIMITS, allowed

from onelaunch.codegen.cpu.pack import pack, unpack
from onelaunch.codegen.triton.build import OPTIONS, WARPS, llvm_switches, load_module
from onelaunch.codegen.triton.formats import READERS, DenseReader, Reader, reader
from onelaunch.codegen.triton.linear import FEW_ROWS, core_text, row_scale_text, tables_text
from onelaunch.codegen.triton.render import render_kernel
from onelaunch.ir.access import stored as stored_values
from onelaunch.ir.formats import FORMATS, packed_body_bytes
from onelaunch.ir.schedule import BUCKETS, padded
from onelaunch.ir.types import Value
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.random import random_checkpoint
from onelaunch.tests.interpreter_step import FAMILY_HYPER, SIZES, random_model, stored
from onelaunch.tests.moe_checkpoints import ROUTERS, other_router
from onelaunch.tests.tiny import tiny

pytestmark = pytest.mark.xdist_group("interpreted experts")
ROWS = [(5, 1, 300), (7, 0, 13), (9, 1, 301), (11, 0, 14), (3, 0, 15)]


@pytest.mark.parametrize("router", ROUTERS)
def test_other_routers_are_the_reference(router):
    """The first row's logits are all alike: of equal experts, and equal groups, the first are taken."""
    family, sizes = other_router(router), {"layers": 1, "experts": 12, "experts_used": 3}
    checkpoint = random_checkpoint(family, {**FAMILY_HYPER["qwen2_moe"], **SIZES, **sizes})
    pair = Lockstep(import_checkpoint(checkpoint, family), LIMITS)
    kind = pair.machine.program.kinds[0]
    logits = next(op.out for op in kind.ops if op.operands[1:2] and op.operands[1].name == "w.router")
    phase = next(p for p in kind.phases if any(op.out == logits for op in p.ops))
    scores = [op.out for op in phase.ops if op.out.name in stored_values(kind, phase)]
    for rows in (ROWS[:1], ROWS):
        pair.set_rows(rows, [0])
        for number, anchor, _ in pair.records():
            if anchor not in ("sample", "commit"):
                pair.run_both(number)
                found = pair.compare(number)
                assert all(f.error <= allowed(f.kind, "f32") for f in found)
                if any(f.title.startswith(f"{kind.name}.{phase.name}.") for f in found):
                    for values in (x for value in scores for x in _rows_of(pair, value, 1)):
                        values[0] = 1
        assert "bias" in router or pair.step.state.routing[0, 0].tolist() == [0, 1, 2]
        assert (pair.step.state.routing[:, : len(rows)] == pair.machine.state.routing[:, : len(rows)]).all()


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_rows_may_have_fewer_experts_than_others_or_none(rows):
    """The first row loses all of its experts, the second all but one."""
    pair = Lockstep(random_model("qwen3_moe", "f32", layers=1), LIMITS)
    pair.set_rows(ROWS[:rows], [0])
    kind = pair.machine.program.kinds[0]
    gates = next(op.operands[1] for op in kind.ops if op.name == "expert_linear")
    made_by = next(f"{kind.name}.{p.name}." for p in kind.phases if any(op.out == gates for op in p.ops))
    for number, anchor, _ in pair.records():
        if anchor in ("sample", "commit"):
            continue
        pair.run_both(number)
        found = pair.compare(number)
        assert all(f.error <= allowed(f.kind, "f32") for f in found)
        if any(f.title.startswith(made_by) for f in found):
            _drop(pair, gates, rows)
    noted = pair.step.state.routing[0, :rows]
    assert (noted[0] == -1).all()
    assert rows == 1 or (noted[1] >= 0).sum() == 1
    assert (noted == pair.machine.state.routing[0, :rows]).all()


def _rows_of(pair: Lockstep, value: Value, rows: int) -> list[np.ndarray]:
    """A value's rows in both memories."""
    start, pitch = pair._offset(pair.machine.program.kinds[0], value.name) // 4, padded(value.tensor.width)
    both = (pair.step.workspace, pair.machine.space.floats)
    return [floats[start : start + rows * pitch].reshape(rows, pitch) for floats in both]


def _drop(pair: Lockstep, gates: Value, rows: int) -> None:
    for values in _rows_of(pair, gates, rows):
        values[0] = 0
        if rows > 1:
            values[1, np.flatnonzero(values[1])[1:]] = 0


# ---- tiles without a ring -----------------------------------------------------------------------

KERNEL = """

@triton.jit
def one_tile(weight, panel, route, out, blocks, rows):
    if rows == 1:
        y = expert_one_{name}(weight, panel, blocks, rows, route, 2)
    else:
        y = expert_several_{name}(weight, panel, blocks, rows, route, 2)
    tile = weight
    y *= {row_scale}
    tl.store(out + tl.arange(0, 32)[:, None] * {most} + tl.arange(0, {most})[None, :], y)
"""
BLOCKS = 40  # of 32 k: more than a chunk, and a part of one
ROUTE = [3, 7, 0, 11, 12, 9, 4]  # two to a row of the panel


@pytest.mark.parametrize("name", READERS)
def test_tiles_of_experts_are_computed_from_device_memory(name):
    """Of every format, for one row and several; each word of codes is read once, and one row's bits are its own."""
    random, fmt, ours = np.random.default_rng(1), FORMATS[name], reader(name)
    raw = stored(fmt, random.standard_normal((32, 32 * BLOCKS)).astype(np.float32), random)
    packed = pack(fmt, raw, 32, 32 * BLOCKS)
    panel, values = _panel(ours, random)
    kernel, found = _compiled(name), []
    for rows in (1, len(ROUTE)):
        out, route = np.zeros((32, FEW_ROWS), np.float32), np.array(ROUTE[:rows], np.int32)
        arguments = [torch.from_numpy(a) for a in (packed.view(np.int32), panel, route, out)]
        report = emulator().emulate(
            kernel.asm["ptx"], kernel.metadata, (1,), [*arguments, BLOCKS, rows],
            names=["weight", "panel", "route", "out"], readonly=["weight", "panel", "route"],
        )  # fmt: skip
        wanted = unpack(fmt, packed, 32, 32 * BLOCKS) @ values[route // 2].T
        assert np.abs(out[:, :rows] - wanted).max() <= 2e-6 * np.abs(wanted).max() * BLOCKS**0.5
        reads = next(s.reads for s in report.memory.slots.values() if s.name == "weight")
        reads = reads[: packed_body_bytes(fmt, 32 * BLOCKS) // 4]  # every row of the panel may read a trailer
        words = reads.reshape(-1, ours.super_words) if isinstance(ours, Reader) and ours.lead_words else reads
        assert (words[..., ours.lead_words :] == 1).all() if words is not reads else (words == 1).all()
        found.append(out[:, 0].tobytes())
    assert found[0] == found[1]


def _compiled(name: str):
    """A kernel of one tile, after the helpers of any model's step."""
    text = render_kernel({b: tiny("llama", "f32").schedule(b, 2) for b in BUCKETS}).text
    parts = [text[: text.index("@triton.jit\ndef kv_of")], core_text(name, "few", FEW_ROWS, streamed=False, held=True)]
    parts.append(tables_text([name]))
    own = KERNEL.format(name=name, most=FEW_ROWS, row_scale=row_scale_text(reader(name)) or "1.0")
    step = load_module("\n\n".join(parts) + own).one_tile
    types = {"weight": "*i32", "panel": "*i32", "route": "*i32", "out": "*fp32", "blocks": "i32", "rows": "i32"}
    options = {k: v for k, v in OPTIONS.items() if k != "num_stages"}
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as build.py does
    with llvm_switches():
        return emulator().compile_kernel(step, types, arch=90, num_warps=WARPS, num_stages=3, **options)


def _panel(ours: Reader | DenseReader, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Seven rows of activations as a format reads them, as words, and their values."""
    shape = (7, 32 * BLOCKS)
    if isinstance(ours, DenseReader):
        values = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        if ours.name == "bf16":
            return values.bfloat16().view(torch.int32).numpy(), values.bfloat16().float().numpy()
        return values.numpy().view(np.int32), values.numpy()
    codes = random.integers(-127, 128, (7, BLOCKS, 32)).astype(np.int8)
    words = np.zeros((7, BLOCKS, 12), np.int32)
    scale = random.uniform(0.5, 1, (7, BLOCKS)).astype(np.float32)
    sums = codes.astype(np.int32).reshape(7, BLOCKS, 2, 16).sum(-1)
    words[..., :8] = codes.view(np.int32)
    words[..., 8], words[..., 9:11] = scale.view(np.int32), sums
    words[..., 11] = (scale * sums.sum(-1).astype(np.float32)).view(np.int32)
    return words, (codes * scale[..., None]).astype(np.float32).reshape(shape)
