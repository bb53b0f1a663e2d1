"""Searching: what is found is kept whatever happens, nothing is evaluated twice, a winner has to win twice."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from onelaunch.compiler import driver
from onelaunch.compiler.tune import database
from onelaunch.compiler.tune.database import find
from onelaunch.compiler.tune.explain import explain
from onelaunch.compiler.tune.measured import Test as Workload
from onelaunch.compiler.tune.result import Result
from onelaunch.compiler.tune.search import Search, open_study
from onelaunch.compiler.tune.session import Subject, conclude, subject
from onelaunch.compiler.tune.space import Degree
from onelaunch.ir.errors import UsageError
from onelaunch.ir.limits import Limits
from onelaunch.ir.tuning import CHOICES, Tuning
from onelaunch.tests import small


@pytest.fixture(autouse=True)
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAUNCH_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(database, "LIVE", {})


def request(checkpoint: Path, output: Path) -> driver.Request:
    return driver.Request(checkpoint, output, limits=Limits(), workers=(1, 2), quant="int4", fit_context=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_model(tmp_path_factory.mktemp("searched") / "small")


class Planted:
    """An evaluator that knows the answer: `panel` 6 is best, and only with `block` 48."""

    how = "measured"
    tests = (Workload("tg", 1),)

    def __init__(self, die_after: int = 1000, slower: bool = False) -> None:
        self.asked: list[Tuning] = []
        self.die_after, self.slower = die_after, slower

    def evaluate(self, tuning: Tuning, rounds: int = 0) -> Result:
        if len(self.asked) == self.die_after:
            raise SystemExit  # as if killed
        self.asked.append(tuning)
        ratio = 0.8 if (tuning["panel"], tuning["block"]) == (6, 48) else 0.95 if tuning["block"] == 48 else 1.0
        ratio = 1.2 if self.slower and rounds else ratio
        return Result(ratio, {"tg1": (100.0, 100 * ratio)}, {"tg1": ratio})

    def default_us(self) -> float:
        return 100.0

    def floor_us(self) -> float:
        return 50.0


def degrees() -> list[Degree]:
    return [Degree((name,), CHOICES[name], (CHOICES[name].default, *values))
            for name, values in (("block", (48, 64)), ("panel", (4, 6)))]  # fmt: skip


def search(planted: Planted, journal: Path) -> Search:
    return Search(planted, degrees(), lambda tuning: "", open_study(journal, "it"), lambda trial, best: None)


def test_a_search_that_is_killed_loses_nothing_and_nothing_is_evaluated_twice(tmp_path: Path) -> None:
    journal, first, second = tmp_path / "journal.log", Planted(die_after=3), Planted()
    with pytest.raises(SystemExit):
        search(first, journal).run(60)
    trials = search(second, journal).run(60)
    assert trials[0].tuning == Tuning.of({"panel": 6, "block": 48})
    assert not set(first.asked) & set(second.asked)
    assert {t.tuning for t in trials} == {*first.asked, *second.asked}
    assert len(trials) == 9  # all there are: it ends by itself
    rest = Planted()
    search(rest, journal).run(60)
    assert rest.asked == []


def test_a_value_that_clashes_is_tried_beside_one_that_it_does_not_clash_with(tmp_path: Path) -> None:
    planted = Planted(die_after=3)
    made = search(planted, tmp_path / "journal.log")
    made.degrees = degrees()[::-1]
    made.clash = lambda tuning: "no" if tuning["panel"] == 6 and tuning["block"] == 32 else ""
    with pytest.raises(SystemExit):
        made.run(60)
    assert planted.asked[2] == Tuning.of({"panel": 6, "block": 48})


def test_ctrl_c_keeps_what_was_found(tmp_path: Path) -> None:
    class Stopped(Planted):
        def evaluate(self, tuning: Tuning, rounds: int = 0) -> Result:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().evaluate(tuning, rounds)

    trials = search(Stopped(), tmp_path / "journal.log").run(60)
    assert [t.tuning.as_dict() for t in trials] == [{"block": 48}, {}]


@pytest.mark.parametrize("slower", [False, True])
def test_a_winner_that_is_slower_when_timed_again_is_not_kept(tmp_path: Path, slower: bool, checkpoint: Path) -> None:
    planted = Planted()
    made = search(planted, tmp_path / "journal.log")
    made.run(60)
    what = subject(request(checkpoint, tmp_path / "x"))
    entry, winner = conclude(what, Planted(slower=slower), made)  # type: ignore[arg-type]
    assert (winner is None) == slower
    assert entry.choices == ({} if slower else {"panel": 6, "block": 48})
    assert find(what.key, what.target, what.environment).entry == entry


def test_the_explanation_names_the_winner_the_rest_and_the_rule(tmp_path: Path, checkpoint: Path) -> None:
    made = search(Planted(), tmp_path / "journal.log")
    trials = made.run(60)
    what: Subject = subject(request(checkpoint, tmp_path / "x"))
    pruned = [replace(degrees()[0], pruned={24: "because"}), degrees()[1]]
    graph = next(g for g in what.program.graphs if any(p.name == "down" for p in g.phases))
    rows = {(r["choice"], r["value"]): r for r in explain(what.program, f"{graph.name}.down", pruned, trials)}
    assert rows["panel", 6]["verdict"] == rows["block", 48]["verdict"] == "won"
    assert "15.8 % faster" in rows["panel", 6]["why"]
    assert rows["block", 24]["why"] == "because"
    assert not explain(what.program, f"{graph.name}.attend", pruned, trials)
    with pytest.raises(UsageError, match="expected a phase"):
        explain(what.program, "dwon", pruned, trials)


SEARCHER = """
import sys
from pathlib import Path
from onelaunch.tests.test_tune_search import Planted, search
planted = Planted()
search(planted, Path(sys.argv[1])).run(60)
print(len(planted.asked))
"""


def test_two_searches_at_once_share_a_journal_and_leave_it_whole(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    command = [sys.executable, "-c", SEARCHER, str(journal)]
    both = [subprocess.Popen(command, env=small.environment(), stdout=subprocess.PIPE) for _ in "ab"]
    asked = [int(process.communicate(timeout=100)[0]) for process in both]
    rest = Planted()
    trials = search(rest, journal).run(60)
    assert (len(trials), rest.asked) == (9, [])
    assert 9 <= sum(asked) <= 18  # both may have been at the same one
