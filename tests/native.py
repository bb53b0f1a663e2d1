"""Builds the C++ harnesses of the tests, once per SIMD level that this host can run."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
TEMPLATES = TESTS.parent / "codegen" / "cpu" / "templates"
LEVEL_FLAGS = {
    2: ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"],
    1: ["-march=x86-64-v3"],
    0: ["-march=x86-64-v2"],
}
LEVEL_NEEDS = {
    2: {"avx512f", "avx512_vnni", "avx512_bf16", "avx512vbmi"},
    1: {"avx2", "fma", "f16c"},
    0: set(),
}


def host_levels() -> list[int]:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return [level for level, needs in LEVEL_NEEDS.items() if needs <= flags]


def build(harness: str, level: int) -> ctypes.CDLL:
    """Compile tests/`harness` for one level and load it; once, also where that fails."""
    made = _build(harness, level)
    if isinstance(made, Exception):
        raise made
    return made


@functools.cache
def _build(harness: str, level: int) -> ctypes.CDLL | Exception:
    try:
        return _compile(harness, level)
    except subprocess.CalledProcessError as error:
        return error


def _compile(harness: str, level: int) -> ctypes.CDLL:
    """The file may go once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/harness.so"
        subprocess.run(
            [
                *[
                    "g++",
                    "-O2",
                    "-std=c++17",
                    "-ffp-contract=off",
                    "-Wall",
                    "-Wextra",
                    "-Werror",
                    "-Wno-psabi",
                ],
                *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],  # GCC 12's own AVX-512 headers
                *[*LEVEL_FLAGS[level], f"-DOL_LEVEL={level}", f"-I{TEMPLATES}"],
                *["-shared", "-fPIC", str(TESTS / harness), "-o", out],
            ],
            check=True,
        )
        return ctypes.CDLL(out)
