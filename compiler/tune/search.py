"""Candidates one after the other until the budget is spent, each told to a journal the moment it is known.

First every value of every degree alone, beside the best so far, degrees that all phases feel before those of one phase;
then Optuna's tree-structured Parzen estimator over all of them. What was evaluated before, by this process, one that
was killed, or one that runs now, is taken from the journal instead of evaluated again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...ir.errors import CompileError, HostError
from ...ir.tuning import Tuning
from .result import Result
from .space import Degree

if TYPE_CHECKING:
    from optuna.study import Study

WRONG = 9.0  # the value of a candidate that does not compile, or is not right
SAME_AGAIN = 40  # samples that were all known already, after which there is nothing left to try


class Evaluator(Protocol):
    how: str

    def evaluate(self, tuning: Tuning) -> Result: ...


@dataclass(frozen=True)
class Trial:
    """One candidate as the journal has it."""

    tuning: Tuning
    ratio: float
    result: Mapping[str, Any]

    @property
    def right(self) -> bool:
        return not self.result.get("wrong")


@dataclass
class Search:
    """A search over `degrees`; `clash` refuses combinations. `told` is called with every new trial and the best."""

    evaluator: Evaluator
    degrees: Sequence[Degree]
    clash: Callable[[Tuning], str]
    study: Study
    told: Callable[[Trial, Trial], None]

    def run(self, budget: float) -> list[Trial]:
        """Search for `budget` seconds or until nothing new is left, or until Ctrl-C; all trials, the best first.

        The default is evaluated in any case.
        """
        end = time.monotonic() + budget
        try:
            for i, values in enumerate(self._candidates()):
                if i and time.monotonic() >= end:
                    break
                self._try(values)
        except KeyboardInterrupt:
            pass  # what was told is kept
        return self.trials()

    def trials(self) -> list[Trial]:
        return sorted(self._known().values(), key=lambda t: t.ratio)

    def best(self) -> Trial:
        return self.trials()[0]

    def tuning(self, values: Mapping[str, int]) -> Tuning:
        """Of a value by degree."""
        return Tuning.of({k: values[d.key] for d in self.degrees for k in d.keys if values[d.key] != d.default})

    # ---- which ------------------------------------------------------------------------------------------------

    def _candidates(self) -> Iterator[dict[str, int]]:
        default = {d.key: d.default for d in self.degrees}
        yield default
        for degree in sorted(self.degrees, key=lambda d: d.choice.home == "phase"):
            for value in degree.values[1:]:
                yield self._repaired(self._values(self.best().tuning) | {degree.key: value}, degree)
        known = 0
        while known < SAME_AGAIN:
            before = len(self._known())
            trial = self.study.ask()
            values = {d.key: trial.suggest_categorical(d.key, list(d.values)) for d in self.degrees}
            yield values
            self.study.tell(trial, self._known()[self.tuning(values)].ratio if self._is_known(values) else WRONG)
            known = known + 1 if len(self._known()) == before else 0

    def _repaired(self, values: dict[str, int], kept: Degree) -> dict[str, int]:
        """The same with one other value changed, where they clash as they are and would not then."""
        if not self.clash(self.tuning(values)):
            return values
        changed = (values | {d.key: v} for d in self.degrees if d is not kept for v in d.values)
        return next((c for c in changed if not self.clash(self.tuning(c))), values)

    def _values(self, tuning: Tuning) -> dict[str, int]:
        chosen = tuning.as_dict()
        return {d.key: chosen.get(d.key, d.default) for d in self.degrees}

    def _is_known(self, values: Mapping[str, int]) -> bool:
        return self.tuning(values) in self._known()

    # ---- the journal ------------------------------------------------------------------------------------------

    def _try(self, values: dict[str, int]) -> None:
        tuning = self.tuning(values)
        if tuning in self._known():
            return
        try:
            why = self.clash(tuning)
            result = Result(WRONG, wrong=f"not tried: {why}") if why else self.evaluator.evaluate(tuning)
        except (CompileError, HostError) as error:
            result = Result(WRONG, wrong="; ".join(error.reasons))
        self._tell(values, tuning, result)
        made = Trial(tuning, result.ratio, result.as_dict())
        if not result.wrong.startswith("not tried"):
            self.told(made, self.best())

    def _tell(self, values: dict[str, int], tuning: Tuning, result: Result) -> None:
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import create_trial

        kinds = {d.key: CategoricalDistribution(list(d.values)) for d in self.degrees}
        attributes = {"tuning": json.dumps(tuning.as_dict()), "result": json.dumps(result.as_dict())}
        self.study.add_trial(
            create_trial(params=values, distributions=kinds, value=result.ratio, user_attrs=attributes)  # type: ignore[arg-type]
        )

    def _known(self) -> dict[Tuning, Trial]:
        found: dict[Tuning, Trial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if "tuning" in trial.user_attrs and trial.value is not None:
                tuning = Tuning.of(json.loads(trial.user_attrs["tuning"]))
                found.setdefault(tuning, Trial(tuning, trial.value, json.loads(trial.user_attrs["result"])))
        return found


def open_study(path: Path, name: str, fresh: bool = False) -> Study:
    """The journal of one program and target: made if it is not there; `fresh`: under a name nobody had.

    HostError without Optuna.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise HostError(f"autotune: expected Optuna, got {error}", hint="pip install 'onelaunch[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))
    if fresh:
        name = f"{name}-{time.time_ns():x}"
    return optuna.create_study(
        study_name=name, storage=storage, direction="minimize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=1),
    )  # fmt: skip
