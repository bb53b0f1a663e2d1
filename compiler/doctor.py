"""What this machine has, and what onelaunch misses on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ..ir.errors import HostError
from ..runtime import host
from ..runtime.artifact import Artifact
from ..runtime.cuda import probe
from ..runtime.load import why_not
from .build import LEVELS, find_compiler, host_flags, host_level
from .ondemand import cache_folder

NEEDED = (
    "lark", "jinja2", "networkx", "numpy", "torch", "safetensors", "tokenizers", "typer", "rich", "ml-dtypes",
    "filelock",
)  # fmt: skip
OPTIONAL = ("gguf", "triton", "cuda-bindings", "transformers", "ziglang")
PROBE = "numpy sum of a buffer larger than the caches, one thread per core"


@dataclass(frozen=True)
class Finding:
    """One line of the report; status: ok, note (works without) or missing (needed)."""

    name: str
    value: str
    status: str = "ok"
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        return {k: v for k, v in asdict(self).items() if v}


def examine() -> list[Finding]:
    """Everything, in the order of reading."""
    return [*_system(), *_processor(), *_memory(), _compiler(), _cache(), *_packages(), *examine_gpus(), _bandwidth()]


def _system() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding("python", platform.python_version(), "missing" if old else "ok", "needs 3.11" if old else "")
    yield Finding("platform", platform.platform())


def _processor() -> Iterator[Finding]:
    level, flags = host_level(), host_flags()
    hint = "" if level.number else "the portable kernels are several times slower"
    yield Finding("cpu level", level.name, "ok" if level.number else "note", hint)
    known = [flag for each in LEVELS.values() for flag in each.isa]
    yield Finding("cpu flags", " ".join(f for f in dict.fromkeys(known) if f in flags) or "none we use")
    yield Finding("cores", f"{host.cores()} of {os.cpu_count()} usable")


def _memory() -> Iterator[Finding]:
    info = Path("/proc/meminfo")
    if info.exists():
        lines = [line.split() for line in info.read_text().splitlines() if line.endswith("kB")]
        gib = {words[0].rstrip(":"): int(words[1]) / 2**20 for words in lines}
        yield Finding("memory", f"{gib['MemAvailable']:.1f} of {gib['MemTotal']:.1f} GiB available")
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists():
        text = setting.read_text()
        chosen = text[text.find("[") + 1 : text.find("]")]
        hint = "reading weights takes 10-20 % longer on small pages: set it to madvise" if chosen == "never" else ""
        yield Finding("huge pages", chosen, "note" if hint else "ok", hint)


def _compiler() -> Finding:
    try:
        command = find_compiler()
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30)
    except HostError as error:
        return Finding("c++ compiler", error.reasons[0], "missing", error.hint)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("c++ compiler", f"does not start: {error}", "missing", "install g++ or clang")
    version = (done.stdout.splitlines() or ["unknown version"])[0]
    return Finding("c++ compiler", f"{' '.join(command)}: {version}")


def _cache() -> Finding:
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return Finding("cache", f"{folder} cannot be written", "missing", "set ONELAUNCH_CACHE to a folder you own")
    free = shutil.disk_usage(existing).free / 2**30
    return Finding("cache", f"{folder}, {free:.1f} GiB free", "ok" if free > 1 else "note")


def _packages() -> Iterator[Finding]:
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            status, hint = ("missing", f"pip install {name}") if name in NEEDED else ("note", "")
            yield Finding(name, "not installed", status, hint)


def examine_gpus() -> Iterator[Finding]:
    """NVIDIA's driver and what it drives, as the runtime finds them."""
    found = probe()
    if "error" in found:
        yield Finding("cuda", f"{found['error']}: GPU targets cannot run on this machine", "note", found["hint"])
        return
    yield Finding("cuda", f"driver {found['release'] or 'of an unknown release'} for CUDA {found['driver']}")
    for device in found["devices"]:
        value = f"{device['name']}: {device['arch']}, {device['sms']} SMs, {device['memory'] / 2**30:.1f} GiB"
        yield Finding(f"gpu {device['ordinal']}", value)


def examine_artifact(path: Path) -> list[Finding]:
    """Each target of an artifact: whether it would be used on this machine, and why not."""
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    found = [Finding("artifact", f"{manifest.name}: {manifest.family}, {', '.join(manifest.target_names)}")]
    if not manifest.weights_packed:
        value = "not packed: it was compiled with --no-weights to be inspected"
        found.append(Finding("weights", value, "missing", "compile the model again without that option"))
    reasons = {name: why_not(artifact, name) for name in manifest.target_names}
    chosen = _chosen(artifact, reasons)
    for name, reason in reasons.items():
        if reason:
            found.append(Finding(f"target {name}", f"not used: {reason}", "note" if chosen else "missing"))
        else:
            value = "used here" if name == chosen else f"runs here, but `{chosen}` is used"
            found.append(Finding(f"target {name}", value))
    return found


def _chosen(artifact: Artifact, reasons: Mapping[str, str]) -> str:
    """The target that `load` takes if nobody asks for one: the newest for a device, else the best for the processor."""
    gpus = [t for t in artifact.manifest.cuda_targets if not reasons[t.name]]
    if gpus:
        return max(gpus, key=lambda target: target.version).name
    cpus = [t for t in artifact.manifest.targets if not reasons[t.name]]
    return max(cpus, key=lambda target: target.level).name if cpus else ""


def _bandwidth() -> Finding:
    try:
        return Finding("read bandwidth", f"{read_bandwidth():.1f} GB/s ({PROBE})")
    except (ImportError, MemoryError) as error:
        return Finding("read bandwidth", f"not measured: {error}", "note")


def read_bandwidth(megabytes: int = 192, rounds: int = 3) -> float:
    """GB/s of a plain read by numpy on every usable core, best of `rounds`: an estimate, a little low."""
    import numpy as np

    data, workers = np.ones(megabytes << 17, np.int64), host.cores()
    parts = np.array_split(data, workers)
    best = 0.0
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(rounds + 1):  # the first one starts the threads
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, data.nbytes / (time.perf_counter() - start) * 1e-9)
    return best
