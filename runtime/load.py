"""From an artifact on disk to a model that runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.errors import OnelaunchError, UsageError, nearest
from ..ir.segments import SEGMENTS
from .artifact import Artifact
from .backend import Backend
from .cache import page_counts
from .cpu import CpuBackend
from .memory import Memory
from .model import Model
from .speculate import drafts_of

if TYPE_CHECKING:
    from .cuda_target import CudaTarget
    from .tokenizer import Tokenizer


DEVICES = ("auto", "cpu", "cuda")
Opened = tuple[Backend, int, str]  # with its worker count and the name of its target


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    target: str | None = None,
    device: str = "auto",
    kv_tokens: int | None = None,
    segments: str = "mega",
    prefix_cache: bool = True,
    speculate: str = "auto",
) -> Model:
    """Verify an artifact and make it ready to run.

    threads: workers, one of the compiled counts; None = the most this machine has cores (or a device has room)
    for. device: `cuda` or `cpu`; `auto` = an NVIDIA device if one here can run the artifact, else the processor.
    target: one of the artifact's by name; None = the best. kv_tokens: tokens all live requests may hold together;
    None = every slot at full context. segments: on an NVIDIA device, "mega" runs a step as one launch, "per-phase"
    as a launch per phase of the same tiles, there to be compared with. A processor runs steps whole. prefix_cache:
    keep what prompts and answers left in the KV cache until its pages are needed; a prompt that begins the same is
    read from there on, with the same result. speculate: guess tokens from what the text said before and check several
    in one step, with the same result: `ngram:K` up to K; `auto`, as many as were compiled in, but `off` on a GPU.
    """
    if segments not in SEGMENTS:
        raise UsageError(f"segments: expected {' or '.join(SEGMENTS)}, got `{segments}`")
    artifact = Artifact.open(path)
    artifact.expect_weights()
    drafts = drafts_of(speculate, artifact.manifest.limits)  # refused before anything is loaded
    counts = page_counts(artifact.manifest.caches, artifact.manifest.limits, kv_tokens)
    gpus, may_fall_back = _candidates(artifact, target, device)
    may_fall_back &= segments == "mega"  # a processor cannot stand in for a step in segments
    opened = _on_device(artifact, gpus, may_fall_back, threads, counts, segments) if gpus else None
    if opened is None and segments != "mega":
        raise UsageError(
            f"segments: expected `mega` on a processor, got `{segments}`",
            hint="only a GPU target's step can be cut into launches, on a machine with such a device",
        )
    if opened and speculate == "auto":
        drafts = 0  # what it brings on a GPU is not measured
    backend, workers, chosen = opened or _on_processor(artifact, target, threads, counts)
    model = Model(
        artifact.manifest, backend, counts, lambda: read_tokenizer(artifact), target=chosen, threads=workers,
        segments=segments, prefix_cache=prefix_cache, drafts=drafts,
    )  # fmt: skip
    try:
        model.step([0])  # starts threads and touches memory: paid here, not by the first request
        model.reset()
    except BaseException:
        model.close()
        raise
    return model


def why_not(artifact: Artifact, name: str) -> str:
    """Why a target of an artifact does not run on this machine, or "" if it does."""
    try:
        gpus = artifact.cuda_targets(name)
        if gpus:
            from .cuda import check_device

            check_device(artifact, gpus[0])
        else:
            artifact.pick_target(name)
    except OnelaunchError as error:
        return "; ".join(error.reasons)
    return ""


def _candidates(artifact: Artifact, target: str | None, device: str) -> tuple[tuple[CudaTarget, ...], bool]:
    """The GPU targets to try, and whether the processor may do instead."""
    gpus, place = artifact.cuda_targets(target), str(artifact.path)
    if device not in DEVICES:
        raise UsageError(f"device: expected one of {', '.join(DEVICES)}, got `{device}`", hint=nearest(device, DEVICES))
    if target is not None and device != "auto" and bool(gpus) != (device == "cuda"):
        raise UsageError(f"device: expected the one target `{target}` is for, got `{device}`", place=place)
    if device == "cuda" and not gpus:
        raise UsageError(
            f"device: expected a target for an NVIDIA device, got {', '.join(artifact.manifest.target_names)}",
            place=place,
            hint=f"`{_compile_command(artifact, 'sm_90')}` adds one, sm_90 or what the device is",
        )
    if device == "cpu":
        gpus = ()
    return gpus, target is None and device == "auto" and bool(artifact.manifest.targets)


def _on_device(
    artifact: Artifact,
    targets: Sequence[CudaTarget],
    may_fall_back: bool,
    threads: int | None,
    kv_pages: Sequence[int],
    segments: str,
) -> Opened | None:
    """On a device of this machine; None: none can, and the processor may. CUDA is looked for only here."""
    from .cuda import NOT_HERE, find_device, open_backend

    try:
        found = find_device(targets)
        backend, workers = open_backend(artifact, found, threads, kv_pages, segments)
    except NOT_HERE as error:
        if may_fall_back:
            return None
        if artifact.manifest.targets:
            raise
        raise _only_for_gpus(artifact, error) from error
    return backend, workers, found[2].name


def _only_for_gpus(artifact: Artifact, error: OnelaunchError) -> OnelaunchError:
    """The same error, saying what the artifact runs on and how to make one that runs here."""
    names = ", ".join(artifact.manifest.target_names)
    command = f"`{_compile_command(artifact, 'cpu')}` makes one that runs on the processor as well"
    return type(error)(
        [f"targets: expected one that runs on this machine, got {names} only", *error.reasons],
        place=str(artifact.path),
        hint="; ".join(filter(None, (error.hint, command))),
    )


def _compile_command(artifact: Artifact, more: str) -> str:
    """The command that compiles the same model for one more target."""
    raw = artifact.manifest.raw
    quant = f" --quant {raw['quant']}" if raw.get("quant") else ""
    source = raw.get("source", {}).get("path") or "MODEL"
    return f"onelaunch compile {source}{quant} --target {','.join((*artifact.manifest.target_names, more))}"


def _on_processor(
    artifact: Artifact, target: str | None, threads: int | None, kv_pages: Sequence[int]
) -> Opened:
    chosen, workers = artifact.pick_target(target), artifact.pick_threads(threads)
    tables = artifact.tables(workers)
    memory = Memory.allocate(artifact.manifest, tables, artifact.verify(), kv_pages)
    return CpuBackend(artifact.library(chosen), chosen, artifact.manifest, memory), workers, chosen.name


def read_tokenizer(artifact: Artifact) -> Tokenizer | None:
    """The tokenizer in an artifact; None: it has none."""
    if not any(name.startswith("tokenizer/") for name in artifact.manifest.files):
        return None
    from .tokenizer import Tokenizer  # here: its library takes 0.1 s to import

    with tempfile.TemporaryDirectory(prefix="onelaunch-") as folder:
        artifact.unpack("tokenizer/", Path(folder))
        return Tokenizer.load(folder)
