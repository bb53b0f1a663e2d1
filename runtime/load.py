"""From an artifact on disk to a model that runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.errors import LoadError, UsageError
from ..ir.segments import SEGMENTS
from .artifact import Artifact
from .backend import Backend
from .cache import page_counts
from .cpu import CpuBackend
from .memory import Memory
from .model import Model

if TYPE_CHECKING:
    from .cuda_driver import Device, Driver
    from .manifest import CudaTarget
    from .tokenizer import Tokenizer


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    target: str | None = None,
    kv_tokens: int | None = None,
    segments: str = "mega",
) -> Model:
    """Verify an artifact and make it ready to run.

    threads: workers, one of the compiled counts; None = the most this machine has cores (or a device has room)
    for. target: None = an NVIDIA device that can run the artifact, else the best for this processor.
    kv_tokens: tokens all live requests may hold together; None = every slot at full context.
    segments: on an NVIDIA device, "mega" runs a step as one launch, "per-phase" as a launch per phase of the same
    tiles, there to be compared with. A processor runs steps whole.
    """
    if segments not in SEGMENTS:
        raise UsageError(f"segments: expected {' or '.join(SEGMENTS)}, got `{segments}`")
    artifact = Artifact.open(path)
    counts = page_counts(artifact.manifest.caches, artifact.manifest.limits, kv_tokens)
    found = _find_device(artifact, target, segments)
    backend: Backend
    if found:
        from .cuda import open_backend

        backend, workers = open_backend(artifact, found, threads, counts, segments)
        chosen = found[2].name
    else:
        if segments != "mega":
            raise UsageError(
                f"segments: expected `mega` on a processor, got `{segments}`",
                hint="only a GPU target's step can be cut into launches, on a machine with such a device",
            )
        backend, workers, chosen = _on_processor(artifact, target, threads, counts)
    model = Model(
        artifact.manifest, backend, counts, lambda: _tokenizer(artifact), target=chosen, threads=workers,
        segments=segments,
    )  # fmt: skip
    try:
        model.step([0])  # starts threads and touches memory: paid here, not by the first request
        model.reset()
    except BaseException:
        model.close()
        raise
    return model


def _find_device(artifact: Artifact, target: str | None, segments: str) -> tuple[Driver, Device, CudaTarget] | None:
    """Where to run a CUDA target; None: on the processor. CUDA is only looked at if the artifact has such."""
    targets = artifact.cuda_targets(target)
    if not targets:
        return None
    from .cuda import find_device
    from .cuda_driver import NoDevice

    try:
        return find_device(targets)
    except (NoDevice, LoadError):
        if target is None and artifact.manifest.targets and segments == "mega":
            return None
        raise


def _on_processor(
    artifact: Artifact, target: str | None, threads: int | None, kv_pages: Sequence[int]
) -> tuple[Backend, int, str]:
    chosen, workers = artifact.pick_target(target), artifact.pick_threads(threads)
    tables = artifact.tables(workers)
    memory = Memory.allocate(artifact.manifest, tables, artifact.verify(), kv_pages)
    return CpuBackend(artifact.library(chosen), chosen, artifact.manifest, memory), workers, chosen.name


def _tokenizer(artifact: Artifact) -> Tokenizer | None:
    if not any(name.startswith("tokenizer/") for name in artifact.manifest.files):
        return None
    from .tokenizer import Tokenizer  # here: its library takes 0.1 s to import

    with tempfile.TemporaryDirectory(prefix="onelaunch-") as folder:
        artifact.unpack("tokenizer/", Path(folder))
        return Tokenizer.load(folder)
