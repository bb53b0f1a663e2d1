"""A processor's candidates, timed on this machine beside the default, turn about, with a verdict on their numbers.

What a test takes is the fastest step of a round: whatever else runs on the machine only slows steps down. Rounds of
default and candidate alternate, in changing order. A test's ratio is that of the quieter half of its rounds, of each;
where all candidates have one worker, of seconds of the processor, which others do not lengthen.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from ...ir.errors import UsageError
from ...ir.tuning import CHOICES, UNTUNED, Tuning
from ...models.importer import Imported
from ...runtime import Model, load
from ...runtime.direct import fixed_tokens
from ..driver import Request, compile_imported
from .result import Result, geometric_mean

STEPS = 8  # of a decoding round
READS = 12
LEAST_SECONDS = 0.4  # that a test of a candidate is given, however short its steps are
MOST_ROUNDS = 60
FIRST_ROUNDS, HOPELESS = 3, 1.25  # after so many rounds a candidate so much slower is given up
CLOSE = 1e-3  # relative error of logits, for choices that change the order of sums


@dataclass(frozen=True)
class Test:
    """`tg1@512`: decode so many sequences after so many tokens; `pp256`: read a prompt of so many."""

    kind: str
    rows: int
    depth: int = 0

    @classmethod
    def parse(cls, text: str) -> Test:
        found = re.fullmatch(r"(tg|pp)([1-9]\d*)(?:@(\d+))?", text.strip())
        if found is None or (found[1] == "pp" and found[3]):
            raise UsageError(
                f"--workload: expected tests like tg1, tg4@512 or pp256, got `{text}`",
                hint="tg4@512 decodes 4 sequences after 512 tokens, pp256 reads a prompt of 256",
            )
        return cls(found[1], int(found[2]), int(found[3] or 0))

    def __str__(self) -> str:
        return f"{self.kind}{self.rows}" + (f"@{self.depth}" if self.depth else "")

    def run(self, model: Model, alone: bool = False) -> float:
        """Microseconds of a step, the fastest of some; `alone`: of the processor's time, the mean."""
        start = time.process_time()
        if self.kind == "pp":
            us = 1e6 * model.bench_prefill(self.rows)
        else:
            us = 1e6 * min(model.bench_decode(STEPS, self.depth, self.rows))
        return 1e6 * (time.process_time() - start) / (1 if self.kind == "pp" else STEPS) if alone else us


class Measured:
    """Compiles and times candidates of one model. `request`: for its processor, outputs are ours to choose.

    folder: of its own, for artifacts, libraries and packed weights; gone when it is closed.
    """

    how = "measured"

    def __init__(self, imported: Imported, request: Request, folder: Path, tests: Sequence[Test], rounds: int) -> None:
        self._imported, self._folder = imported, folder
        self._request = replace(request, reuse=folder, tuning=UNTUNED)
        self.tests, self._rounds = tests, rounds
        self._alone = set(request.workers) == {1}
        folder.mkdir(parents=True, exist_ok=True)
        self.default = self._open(UNTUNED, "default")
        self._logits = self._numbers(self.default)
        for test in tests:
            test.run(self.default)
        self.read_gbps = self._bandwidth()

    def close(self) -> None:
        self.default.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _bandwidth(self) -> float:
        """What the default's threads read at best: others on the machine only take from it."""
        return max(read_gbps(self.default, self._alone) for _ in range(READS))

    @property
    def artifact(self) -> Path:
        """The default's."""
        return self._folder / "default"

    def default_us(self) -> float:
        """A step of the first test, as it is now."""
        return quiet(self.tests[0].run(self.default, self._alone) for _ in range(self._rounds))

    @property
    def _decoding(self) -> Test | None:
        return next((t for t in self.tests if t.kind == "tg"), None)

    def floor_us(self) -> float:
        """Reading what the first test of decoding reads, at the best bandwidth seen: microseconds of a step."""
        test = self._decoding or self.tests[0]
        weights = float(self.default.manifest.traffic["weights_per_step"])
        rows = test.rows if test.kind == "tg" else 1
        cache = self.default.bytes_per_token(test.depth) - weights
        return (weights + rows * cache) / self.read_gbps * 1e-3

    def evaluate(self, tuning: Tuning, rounds: int = 0) -> Result:
        """Time a candidate beside the default. CompileError or HostError where it does not compile."""
        model = self._open(tuning, "candidate")
        try:
            wrong = self._verdict(tuning, model)
            self.read_gbps = max(self.read_gbps, self._bandwidth())
            return Result(9.0, wrong=wrong) if wrong else self._timed(model, rounds or self._rounds)
        finally:
            model.close()

    def _open(self, tuning: Tuning, name: str) -> Model:
        output = self._folder / name
        compile_imported(self._imported, replace(self._request, tuning=tuning, output=output))
        return load(output, kv_tokens=None)

    def _timed(self, model: Model, rounds: int) -> Result:
        found = {str(test): self._pairs(test, model, rounds) for test in self.tests}
        ratios = {name: quiet(b for _, b in pairs) / quiet(a for a, _ in pairs) for name, pairs in found.items()}
        per_test = {name: (quiet(a for a, _ in p), quiet(b for _, b in p)) for name, p in found.items()}
        medians = {name: median(b / a for a, b in pairs) for name, pairs in found.items()}
        notes = {"paired_medians": medians, "rounds": {name: len(pairs) for name, pairs in found.items()}}
        return Result(geometric_mean(list(ratios.values())), per_test, ratios, noise=_noise(found), notes=notes)

    def _pairs(self, test: Test, model: Model, rounds: int) -> list[tuple[float, float]]:
        """Microseconds of the default and of a candidate, round by round; at least LEAST_SECONDS of them."""
        test.run(model)
        pairs: list[tuple[float, float]] = []
        end = time.monotonic() + LEAST_SECONDS
        while len(pairs) < rounds or (time.monotonic() < end and len(pairs) < MOST_ROUNDS):
            turn = (self.default, model) if len(pairs) % 2 else (model, self.default)
            first, second = (test.run(m, self._alone) for m in turn)
            pairs.append((first, second) if len(pairs) % 2 else (second, first))
            if len(pairs) == FIRST_ROUNDS and min(b for _, b in pairs) > HOPELESS * max(a for a, _ in pairs):
                break
        return pairs

    # ---- the verdict ------------------------------------------------------------------------------------------

    def _numbers(self, model: Model) -> list[np.ndarray]:
        """Logits of steps of one row, and of as many as a step takes at most."""
        model.reset()
        count = min(model.limits.rows, model.limits.outputs, model.limits.context // 2)
        tokens = fixed_tokens(0, 2 * count, model.vocab)
        found = [model.step(tokens[:count], [0] * count, range(count), range(count)).copy()]
        found += [model.step([tokens[count]], [0], [count], [0]).copy()]
        model.reset()
        return found

    def _verdict(self, tuning: Tuning, model: Model) -> str:
        exact = all(CHOICES[key.partition(" ")[0]].exact for key, _ in tuning.values)
        for expected, got in zip(self._logits, self._numbers(model), strict=True):
            if exact and not np.array_equal(expected, got):
                return f"logits differ from the default's in {int((expected != got).sum())} of {got.size} values"
            error = float(np.linalg.norm(expected - got) / np.linalg.norm(expected))
            if not error <= CLOSE:
                return f"logits differ from the default's by {error:.1e}, expected at most {CLOSE:.0e}"
        return ""


def read_gbps(model: Model, alone: bool) -> float:
    """GB/s that a model's threads read its weights at; `alone`: by the processor's time, as `Test.run`."""
    start = time.process_time()
    wall = model.read_gbps()
    if not alone:
        return wall
    size = sum(int(w["bytes"]) for w in model.manifest.raw["weights"])
    return size / (time.process_time() - start) * 1e-9


def quiet(values: Iterable[float]) -> float:
    """The median of the lower half: of rounds that others disturbed least."""
    ordered = sorted(values)
    return median(ordered[: -(-len(ordered) // 2)])


def _noise(found: dict[str, list[tuple[float, float]]]) -> float:
    """How much the ratio of a test would be off by chance, the worst test's: from its rounds in two halves."""
    worst = 0.0
    for pairs in found.values():
        halves = [pairs[i::2] for i in (0, 1)] if len(pairs) >= 4 else []
        ratios = [quiet(b for _, b in half) / quiet(a for a, _ in half) for half in halves]
        worst = max(worst, abs(ratios[0] - ratios[1]) / 2 if ratios else 0.0)
    return worst
