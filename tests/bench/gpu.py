"""On a machine with an NVIDIA GPU, one command: is the step right, and how fast is it?

    python tests/bench/gpu.py MODEL [--target auto] [--json FILE]

MODEL: a checkpoint, compiled here for the device and this processor, or an artifact that has both. The verdict
holds the device's logits against the CPU target's on the same tokens, and the graph of kernels (`per-phase`)
against the one launch (`mega`), which run the same code on the same tiles and must agree to the bit. Rounds of the
two alternate. us/token is wall time of `generate`, 16 replays between two looks of the host; device us is one
replay between two events; shares of phases come from events between the launches of the per-phase graph, and
contain the gaps between them. Bandwidth is that of torch's device-to-device copy, just before and just after.

Exit codes: 0 passed, 4 the verdict failed (speeds are printed all the same), 5 no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gpu_report import artifact_schedule, launch_names, markdown, phase_shares, speed, verdict
from numpy.typing import NDArray

from onelaunch.compiler.driver import Request, compile_model
from onelaunch.compiler.ondemand import find_model, is_artifact
from onelaunch.ir.errors import HostError, OnelaunchError, UsageError, VerifyError
from onelaunch.runtime import Artifact, Model, load
from onelaunch.runtime.cuda import find_device, probe

SEGMENTS = ("mega", "per-phase")
COPY_BYTES = 1 << 30
COPIES = 10
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw")


class Machine(Protocol):
    """What is asked of the device beside the model."""

    facts: dict[str, Any]

    def copy_gbps(self) -> float:
        """Bytes read and written per second by a large device-to-device copy."""

    def clocks(self) -> dict[str, str]:
        """Clocks, temperature and power now, as nvidia-smi writes them; empty where it is not there."""


class TorchMachine:
    """The first device, through torch and nvidia-smi. HostError if there is none."""

    def __init__(self) -> None:
        import torch

        found = probe()
        if not found["devices"] or not torch.cuda.is_available():
            reason = found.get("error") or "cuda: expected a torch built for CUDA, got one without"
            raise HostError(reason, hint="this benchmark runs on a machine with an NVIDIA GPU, and nowhere else")
        self._torch, device = torch, found["devices"][0]
        self.facts = {**device, "driver": found["release"] or found["driver"], "torch": torch.__version__}
        self._uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"

    def copy_gbps(self) -> float:
        cuda = self._torch.cuda
        source, target = (self._torch.zeros(COPY_BYTES, dtype=self._torch.uint8, device="cuda") for _ in range(2))
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        target.copy_(source)  # warms up
        start.record()
        for _ in range(COPIES):
            target.copy_(source)
        end.record()
        end.synchronize()
        seconds = 1e-3 * start.elapsed_time(end)
        del source, target
        cuda.empty_cache()  # the model's memory is not torch's
        return 2 * COPIES * COPY_BYTES / seconds * 1e-9

    def clocks(self) -> dict[str, str]:
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return {}
        command = [tool, f"--id={self._uuid}", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        values = done.stdout.strip().split(", ")
        return dict(zip(CLOCKS, values, strict=True)) if len(values) == len(CLOCKS) else {}


def names_of_launches(artifact: Artifact, workers: int, table: NDArray[np.int32]) -> list[str]:
    return launch_names(artifact_schedule(artifact, workers), table)


def measure(path: Path, machine: Machine, tokens: int, depth: int, rounds: int) -> dict[str, Any]:
    """The whole report of an artifact with a CPU and a GPU target."""
    artifact = Artifact.open(path)
    target, processor = device_target(artifact, machine), artifact.pick_target().name
    before = machine.clocks()
    models = {name: load(path, target=target, segments=name) for name in SEGMENTS}
    try:
        with load(path, target=processor) as cpu:
            checked = compare(cpu, models, tokens)
        one, copies = models["mega"], [machine.copy_gbps()]
        walls = wall_times(models, tokens, depth, rounds)
        copies.append(machine.copy_gbps())
        launches = {name: launch_times(model, depth, rounds) for name, model in models.items()}
        called = names_of_launches(artifact, one.threads, artifact.tables(one.threads, target)[0])
        traffic = one.bytes_per_token(depth + tokens // 2)
        modes = {
            name: {
                "launches": len(launches[name][0]),
                **speed(walls[name], [sum(r) for r in launches[name]], traffic, sum(copies) / 2),
            }
            for name in SEGMENTS
        }
    finally:
        for model in models.values():
            model.close()
    return {
        "model": one.name, "target": target, "workers": one.threads, "device": machine.facts, "verdict": checked,
        "tokens": tokens, "depth": depth, "bytes_per_token": traffic,
        "copy_gbps": {"before": copies[0], "after": copies[1]}, "clocks": {"before": before, "after": machine.clocks()},
        "modes": modes, "phases": phase_shares(called, launches["per-phase"]),
    }  # fmt: skip


def device_target(artifact: Artifact, machine: Machine) -> str:
    """The artifact's target for this machine's first device."""
    targets = artifact.cuda_targets()
    if not targets:
        raise UsageError(
            "expected an artifact with a GPU target, got one for processors alone",
            place=str(artifact.path),
            hint="give the checkpoint instead: it is compiled for the device that is here",
        )
    _, device, target = find_device(targets)
    if device.ordinal != machine.facts["ordinal"]:
        raise HostError(
            f"expected the first device to run `{target.name}`, got device {device.ordinal} ({device.name})",
            hint="make it the only one: set CUDA_VISIBLE_DEVICES",
        )
    return target.name


def compare(cpu: Model, models: dict[str, Model], tokens: int) -> dict[str, Any]:
    """The verdict: greedy tokens of the CPU target, forced on the others step by step; then each by itself."""
    prompt = [(7 * i + 3) % cpu.vocab for i in range(12)]
    prompt = cpu.tokenizer.encode("The capital of France is") if cpu.tokenizer else prompt
    count = min(tokens, cpu.limits.context - len(prompt))
    logits: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ("cpu", *models)}
    everybody, rows, position = {"cpu": cpu, **models}, prompt, 0
    for _ in range(count):
        for name, model in everybody.items():
            logits[name].append(read(model, rows, position))
        position += len(rows)
        rows = [int(logits["cpu"][-1].argmax())]
    generated = {
        name: model.generate(prompt, max_new_tokens=count, stop_tokens=[]).tokens for name, model in everybody.items()
    }
    found = {name: np.array(steps) for name, steps in logits.items()}
    equal = np.array_equal(found["mega"].view(np.uint32), found["per-phase"].view(np.uint32))
    return verdict(found["cpu"], found["mega"], equal, generated)


def read(model: Model, tokens: list[int], position: int) -> NDArray[np.float32]:
    """Logits of the last of these tokens, which begin at a position, in steps of at most the compiled rows."""
    size = model.limits.rows
    for at in range(0, len(tokens), size):
        part = tokens[at : at + size]
        found = model.step(part, positions=range(position + at, position + at + len(part)))
    return found[0]


def wall_times(models: dict[str, Model], tokens: int, depth: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per generated token after `depth` prompt tokens, of each model and round; one round warms up."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            prompt = [(31 * p + 5) % model.vocab for p in range(max(depth, 1))]
            result = model.generate(prompt, max_new_tokens=tokens + 1, stop_tokens=[])
            if len(result.tokens) != tokens + 1:
                raise VerifyError(f"{name}: expected {tokens + 1} tokens, got {len(result.tokens)}")
            if i:
                found[name].append(result.timings.decode / tokens)
    return found


def launch_times(model: Model, depth: int, rounds: int) -> list[list[float]]:
    """Seconds of each launch of one decode step, [rounds][launches], by events on the device."""
    backend: Any = model._backend
    backend.time_launches(0)
    found = []
    for i in range(rounds + 3):
        model.bench_decode(1, depth)
        if i >= 3:  # the first ones warm up
            found.append(backend.launch_times())
    model.reset()
    return found


def compiled(model: str, target: str, machine: Machine, folder: Path) -> Path:
    """An artifact as it is, or the model compiled for the device and this processor."""
    path = find_model(model)
    if is_artifact(path):
        return path
    chosen = machine.facts["arch"] if target == "auto" else target
    output = folder / "model"
    compile_model(
        Request(path, output, target=f"{chosen},cpu", fit_context=True),
        progress=lambda name, seconds, detail: print(f"{name:12s} {seconds:6.1f} s  {detail}", file=sys.stderr),
    )
    return output


def main(arguments: list[str] | None = None, find_machine: Callable[[], Machine] = TorchMachine) -> int:
    parser = argparse.ArgumentParser(description="Check and time a model on this machine's NVIDIA GPU")
    parser.add_argument("model", help="a checkpoint, an artifact, or a known name")
    parser.add_argument("--target", default="auto", help="GPU to compile for [default: auto, the one here]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    parser.add_argument("--tokens", type=int, default=128, help="generated in a round [default: 128]")
    parser.add_argument("--depth", type=int, default=0, help="cached tokens to start from [default: 0]")
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement, the median counts [default: 7]")
    args = parser.parse_args(arguments)
    try:
        machine = find_machine()
        with tempfile.TemporaryDirectory(prefix="onelaunch-gpu-") as folder:
            path = compiled(args.model, args.target, machine, Path(folder))
            report = measure(path, machine, args.tokens, args.depth, args.rounds)
    except OnelaunchError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    return 0 if report["verdict"]["passed"] else VerifyError.exit_code


if __name__ == "__main__":
    sys.exit(main())
