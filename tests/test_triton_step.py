"""The generated GPU kernel, compiled to PTX and emulated (third rung of the ladder): every family, every architecture.

Nothing here ran on a GPU. The emulator executes the compiled PTX of a grid of persistent CTAs under several
interleavings, with a happens-before race detector; reading workspace that the step did not write is an error. Faults
that it must notice are in test_triton_faults.py.
"""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch
from emulated import PROMPT, cpu_text, each_family, each_step, emulated_step, emulator
from ptx_spelled import spelled_out

from onelaunch.codegen.triton.formats import READERS, body_word_count, body_words, reader, tile_words, trailer_words
from onelaunch.codegen.triton.render import FAULT
from onelaunch.ir.errors import CompileError
from onelaunch.ir.formats import FORMATS, packed_bytes


@each_step
def test_tokens_are_the_cpu_targets_and_no_interleaving_races(family, arch, compiled):
    gpu = emulated_step(family, arch)
    expected = cpu_text(compiled, family, 3)
    tokens, reports = gpu.generate(PROMPT, 3, arch)  # odd seeds starve some CTAs, even ones are fair
    assert tokens == expected
    for report in reports:
        assert report.races == []
    assert not gpu.faulted()


@each_step
def test_each_word_of_codes_is_read_exactly_once_per_decode_step(family, arch):
    """Of experts, those that the row uses; nothing of the others."""
    gpu = emulated_step(family, arch)
    gpu.reset()
    gpu.prompt(PROMPT[:1])
    report = gpu.run(7)
    reads = next(s.reads for s in report.memory.slots.values() if s.name == "weights")  # per word of 4 bytes
    embedded = {v.name[2:] for v in gpu.schedules["few"].program.entry.weights}
    for weight in gpu.packed:
        if weight.is_vector or weight.key in embedded:
            continue  # vectors are read by every worker; one row of the embedding twice where the head is tied
        fmt, blocks = reader(weight.type.dtype), -(-weight.type.width // 32)
        units = -(-weight.type.shape[-2] // weight.unit) * weight.unit_rows
        words = units // 32 * tile_words(fmt, blocks)
        first = gpu.plan.offsets[weight.key] // 4
        read = reads[first : first + weight.experts * words].reshape(weight.experts, words)
        if weight.experts > 1:
            used = gpu.state["routing"][int(weight.key.partition(".")[0]), 0]
            assert not np.delete(read, used, axis=0).any(), weight.key
            read = read[used]
        read = read.reshape(-1, tile_words(fmt, blocks))[:, : body_word_count(fmt, blocks)]  # a trailer holds scales
        if not getattr(fmt, "lead_words", 0):
            assert (read == 1).all(), weight.key
            continue
        read = read.reshape(-1, fmt.super_words)
        assert (read[:, fmt.lead_words :] == 1).all(), weight.key
        assert (read >= 1).all(), weight.key  # blocks share a lead


@each_family
def test_other_rows_of_a_step_change_no_bit_of_a_rows_logits(family, arch):
    """Of the same bucket: there a row's sums are in an order of their own."""
    gpu = emulated_step(family, arch)
    gpu.generate(PROMPT, 2)  # a cache to look back at
    kept = [kv.copy() for kv in gpu.kv]
    row, others = (17, 0, len(PROMPT)), [(40, 1, 0), (41, 2, 0), (42, 1, 1)]
    found = []
    for rows in ([row], [row, others[0]], [*others, row]):
        for kv, old in zip(gpu.kv, kept, strict=True):
            kv[:] = old
        gpu.set_rows(rows, [rows.index(row)])
        gpu.run(len(rows))
        found.append(gpu.logits(1).tobytes())
    assert found[0] == found[1] == found[2]


@each_step
@pytest.mark.parametrize("bucket", ["few", "many"])
def test_a_launch_that_finds_a_fault_changes_nothing(family, arch, bucket):
    """The host has not seen the state yet: not even the epoch turns."""
    gpu = emulated_step(family, arch)
    gpu.reset()
    gpu.prompt(PROMPT[:1] if bucket == "few" else PROMPT)
    gpu.control[bucket][FAULT] = 1
    before = gpu.memory()
    report = gpu.run(0)
    for name, now in gpu.memory().items():
        assert (now == before[name]).all(), name
    assert report.polls == 0
    assert not any(report.bytes_written.values())


@each_family
def test_a_step_without_rows_turns_the_epoch_and_commits_nothing(family, arch):
    """A captured graph is launched a few times more than there are steps to take."""
    gpu = emulated_step(family, arch)
    gpu.generate(PROMPT, 1)
    gpu.set_rows([], [])
    before = gpu.memory()
    report = gpu.run(1)
    after = gpu.memory()
    assert report.races == []
    assert (after["state"] == before["state"]).all()
    assert all((after[name] == before[name]).all() for name in before if name.startswith("kv"))
    assert gpu.control["few"][0] == before["control few"][0] + 1
    gpu.prompt(PROMPT[:3])  # the counters of the step before still mean what they should
    assert gpu.run(2).races == []
    assert not gpu.faulted()


@each_family
def test_the_generated_module_reads_as_python_and_names_no_machine(family, arch):
    tree = ast.parse(emulated_step(family, arch).source.text)
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert {"step_few", "step_many"} <= set(functions)
    assert len(functions) == len(set(functions))


# ---- what the emulator cannot do ----------------------------------------------------------------

MODULE = """.version 8.8
.target sm_100a
.address_size 64
.visible .entry f(.param .u64 .ptr .global out)
.reqntid 32
{{
	.reg .pred %p<2>;
	.reg .b16 %rs<2>;
	.reg .b32 %r<6>;
	.reg .b64 %rd<2>;
	ld.param.b64 %rd1, [out];
	mov.b16 %rs1, 0x3fc0;
	mov.b32 %r1, 0f3E800000;
	mov.b32 %r4, -1;
	mov.u32 %r5, %tid.x;
	setp.eq.u32 %p1, %r5, 7;
	selp.f32 %r3, %r1, 0f7FC00000, %p1;
{}
	st.global.b32 [%rd1], %r2;
	ret;
}}
"""
MISREAD = {
    "\tadd.rn.f32.bf16 \t%r2, %rs1, %r1;": 1.75,  # a bf16 of 1.5 and a float32 of 0.25
    "\tredux.sync.max.f32 \t%r2, %r3, %r4;": 0.25,  # of lane 7; all others hold NaN
}


@pytest.mark.parametrize("instruction", MISREAD)
def test_instructions_that_the_emulator_misreads_are_spelled_out(instruction):
    """Where it computes one by itself, its line in ptx_spelled.py can go."""
    got = []
    for text in (instruction, spelled_out(instruction)):
        out = torch.zeros(32)
        emulator().emulate(MODULE.format(text), {"num_warps": 1, "shared": 0}, (1,), [out], names=["out"])
        got.append(out[0].item())
    assert got[0] != MISREAD[instruction]
    assert got[1] == MISREAD[instruction]


# ---- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_a_reader_covers_the_packed_blocks_of_its_format(name):
    fmt, ours = FORMATS[name], reader(name)
    for blocks in (8, 24):
        words = eval(body_words(ours) + trailer_words(ours), {"blocks": blocks})
        assert 4 * words == packed_bytes(fmt, 32, 32 * blocks)


def test_a_format_without_a_reader_is_refused_by_name():
    with pytest.raises(CompileError, match="`q2_k` is not supported on GPU targets"):
        reader("q2_k")
