"""The synchronisation lint passes what we generate and flags planted errors."""

from __future__ import annotations

import planted
import pytest
from compiled_kernels import compiled_step, group

from onelaunch.compiler.gpu.sync_lint import lint, parse

pytestmark = group("qwen3")


@pytest.fixture(scope="module")
def ptx():
    return compiled_step("qwen3", 90).kernel("few").ptx


def rules(text):
    return {fault.rule for fault in lint(text)}


def test_our_kernel_is_clean(ptx):
    assert lint(ptx) == []


BROKEN_RULE = {
    "signal_without_release": "release", "signal_without_barrier": "stores",
    "wait_without_acquire": "acquire", "wait_without_barrier": "loads",
}  # fmt: skip


@pytest.mark.parametrize("fault", planted.faults("ptx", planted.LINT), ids=lambda f: f.name)
def test_faults_of_compiled_code_are_flagged(ptx, fault):
    assert rules(fault.apply(ptx)) == {BROKEN_RULE[fault.name]}


def test_an_asynchronous_copy_over_a_wait_is_flagged(ptx):
    lines = ptx.splitlines()
    poll = next(i for i, line in enumerate(lines) if "ld.relaxed.gpu" in line)
    lines.insert(poll, "cp.async.cg.shared.global [%r1], [%rd1], 0x10;")
    assert "pipeline" in rules("\n".join(lines))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("st.global.b32 [%rd1], %r1; bar.sync 0; red.release.gpu.global.add.u32 [%rd2], 1;", set()),
        ("st.global.b32 [%rd1], %r1; red.release.gpu.global.add.u32 [%rd2], 1;", {"stores"}),
        ("bar.sync 0; red.release.cta.global.add.u32 [%rd2], 1;", {"release"}),
        ("ld.acquire.gpu.global.u32 %r1, [%rd1]; bar.sync 0; ld.global.b32 %r2, [%rd2];", set()),
        ("ld.acquire.gpu.global.u32 %r1, [%rd1]; ld.global.b32 %r2, [%rd2];", {"loads"}),
        ("ld.acquire.gpu.global.u32 %r1, [%rd1]; @%p1 bra O; bar.sync 0; O: ld.global.b32 %r2, [%rd2];", {"loads"}),
        ("A: st.global.b32 [%rd1], %r1; bra B; C: red.release.gpu.global.add.u32 [%rd2], 1; B: bra C;", {"stores"}),
        ("{ bra OUT; st.global.b32 [%rd1], %r1; OUT: } red.release.gpu.global.add.u32 [%rd2], 1;", set()),
        ("cp.async.ca.shared.global [%r1], [%rd1], 0x4; cp.async.wait_group 0; ld.relaxed.gpu.u32 %r1, [%rd1];", set()),
    ],
)  # fmt: skip
def test_every_path_is_followed(code, expected):
    assert rules(f".entry step()\n{{\n{code} ret;\n}}\n") == expected


def test_labels_are_scoped_by_braces():
    text = ".entry f()\n{\n{ L: bra L; }\n{ L: bra L; }\nbra L;\nL: ret;\n}\n"
    assert [s.after for s in parse(text)] == [(0,), (1,), (3,), ()]
