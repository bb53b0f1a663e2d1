"""The synchronisation lint passes what we generate and flags planted errors."""

from __future__ import annotations

import re

import pytest
from compiled_kernels import kernel

from onelaunch.compiler.sync_lint import lint, parse


@pytest.fixture(scope="module")
def ptx():
    return kernel("qwen3", 90, "few").ptx


def rules(text):
    return {fault.rule for fault in lint(text)}


def without_barrier(ptx, line, step):
    """The PTX without the barriers that come next to a line, before it (step -1) or after it (1)."""
    lines, near = ptx.splitlines(), line + step
    while not re.search(r"\b(ld|st)\.global|cp\.async|\bbra\b|^\$L__BB", lines[near]):
        if "bar.sync" in lines[near]:
            lines[near] = ""
        near += step
    return "\n".join(lines)


def find(ptx, pattern):
    return next(i for i, line in enumerate(ptx.splitlines()) if re.search(pattern, line))


def test_our_kernel_is_clean(ptx):
    assert lint(ptx) == []


def test_a_relaxed_signal_is_flagged(ptx):
    planted = re.sub(r"(red|atom)\.global\.gpu\.release\.add", r"\1.global.gpu.relaxed.add", ptx)
    assert planted != ptx
    assert rules(planted) == {"release"}


def test_a_signal_without_a_barrier_before_it_is_flagged(ptx):
    planted = without_barrier(ptx, find(ptx, r"gpu\.release\.add"), -1)
    assert planted != ptx
    assert "stores" in rules(planted)


def test_a_wait_without_a_barrier_after_it_is_flagged(ptx):
    planted = without_barrier(ptx, find(ptx, r"ld\.acquire\.gpu"), 1)
    assert planted != ptx
    assert "loads" in rules(planted)


def test_a_relaxed_wait_is_flagged(ptx):
    assert rules(ptx.replace("ld.acquire.gpu", "ld.relaxed.gpu")) == {"acquire"}


def test_an_asynchronous_copy_over_a_wait_is_flagged(ptx):
    lines = ptx.splitlines()
    poll = find(ptx, r"ld\.relaxed\.gpu")
    lines.insert(poll, "cp.async.cg.shared.global [%r1], [%rd1], 16;")
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
        ("cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.wait_group 0; ld.relaxed.gpu.u32 %r1, [%rd1];", set()),
    ],
)  # fmt: skip
def test_every_path_is_followed(code, expected):
    assert rules(f".entry step()\n{{\n{code} ret;\n}}\n") == expected


def test_labels_are_scoped_by_braces():
    text = ".entry f()\n{\n{ L: bra L; }\n{ L: bra L; }\nbra L;\nL: ret;\n}\n"
    assert [s.after for s in parse(text)] == [(0,), (1,), (3,), ()]
