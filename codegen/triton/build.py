"""Compile the generated kernel for one GPU architecture, on any machine: PTX, cubin and what it uses.

Triton cross-compiles without a driver; ptxas and cuobjdump are in its wheel.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...ir.errors import CompileError, HostError
from ...ir.limits import Limits
from ...ir.record import RECORD_WORDS
from ...ir.tuning import CHOICES

WARPS = CHOICES["warps"].default
REGISTERS = 255  # a thread's limit on every architecture we know; one CTA of 256 threads may use them all
# What depends on the thread's number alone leaves the table loop and would be held, or spilled, all along it.
# The variable takes names of any LLVM switches, for Triton to turn on.
LLVM_SWITCHES = {"DISABLE_LLVM_OPT": "sink-insts-to-avoid-spills"}
OPTIONS = {"num_stages": 3, "maxnreg": REGISTERS, "launch_cooperative_grid": True}
SHELF_BYTES = 4 * 4 * RECORD_WORDS  # of shared memory, the last: four records of the task table
MOST_STAGES = CHOICES["ring"].default  # chunks in the ring, at most
RING_BYTES = 152 << 10  # what of shared memory the ring may take: the rest is the L1 cache
OWN_BYTES = 40 << 10  # what Triton takes itself, at most, where the ring is sized
KV_TYPES = {"bf16": "*bf16", "f32": "*fp32"}
HIDDEN = (("global_scratch", "*i8"), ("profile_scratch", "*i8"))  # Triton appends both; null when unused


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. `spills` are bytes of spill stores and loads.

    arch: what the machine code is for, sm_90a where it runs on no other than 9.0.
    shared, static_shared: bytes of shared memory asked for at the launch, and reserved by the code (1024 of them by
    the system from sm_90 on).
    The PTX and the cubin carry line information: it names lines of the generated text, no path.
    """

    arch: str
    entry: str
    ptx: str
    cubin: bytes
    warps: int
    shared: int
    registers: int
    stack: int
    spills: int
    static_shared: int
    params: tuple[tuple[str, str], ...]
    versions: dict[str, str]
    options: dict[str, Any]


def signature(limits: Limits, kv_names: Sequence[str]) -> dict[str, str]:
    """The kernel's parameters in order and their Triton types."""
    kv = dict.fromkeys(kv_names, KV_TYPES[limits.kv_dtype])
    pointers = {"table": "*i32", "control": "*i32", "weights": "*i32", "workspace": "*fp32", "state": "*i32"}
    return {**pointers, **kv, "stream": "*i64", "records": "i32", "chunks": "i32"}


def stages(slot_bytes: int, shared_bytes: int, most: int = MOST_STAGES) -> int:
    """Chunks, `most` of them at most, in the ring of a machine with so much shared memory per block.

    CompileError if it has no room for two.
    """
    found = min(min(shared_bytes - OWN_BYTES - SHELF_BYTES, RING_BYTES) // slot_bytes, most)
    if found < 2:
        raise CompileError(
            f"expected {OWN_BYTES + SHELF_BYTES + 2 * slot_bytes} bytes of shared memory per block, got {shared_bytes}"
        )
    return found


@contextmanager
def llvm_switches() -> Iterator[None]:
    """Within it Triton compiles with LLVM_SWITCHES."""
    before = {name: os.environ.get(name) for name in LLVM_SWITCHES}
    os.environ.update(LLVM_SWITCHES)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def stop_at_ptx(*pipeline: Any) -> tuple[str, str] | None:
    """Triton's hook into its stages: without the last, as `assemble` makes the cubin. Alone, its key for caches."""
    if not pipeline:
        return "ptx only", "ptx only"
    _, stages, *_ = pipeline
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def load_module(text: str) -> ModuleType:
    """The generated text as a module; Triton finds its source through linecache."""
    name = f"onelaunch_step_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    path = f"<{name}>"
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    module = ModuleType(name)
    module.__file__ = path
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def compile_kernel(
    text: str,
    limits: Limits,
    kv_names: Sequence[str],
    arch: int,
    bucket: str,
    ring: tuple[int, int],
    warps: int = WARPS,
) -> Kernel:
    """Compile the kernel of a row bucket for `arch` (90 = sm_90). CompileError where Triton refuses it.

    ring: chunks, and bytes of each, that the kernel has in shared memory behind Triton's own.
    """
    # FMA contraction as on the CPU's f32 paths is not promised; fixed, so that results do not move with Triton.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise HostError(f"expected Triton for GPU targets, got {error}", hint="pip install triton") from None
    step = getattr(load_module(text), f"step_{bucket}")
    types = signature(limits, kv_names)
    names = list(step.arg_names)
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")}
    source = ASTSource(
        fn=step, signature={**types, "STAGES": "constexpr"}, constexprs={"STAGES": ring[0]}, attrs=aligned
    )
    options = OPTIONS | {"num_warps": warps}
    try:
        with llvm_switches(), knobs.runtime.scope():
            knobs.runtime.add_stages_inspection_hook = stop_at_ptx
            made: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        raise CompileError(f"sm_{arch}: Triton could not compile the step: {str(error).splitlines()[0]}") from error
    ptx = portable(made.asm["ptx"])
    cubin, usage = assemble(ptx, arch)
    params = (*types.items(), *HIDDEN)
    return Kernel(
        code_arch(ptx), made.metadata.name, ptx, cubin, made.metadata.num_warps,
        launch_shared(made.metadata.shared, ring, bucket), usage["registers"], usage["stack"], usage["spills"],
        usage["static_shared"], params,
        {"triton": triton.__version__, "ptxas": ptxas_version(arch)},
        {**options, **LLVM_SWITCHES, "fp_fusion": os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"},
    )  # fmt: skip


def launch_shared(own: int, ring: tuple[int, int], bucket: str) -> int:
    """Bytes of shared memory a launch asks for: Triton's own, then the ring, then the shelf of records."""
    return -(-own // 128) * 128 + (ring[0] * ring[1] if bucket == "few" else 0) + SHELF_BYTES


def code_arch(ptx: str) -> str:
    """The architecture that PTX is for: Triton takes the `a` variant from sm_90 on."""
    found = re.search(r"^\.target (sm_\d+[af]?)", ptx, re.MULTILINE)
    if found is None:
        raise HostError("triton: expected PTX with a `.target`, got none")
    return found[1]


def run_tool(name: str, *words: str) -> str:
    """What a CUDA tool of Triton's wheel prints: cuobjdump or nvdisasm."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([str(tool), *words], capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"{name}: {done.stderr.strip() or 'failed'}")
    return done.stdout


def _ptxas(arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(arch).path)


def ptxas_version(arch: int) -> str:
    """The release of the assembler that made the cubin: it decides which drivers load it."""
    text = subprocess.run([_ptxas(arch), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "unknown"


def portable(ptx: str) -> str:
    """The same PTX with line information that is right, and that does not depend on where it was made.

    Triton's library is named by its installation's path. Inside inline assembly LLVM counts the lines of the
    assembly as if they were lines of the module: there the line of the statement stays.
    """
    text = re.sub(r'(\.file\s+\d+\s+)"[^"]*/(triton/language/)', r'\1"\2', ptx)
    inside, kept = False, []
    for line in text.splitlines():
        inside = "// begin inline asm" in line or (inside and "// end inline asm" not in line)
        if not (inside and line.lstrip().startswith(".loc")):
            kept.append(line)
    return "\n".join(kept) + "\n"


def assemble(ptx: str, arch: int) -> tuple[bytes, dict[str, int]]:
    """The cubin of a PTX text, with line information, and what it uses.

    Uses: registers per thread, bytes of stack, bytes spilled, bytes of static shared memory. The flags are those
    Triton gives ptxas.
    """
    name = f"--gpu-name={code_arch(ptx)}"
    with tempfile.TemporaryDirectory() as folder:
        binary, text = Path(folder, "step.cubin"), Path(folder, "step.ptx")
        text.write_text(ptx)
        command = [_ptxas(arch), "-lineinfo", "-v", "--regAllocOptLevel=2", name, str(text), "-o", str(binary)]
        assembled = subprocess.run(command, capture_output=True, text=True)
        log = assembled.stdout + assembled.stderr
        if assembled.returncode:
            raise CompileError(f"sm_{arch}: ptxas could not assemble the step: {log.strip().splitlines()[0]}")
        dumped = run_tool("cuobjdump", "--dump-resource-usage", str(binary))
        cubin = binary.read_bytes()
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", dumped)
    if found is None:
        raise HostError(f"cuobjdump: expected a resource line, got {dumped[:200]!r}")
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    usage = {"registers": int(found[1]), "stack": int(found[2]), "static_shared": int(found[3])}
    return cubin, {**usage, "spills": sum(map(int, spilled))}
