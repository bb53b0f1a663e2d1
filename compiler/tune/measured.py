"""A processor's candidates, timed on this machine beside the default, turn about, with a verdict on their numbers.

What a test takes is the fastest step of a round: whatever else runs on the machine only slows steps down. Rounds of
default and candidate alternate, in changing order; a test's ratio is the median over rounds of the pair's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import numpy as np

from ...ir.errors import UsageError
from ...ir.tuning import CHOICES, UNTUNED, Tuning
from ...models.importer import Imported
from ...runtime import Model, load
from ...runtime.direct import fixed_tokens
from ..driver import Request, compile_imported
from .result import Result, geometric_mean

STEPS = 8  # of a decoding round
FIRST_ROUNDS, HOPELESS = 3, 1.1  # after so many rounds a candidate so much slower is given up
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

    def run(self, model: Model) -> float:
        """Microseconds of a step."""
        if self.kind == "pp":
            return 1e6 * model.bench_prefill(self.rows)
        return 1e6 * min(model.bench_decode(STEPS, self.depth, self.rows))


class Measured:
    """Compiles and times candidates of one model. `request`: for its processor, outputs are ours to choose.

    folder: of its own, for artifacts, libraries and packed weights; gone when it is closed.
    """

    how = "measured"

    def __init__(self, imported: Imported, request: Request, folder: Path, tests: Sequence[Test], rounds: int) -> None:
        self._imported, self._folder = imported, folder
        self._request = replace(request, reuse=folder, tuning=UNTUNED)
        self.tests, self._rounds = tests, rounds
        folder.mkdir(parents=True, exist_ok=True)
        self.default = self._open(UNTUNED, "default")
        self._logits = self._numbers(self.default)
        for test in tests:
            test.run(self.default)
        self.read_gbps = self.default.read_gbps()

    def close(self) -> None:
        self.default.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def artifact(self) -> Path:
        """The default's."""
        return self._folder / "default"

    def default_us(self) -> float:
        """A step of the first test, as it is now."""
        return median(self.tests[0].run(self.default) for _ in range(self._rounds))

    def floor_us(self) -> float:
        """Reading what the first test reads at the bandwidth measured at the start: microseconds of a step."""
        test = self.tests[0]
        weights = float(self.default.manifest.traffic["weights_per_step"])
        rows = test.rows if test.kind == "tg" else 1
        cache = self.default.bytes_per_token(test.depth) - weights
        return (weights + rows * cache) / self.read_gbps * 1e-3

    def evaluate(self, tuning: Tuning, rounds: int = 0) -> Result:
        """Time a candidate beside the default. CompileError or HostError where it does not compile."""
        model = self._open(tuning, "candidate")
        try:
            wrong = self._verdict(tuning, model)
            return Result(9.0, wrong=wrong) if wrong else self._timed(model, rounds or self._rounds)
        finally:
            model.close()

    def _open(self, tuning: Tuning, name: str) -> Model:
        output = self._folder / name
        compile_imported(self._imported, replace(self._request, tuning=tuning, output=output))
        return load(output, kv_tokens=None)

    def _timed(self, model: Model, rounds: int) -> Result:
        found: dict[str, list[tuple[float, float]]] = {str(test): [] for test in self.tests}
        for test in self.tests:
            test.run(model)
        for i in range(rounds):
            for test in self.tests:
                pair = [test.run(m) for m in ((self.default, model) if i % 2 else (model, self.default))]
                found[str(test)].append((pair[0], pair[1]) if i % 2 else (pair[1], pair[0]))
            if i + 1 == FIRST_ROUNDS and _ratio(found) > HOPELESS:
                break
        ratios = {name: median(b / a for a, b in pairs) for name, pairs in found.items()}
        per_test = {n: (median(a for a, _ in p), median(b for _, b in p)) for n, p in found.items()}
        return Result(geometric_mean(list(ratios.values())), per_test, ratios, noise=_noise(found))

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


def _ratio(found: dict[str, list[tuple[float, float]]]) -> float:
    return geometric_mean([median(b / a for a, b in pairs) for pairs in found.values()])


def _noise(found: dict[str, list[tuple[float, float]]]) -> float:
    """Half the distance between quartiles of the pairs' ratios over the root of their number, the largest test's."""
    worst = 0.0
    for pairs in found.values():
        ratios = [b / a for a, b in pairs]
        if len(ratios) > 1:
            low, _, high = quantiles(ratios, n=4)
            worst = max(worst, (high - low) / 2 / len(ratios) ** 0.5)
    return worst


