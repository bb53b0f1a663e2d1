"""One kernel compiled in a process of its own: they run side by side, and Triton's output stays there.

Not multiprocessing: that would import the caller's main script again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...codegen.triton.build import Kernel, compile_kernel
from ...ir.errors import CompileError, HostError, OnelaunchError
from ...ir.limits import Limits

COMPILE_SECONDS = 900
JOB, RESULT, CUBIN = "job.json", "result.json", "step.cubin"
ERRORS: dict[str, type[OnelaunchError]] = {"CompileError": CompileError, "HostError": HostError}


def compile_apart(
    text: str, limits: Limits, kv_names: Sequence[str], arch: int, bucket: str, ring: tuple[int, int],
    warps: int
) -> Kernel:
    """`compile_kernel` in another process. CompileError and HostError as there; HostError if that process dies."""
    with tempfile.TemporaryDirectory(prefix="onelaunch-") as name:
        folder = Path(name)
        job = {"text": text, "limits": limits.as_dict(), "kv_names": list(kv_names), "arch": arch}
        job |= {"bucket": bucket, "ring": ring, "warps": warps}
        (folder / JOB).write_text(json.dumps(job))
        command = [sys.executable, "-m", __name__, name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise HostError(f"sm_{arch}: compiling took longer than {COMPILE_SECONDS} s") from None
        if not (folder / RESULT).is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise HostError(
                f"sm_{arch}: expected a kernel, got a compiler process that ended with {done.returncode}: {last}",
                hint="Triton needs some GB of memory for a large kernel" if done.returncode < 0 else "",
            )
        result = json.loads((folder / RESULT).read_text())
        if "error" in result:
            raise ERRORS[result["error"]](result["reasons"], hint=result["hint"])
        return Kernel(**result, cubin=(folder / CUBIN).read_bytes())


def main(folder: Path) -> None:
    """The other process: read the job, leave the kernel or the error."""
    job = json.loads((folder / JOB).read_text())
    result: dict[str, Any]
    try:
        limits = Limits(**job["limits"])
        kernel = compile_kernel(
            job["text"], limits, job["kv_names"], job["arch"], job["bucket"], tuple(job["ring"]), job["warps"]
        )
        result = asdict(kernel)
        (folder / CUBIN).write_bytes(result.pop("cubin"))
    except (CompileError, HostError) as error:
        result = {"error": type(error).__name__, "reasons": error.reasons, "hint": error.hint}
    (folder / RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
