"""What a GPU target must do, as checks of one artifact that also has a CPU target.

test_gpu.py runs them on a device with a compiled model. cuda_protocol.py runs the same functions against the fake
driver with a toy model: that shows that the checks themselves work, not that a GPU does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onelaunch.ir.record import END
from onelaunch.ir.segments import BODY, SIGNAL
from onelaunch.runtime import Artifact, Model, StepFault, load

NEVER: dict[str, Any] = {"stop_tokens": []}
PROMPT = [5, 17, 200, 33, 8, 91, 4, 250, 77, 12, 100, 60]
SAMPLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_k": 7},
    {"temperature": 1.0, "seed": 3, "top_p": 0.7},
    {"temperature": 1.2, "seed": 4, "min_p": 0.05},
    {"temperature": 0.9, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
]


def gpu_target(artifact: Path) -> str:
    return Artifact.open(artifact).manifest.cuda_targets[0].name


def on_gpu(artifact: Path, **options: Any) -> Model:
    """The artifact on the device, by name: never on the processor by mistake."""
    return load(artifact, target=gpu_target(artifact), **options)


def on_cpu(artifact: Path) -> Model:
    return load(artifact, target=Artifact.open(artifact).manifest.targets[0].name)


def same(artifact: Path, ask: Callable[[Model], list[Any]]) -> None:
    """The device answers what the CPU target does."""
    with on_cpu(artifact) as cpu, on_gpu(artifact) as gpu:
        assert ask(gpu) == ask(cpu)


def tokens_of_many_steps(artifact: Path) -> None:
    same(artifact, lambda m: m.generate(PROMPT, max_new_tokens=40, **NEVER).tokens)
    same(artifact, lambda m: [m.generate([7], max_new_tokens=n, **NEVER).tokens for n in (1, 2, 17)])


def a_batch(artifact: Path) -> None:
    prompts = [PROMPT[i : i + 3 + i] for i in range(5)]  # more than there are slots: some wait
    same(artifact, lambda m: [r.tokens for r in m.generate(prompts, max_new_tokens=20, **NEVER)])


def a_prompt_in_chunks(artifact: Path) -> None:
    prompt = [(31 * i + 5) % 251 for i in range(150)]  # rows of many steps, several pages, more than a split
    same(artifact, lambda m: m.generate(prompt, max_new_tokens=12, **NEVER).tokens)


def every_sampler(artifact: Path) -> None:
    same(artifact, lambda m: [m.generate(PROMPT, max_new_tokens=16, **NEVER, **s).tokens for s in SAMPLERS])


def logits_are_close(artifact: Path) -> None:
    """A step of both buckets; the targets round activations differently, so close and not equal."""
    with on_cpu(artifact) as cpu, on_gpu(artifact) as gpu:
        for tokens in (PROMPT, PROMPT[:1]):
            want, got = cpu.step(tokens)[0], gpu.step(tokens)[0]
            assert np.linalg.norm(got - want) <= 0.05 * np.linalg.norm(want)


def per_phase_is_mega(artifact: Path) -> None:
    """Bit for bit: the same code on the same tiles in the same order."""

    def ask(model: Model) -> tuple[list[list[int]], list[bytes]]:
        made = [r.tokens for r in model.generate([PROMPT, PROMPT[:2]], max_new_tokens=24, **NEVER)]
        return made, [model.step(tokens).tobytes() for tokens in (PROMPT, PROMPT[:1])]

    with on_gpu(artifact) as mega, on_gpu(artifact, segments="per-phase") as cut:
        assert ask(cut) == ask(mega)


def two_runs_are_equal(artifact: Path) -> None:
    with on_gpu(artifact) as model:
        first, second = (model.step(PROMPT).tobytes() for _ in range(2))
        assert first == second


def a_dropped_signal_ends_as_a_fault(artifact: Path, folder: Path) -> None:
    """The grid drains, the fault names its wait, the model refuses to go on, and the device is as good as before."""
    with on_gpu(artifact) as model:
        workers = model.threads
    broken = without_a_signal(artifact, folder / "broken", workers)
    with pytest.raises(StepFault, match=r"worker \d+ stopped at record \d+: expected \d+ signals of event \d+, got"):
        on_gpu(broken)  # loading runs one step
    tokens_of_many_steps(artifact)


def a_step_takes_its_time(artifact: Path) -> None:
    """No measurement, a sanity check: between a memory-bound step at ten times the bandwidth and a second."""
    with on_gpu(artifact) as model:
        step = statistics.median(model.bench_decode(16, 32))
        assert step < 1
        assert step > model.bytes_per_token(32) / (10e9 * model.read_gbps())


CHECKS = (
    tokens_of_many_steps, a_batch, a_prompt_in_chunks, every_sampler, logits_are_close, per_phase_is_mega,
    two_runs_are_equal, a_dropped_signal_ends_as_a_fault, a_step_takes_its_time,
)  # fmt: skip


def run(check: Callable[..., None], artifact: Path, folder: Path) -> None:
    """One of CHECKS; those that write get a folder."""
    check(artifact, folder) if check is a_dropped_signal_ends_as_a_fault else check(artifact)


def without_a_signal(artifact: Path, out: Path, workers: int) -> Path:
    """A copy whose table for this many workers lacks the first signal of its last signalling worker, certified."""
    shutil.copytree(artifact, out)
    name = f"tables/{gpu_target(artifact)}-{workers}.npy"
    table = np.load(out / name)
    for bucket in table:
        worker, record = np.argwhere((bucket[:, :, SIGNAL] >= 0) & (bucket[:, :, BODY] != END))[-1]
        bucket[worker, record, SIGNAL] = -1
    np.save(out / name, table)
    digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"][name] = digest
    manifest["certificates"][name.removeprefix("tables/").removesuffix(".npy")]["tables"] = digest
    text = json.dumps(manifest)
    (out / "manifest.json").write_text(text)
    (out / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    return out
