"""The tools of the interpreted rungs: what the race detector, the scheduler and the number formats must get right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from interpreter import load_interpreted
from interpreter_grid import Deadlock, launch
from interpreter_memory import Race, Stray
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onelaunch.codegen.triton.build import load_module

PROGRAMS = 4
# Every program doubles its numbers, then sums everybody's; a second round writes them again.
ROUNDS = """
import triton
import triton.language as tl


@triton.jit
def wait(counter, target):
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def kernel(control, shared, out):
    me = tl.program_id(0)
    lane = tl.arange(0, 8)
    for turn in range(2):
        tl.store(shared + me * 8 + lane, (me + 1) * (turn + 1) + lane * 0)
        tl.atomic_add(control, 1, sem="release", scope="gpu")
        wait(control, (turn + 1) * 4)  # all have written
        total = tl.sum(tl.load(shared + tl.arange(0, 32)), axis=0)
        tl.atomic_add(control + 1, 1, sem="release", scope="gpu")
        wait(control + 1, (turn + 1) * 4)  # all have read
        tl.store(out + turn * 4 + me, total)
"""


def run(text: str, seed: int = 0, out: int = 8) -> list[int]:
    """The sums that a variant of ROUNDS leaves."""
    tensors = {n: torch.zeros(size, dtype=torch.int32) for n, size in (("control", 2), ("shared", 32), ("out", out))}
    launch(load_interpreted(text).kernel, tensors, PROGRAMS, seed, fresh=("shared",))
    return tensors["out"].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_a_correct_kernel_passes_in_every_interleaving(seed):
    assert run(ROUNDS, seed) == [80] * 4 + [160] * 4


BROKEN = {
    "no wait": ("        wait(control, (turn + 1) * 4)  # all have written\n", "", (Race, Stray)),
    "no wait before overwriting": ("        wait(control + 1, (turn + 1) * 4)  # all have read\n", "", (Race,)),
    "target one too low": ("wait(control, (turn + 1) * 4)", "wait(control, (turn + 1) * 4 - 1)", (Race, Stray)),
    "target one too high": ("wait(control, (turn + 1) * 4)", "wait(control, (turn + 1) * 4 + 1)", (Deadlock,)),
    "relaxed signal": ('control, 1, sem="release"', 'control, 1, sem="relaxed"', (Race,)),
    "relaxed wait": ('sem="acquire"', 'sem="relaxed"', (Race,)),
    "unwritten": ("tl.store(shared + me * 8 + lane,", "tl.store(out + 0 * lane,", (Race, Stray)),
    "past the end": ("out + turn * 4 + me", "out + turn * 4 + me + 1", (Stray,)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_caught_within_a_few_interleavings(name):
    old, new, expected = BROKEN[name]
    assert old in ROUNDS
    caught = 0
    for seed in range(6):
        try:
            run(ROUNDS.replace(old, new), seed)
        except expected:
            caught += 1
    assert caught >= (1 if name == "target one too low" else 6)


def test_a_fault_names_the_buffer_the_program_and_the_line():
    with pytest.raises(
        Race, match=r"store of shared\[\d+\] by program \d at kernel, line \d+, unordered with a load by"
    ):
        run(ROUNDS.replace(BROKEN["no wait before overwriting"][0], ""), 1)
    with pytest.raises(Deadlock, match=r"program 0 waits for control\[0\], which stays 4"):
        run(ROUNDS.replace("wait(control, (turn + 1) * 4)", "wait(control, 5)"))


def test_constant_memory_is_not_written():
    tensors = {n: torch.zeros(32, dtype=torch.int32) for n in ("control", "shared", "out")}
    with pytest.raises(Stray, match=r"store of shared.* which is constant"):
        launch(load_interpreted(ROUNDS).kernel, tensors, PROGRAMS, constant=("shared",))


BRAIN = """
import triton
import triton.language as tl


@triton.jit
def kernel(a, b, out):
    i = tl.arange(0, 16)
    row, column = i[:, None], i[None, :]
    x, y = tl.load(a + row * 16 + column), tl.load(b + row * 16 + column)
    tl.store(out + row * 16 + column, tl.dot(x, y))
    z = (x.to(tl.float32) * 1.001).to(tl.bfloat16) * y - x
    tl.store(out + 256 + row * 16 + column, tl.where(z > y, z, -y).to(tl.float32))
"""


def test_bf16_arithmetic_rounds_as_torch_does():
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=random).bfloat16() for _ in range(2))
    out = torch.zeros(512)
    launch(load_interpreted(BRAIN).kernel, {"a": a, "b": b, "out": out}, 1)
    torch.testing.assert_close(out[:256].view(16, 16), a.float() @ b.float(), atol=1e-5, rtol=1e-5)
    z = (a.float() * np.float32(1.001)).bfloat16() * b - a
    assert (out[256:].view(16, 16) == torch.where(z > b, z, -b).float()).all()


def test_the_same_text_compiles_after_it_was_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as codegen/triton/build.py compiles
    run(ROUNDS)
    types = dict.fromkeys(("control", "shared", "out"), "*i32")
    source = ASTSource(fn=load_module(ROUNDS).kernel, signature=types, constexprs={})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "gpu.release.add" in made.asm["ptx"]
