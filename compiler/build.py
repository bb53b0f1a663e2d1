"""Compile the generated C++ with the system's compiler into a shared library."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..codegen.cpu.units import STEP
from ..ir.errors import HostError
from ..runtime import host

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w")
# GCC's interprocedural alias analysis misses stores whose address loop optimisation derived from another
# pointer, and then drops the call: 12.2 left out the q matrix of a model with 4 heads of 16.
CAUTION = "-fno-ipa-modref"
COMPILE_SECONDS = 300


@dataclass(frozen=True)
class Level:
    """An instruction-set level: the compiler's options and the /proc/cpuinfo flags a host must have."""

    name: str
    number: int
    options: tuple[str, ...]
    isa: tuple[str, ...]


AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512vbmi")
LEVELS = {
    "cpu-avx512": Level(
        "cpu-avx512", 2, ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"), AVX512
    ),
    "cpu-avx2": Level("cpu-avx2", 1, ("-march=x86-64-v3",), ("avx2", "fma", "f16c")),
    "cpu-portable": Level("cpu-portable", 0, (), ()),
}


def host_flags() -> frozenset[str]:
    """Instruction-set flags of this machine; empty where the system does not list them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset()
    line = next((x for x in info.read_text().splitlines() if x.startswith("flags")), "")
    return frozenset(line.split(":", 1)[-1].split())


def host_level() -> Level:
    """The best level this machine runs."""
    flags = host_flags()
    return next(level for level in LEVELS.values() if set(level.isa) <= flags)


def find_compiler() -> list[str]:
    """The command of a C++17 compiler: $CXX, c++, g++, clang++, else `python -m ziglang c++`."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if name and (path := shutil.which(name)):
            return [path]
    try:
        import ziglang  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise HostError(
            f"expected a C++ compiler, found none (looked for {named or 'c++, g++, clang++'})",
            hint="install g++ or clang, or `pip install ziglang`",
        ) from None
    return [sys.executable, "-m", "ziglang", "c++"]


@cache
def _version(command: tuple[str, ...]) -> str:
    """The compiler's version line."""
    text = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return text.splitlines()[0] if text else " ".join(command)


@cache
def _accepts(command: tuple[str, ...], option: str) -> bool:
    """Whether the compiler knows an option: clang and GCC before 11 do not know all of ours."""
    probe = [*command, "-Werror", option, "-x", "c++", "-E", "-"]
    return subprocess.run(probe, input=b"", capture_output=True).returncode == 0


def compile_library(sources: Sequence[Path], library: Path, level: Level) -> str:
    """Compile and link `sources` into `library`; returns the compiler's version line. Raises HostError.

    Objects of units that models share are kept beside the kernels that artifacts run from (`runtime/host.py`).
    """
    command = tuple(find_compiler())
    version = _version(command)
    machine = level.options if platform.machine() in ("x86_64", "AMD64") else ()
    caution = [CAUTION] if _accepts(command, CAUTION) else []
    flags = [*FLAGS, *machine, *caution, f"-DOL_LEVEL={level.number}"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(host.cores()) as pool:
        objects = list(pool.map(lambda source: _object([*command, *flags], version, source, Path(folder)), sources))
        _run([*command, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
    return version


def _object(command: list[str], version: str, source: Path, folder: Path) -> Path:
    """One compiled source: in `folder`, or kept from the last time unless it is the model's own."""
    made = folder / f"{source.stem}.o"
    compiling = [*command, "-c", str(source), "-o", str(made)]
    if source.stem == STEP:
        _run(compiling)
        return made
    factors = [source.read_text(), *command, version]
    kept = host.kernel_folder() / f"{hashlib.sha256(chr(0).join(factors).encode()).hexdigest()}.o"
    if not kept.exists():
        _run(compiling)
        place = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        shutil.copy(made, place)
        os.replace(place, kept)
    return kept


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise HostError(f"the C++ compiler ran longer than {COMPILE_SECONDS} s: {' '.join(command)}") from None
    if done.returncode:
        first = "\n".join(done.stderr.splitlines()[:12])
        raise HostError(
            f"the C++ compiler failed (exit {done.returncode}): {' '.join(command)}\n{first}",
            hint="needs C++17: g++ 9 or clang 10 and newer",
        )
