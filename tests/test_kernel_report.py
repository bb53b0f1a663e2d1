"""What ships, read from the machine code: every family and every architecture, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from compiled_kernels import DENSE, MIXED, MOE, compiled_step, each, group

from onelaunch.codegen.triton.build import OWN_BYTES, SHELF_BYTES, compile_kernel, stages
from onelaunch.codegen.triton.render import render_kernel
from onelaunch.compiler.gpu.kernel_report import body_formats, budget, only, problems, report
from onelaunch.compiler.gpu.machines import machine_for
from onelaunch.compiler.gpu.sync_lint import lint
from onelaunch.ir.limits import Limits
from onelaunch.ir.schedule import BUCKETS
from onelaunch.tests.tiny import tiny

# Thread-instructions per weight at one row that the issue allows on sm_90, by the bits of a code.
MOST = {4: 3.2, 8: 2.5}
BITS = {"q4_0": 4, "q4_1": 4, "q4_k": 4, "q8_0": 8}
CASES = [*product(DENSE, (80, 89, 90, 100, 120)), MIXED, *MOE]


@cache
def reported(family, arch, bucket):
    step = compiled_step(family, arch)
    return report(step.kernel(bucket), step.source.text, body_formats(step.program))


@each(CASES, *BUCKETS)
def test_it_spills_nothing_fits_the_machine_and_reads_weights_by_16_bytes(family, arch, bucket):
    assert problems(reported(family, arch, bucket), machine_for(f"sm_{arch}")) == []


@each(CASES, *BUCKETS)
def test_it_keeps_the_rules_of_synchronisation(family, arch, bucket):
    assert lint(compiled_step(family, arch).kernel(bucket).ptx) == []


@each(CASES, "few")
def test_one_row_is_bound_by_bytes_not_by_issue(family, arch, bucket):
    machine = machine_for(f"sm_{arch}")
    matrices = [b for b in reported(family, arch, bucket).branches if b.format]
    assert matrices
    for branch in matrices:
        one = min(loop.per_weight for loop in branch.loops)
        assert one < budget(branch, machine)
        if arch == 90 and branch.format in BITS:
            assert one <= MOST[BITS[branch.format]]


def test_wide_heads_leave_the_ring_its_room():
    """On the machine with the least shared memory, with large chunks of weights."""
    limits, machine = Limits(rows=16, slots=2, context=512, outputs=4), machine_for("sm_120")
    model = tiny("gemma3", "q6_k", hidden=256, ffn=256, heads=4, kv_heads=2, head_dim=256)
    source = render_kernel({b: model.schedule(b, 4, limits) for b in BUCKETS})
    ring = (stages(source.slot_bytes, machine.shared_bytes_per_block), source.slot_bytes)
    made = compile_kernel(source.text, limits, source.kv_names, 120, "few", ring)
    assert made.shared <= machine.shared_bytes_per_block
    assert made.shared - ring[0] * ring[1] <= OWN_BYTES + SHELF_BYTES


@group("qwen3")
def test_every_instruction_is_the_table_loops_or_a_branchs():
    found = reported("qwen3", 90, "few")
    assert found.loop + sum(b.instructions for b in found.branches) == sum(found.mix.values())
    assert found.loop < 0.2 * sum(found.mix.values())


@group("qwen3")
def test_branches_cost_each_other_few_registers():
    """The kernel needs what its worst branch needs alone, and little more."""
    found = reported("qwen3", 90, "few")
    worst = max(found.branches, key=lambda b: b.instructions)
    # The commit takes little, and has the kernel use shared memory.
    commit = next(b for b in found.branches if any("commit" in title for title in b.titles))
    step = compiled_step("qwen3", 90)
    by_itself = step.compile(only(step.source.text, found.entry, {worst.function, commit.function}), "few")
    assert found.registers <= by_itself.registers + 32


@group("qwen3")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spills": 8}, "spilled bytes: expected at most 0, got 8"),
        ({"shared": 300_000}, "dynamic shared bytes: expected at most 232448, got 300000"),
        ({"warps": 16, "registers": 255}, "registers of 1 blocks: expected at most 65536, got 130560"),
    ],
)
def test_what_does_not_fit_is_named(change, reason):
    found = replace(reported("qwen3", 90, "few"), **change)
    assert any(reason in r for r in problems(found, machine_for("sm_90")))


@group("qwen3")
def test_narrow_loads_and_local_memory_are_named():
    found = reported("qwen3", 90, "few")
    branch = next(b for b in found.branches if b.format)
    narrow = replace(branch, loops=(replace(branch.loops[0], widths={32: 4}),))
    reasons = problems(replace(found, branches=(narrow,)), machine_for("sm_90"))
    assert any("expected 16-byte loads of codes, got 4 of 32 bits" in r for r in reasons)
    local = problems(replace(found, branches=(replace(branch, local=2),)), machine_for("sm_90"))
    assert any("local memory instructions where matrices are read: expected at most 0, got 2" in r for r in local)
    none = problems(replace(found, branches=(replace(branch, loops=()),)), machine_for("sm_90"))
    assert any("expected a loop with a load marked" in r for r in none)
