"""The paired benchmark: onelaunch and llama.cpp, turn by turn, with the memory limit beside them.

    python tests/bench/shapes.py qwen3-0.6b -o model.gguf
    python -m venv llama && llama/bin/pip install llama-cpp-python==0.3.36
    python tests/bench/peer.py --gguf model.gguf --llama-python llama/bin/python

A round is: read probe, every engine once, read probe; the engines' order rotates. Speeds drift with whoever
else uses the machine, so what to trust is the ratio of two neighbours in one round and the share of the
round's own limit. llama.cpp runs with flash attention on and off: the peer is the better of the two (*).
Rounds in which others used the CPUs are dropped; if too few are left all count, marked NOISY.

`--rows 4` times steps of four consecutive tokens of one sequence, as speculative verification runs them.
Workers and protocol: worker.py. Without an artifact the GGUF is compiled first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median

from machine import CpuLedger, Probe, build_probe, wait_until_quiet
from worker import Process, Worker

HERE = Path(__file__).parent
OURS = "onelaunch"
MAX_FOREIGN, MAX_STOLEN = 0.04, 0.03  # shares of the machine above which a round does not count
MIN_QUIET = 2  # rounds; with fewer, all count


@dataclass(frozen=True)
class Setting:
    """One line of the table: decode steps of `rows` tokens at `depth`, or a prefill of `prefill` tokens."""

    threads: int
    depth: int = 0
    rows: int = 1
    prefill: int = 0

    def __str__(self) -> str:
        work = f"pp{self.prefill}" if self.prefill else f"d{self.depth}"
        return f"T{self.threads} {work}" + (f" x{self.rows}" if self.rows > 1 else "")


@dataclass
class Round:
    tokens_per_second: dict[str, float]
    limit: float  # GB/s, mean of the probes before and after
    ping_ns: float
    foreign: float
    stolen: float

    def quiet(self) -> bool:
        return self.foreign < MAX_FOREIGN and self.stolen < MAX_STOLEN


@dataclass
class Result:
    setting: Setting
    bytes_per_token: dict[str, int]
    rounds: list[Round] = field(default_factory=list)

    def counted(self) -> list[Round]:
        quiet = [one for one in self.rounds if one.quiet()]
        return quiet if len(quiet) >= MIN_QUIET else self.rounds


def speed(worker: Worker, setting: Setting, steps: int) -> float:
    """Tokens per second: of the median step, or of one prefill."""
    if setting.prefill:
        return setting.prefill / worker.prefill(setting.prefill)
    return setting.rows / median(worker.decode(steps, setting.depth, setting.rows))


def measure_round(
    setting: Setting, steps: int, engines: list[tuple[str, Worker]], probe: Probe, patience: float
) -> Round:
    wait_until_quiet(MAX_FOREIGN, patience)
    everyone: list[Process] = [probe, *(worker for _, worker in engines)]
    ledger = CpuLedger(everyone)
    before, ping_before = probe.read()
    speeds = {name: speed(worker, setting, steps) for name, worker in engines}
    after, ping_after = probe.read()
    return Round(speeds, mean([before, after]), mean([ping_before, ping_after]), *ledger.close())


def measure(setting: Setting, engines: dict[str, Worker], probe: Probe, args: argparse.Namespace) -> Result:
    order = list(engines.items())
    for _, worker in order:
        speed(worker, setting, 1)  # fills the cache to the depth, off the clock
    costs = {} if setting.prefill else {name: worker.bytes_per_token(setting.depth) for name, worker in order}
    result = Result(setting, costs)
    for _ in range(args.rounds):
        result.rounds.append(measure_round(setting, args.steps, order, probe, args.patience))
        order = order[1:] + order[:1]
    return result


def spread(values: list[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def lines(result: Result) -> list[str]:
    """The table lines of one setting: one per engine, the limit and the disturbance on the first."""
    rounds = result.counted()
    names = list(rounds[0].tokens_per_second)
    names.sort(key=lambda name: (name != OURS, name))
    speeds = {name: [one.tokens_per_second[name] for one in rounds] for name in names}
    best = max((name for name in names if name != OURS), key=lambda name: median(speeds[name]), default=None)
    table = []
    for name in names:
        marked = name + (" *" if name == best else "")
        ratio, rate = "", ""
        if name != OURS and OURS in speeds:
            ratio = spread([ours / peer for ours, peer in zip(speeds[OURS], speeds[name], strict=True)], 2)
        if result.bytes_per_token.get(name):
            steps = [value / result.setting.rows for value in speeds[name]]
            moved = [value * result.bytes_per_token[name] * 1e-9 for value in steps]
            shares = [one / limit.limit for one, limit in zip(moved, rounds, strict=True)]
            rate = f"{median(moved):5.1f} GB/s {median(shares):4.0%}"
        table.append(f"{result.setting!s:<12} {marked:<19} {spread(speeds[name]):<24} {ratio:<18} {rate:<16}")
    table[0] += disturbance(result, rounds)
    return [line.rstrip() for line in table]


def disturbance(result: Result, rounds: list[Round]) -> str:
    ping = f", ping {median([one.ping_ns for one in rounds]):.0f} ns" if result.setting.threads > 1 else ""
    kept = f"{len(rounds)}/{len(result.rounds)} rounds"
    noisy = "" if all(one.quiet() for one in rounds) else " NOISY"
    return (
        f" {spread([one.limit for one in rounds])} GB/s{ping},"
        f" foreign {median([one.foreign for one in rounds]):.1%}, {kept}{noisy}"
    )


HEADER = (
    f"{'setting':<12} {'engine':<19} {'tok/s med (min-max)':<24} {'onelaunch / it':<18} "
    f"{'reads, of limit':<16} limit"
)


def compile_artifact(gguf: Path, directory: Path) -> Path:
    artifact = directory / "model.ola"
    subprocess.run([sys.executable, "-m", OURS, "compile", str(gguf), "-o", str(artifact)], check=True)
    return artifact


def start_engines(
    args: argparse.Namespace, threads: int, artifact: Path | None, stack: ExitStack
) -> dict[str, Worker]:
    commands: dict[str, list[str]] = {}
    if artifact:
        commands[OURS] = [sys.executable, str(HERE / "ours.py"), "--artifact", str(artifact)]
    if args.llama_python:
        context = max(args.depths) + (args.steps + 8) * max(args.rows)
        peer = [args.llama_python, str(HERE / "llama_peer.py"), "--gguf", str(args.gguf)]
        peer += ["--context", str(max(context, *args.prefill, 256))]
        for attention in ("on", "off"):
            commands[f"llama.cpp fa {attention}"] = [*peer, "--flash-attention", attention]
    return {
        name: stack.enter_context(Worker([*command, "--threads", str(threads)]))
        for name, command in commands.items()
    }


def run(args: argparse.Namespace, directory: Path) -> list[Result]:
    program = build_probe(directory)
    artifact = None if args.skip_ours else args.artifact or compile_artifact(args.gguf, directory)
    results: list[Result] = []
    for threads in args.threads:
        with ExitStack() as stack:
            engines = start_engines(args, threads, artifact, stack)
            probe = stack.enter_context(Probe(program, threads))
            if not results:
                print(*(f"{name}: {worker.facts}" for name, worker in engines.items()), HEADER, sep="\n")
            settings = [Setting(threads, prefill=tokens) for tokens in args.prefill]
            settings += [Setting(threads, depth, rows) for depth in sorted(args.depths) for rows in args.rows]
            for setting in settings:
                results.append(measure(setting, engines, probe, args))
                print(*lines(results[-1]), sep="\n", flush=True)
    return results


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time onelaunch and llama.cpp on one GGUF, paired")
    option = parser.add_argument
    option("--gguf", type=Path, required=True, help="model file, read by both")
    option("--artifact", type=Path, help="what onelaunch loads [default: compiled from --gguf]")
    option("--llama-python", help="Python that has llama-cpp-python [default: no peer]")
    option("--skip-ours", action="store_true", help="time the peer alone")
    option("--threads", type=numbers, default=[1, 2], help="[default: 1,2]")
    option("--depths", type=numbers, default=[0, 2048], help="tokens in the cache [default: 0,2048]")
    option("--rows", type=numbers, default=[1], help="tokens per step, such as 1,4 [default: 1]")
    option("--prefill", type=numbers, default=[512], help="prompt lengths, may be empty [default: 512]")
    option("--rounds", type=int, default=5, help="[default: 5]")
    option("--steps", type=int, default=32, help="decode steps of an engine in a round [default: 32]")
    option("--patience", type=float, default=30, help="seconds to wait for idle CPUs [default: 30]")
    option("--json", type=Path, help="write every round here")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        results = run(args, Path(directory))
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
