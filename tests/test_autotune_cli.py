"""The command line of tuning: what is asked wrongly is said, and a search from the start to an artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onelaunch.compiler.cli import main
from onelaunch.compiler.cli.autotune import duration
from onelaunch.tests import small


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (small.changes() | {"ONELAUNCH_TUNING": str(tmp_path / "tuning.json")}).items():
        monkeypatch.setenv(name, value)


def test_a_budget_is_a_time() -> None:
    assert [duration(text) for text in ("90s", "10m", "1.5h", "7")] == [90, 600, 5400, 7]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workload", "tg0"], "expected tests like tg1"),
        (["--workload", "tg1@4K"], "expected tests like tg1"),
        (["--workload", "pp4096"], "expected at most 512 tokens"),
        (["--target", "sm_90,cpu"], "expected one target to tune for"),
        (["--target", "sm_90", "--workload", "pp64", "--quant", "int4"], "the model is of one row"),
        (["--explain", "decoder.down"], "expected a search of this model"),
    ],
)
def test_what_cannot_be_tuned_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autotune", str(small.model()), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_search_is_kept_explained_and_compiled_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With two thread counts to choose from and no time for anything that needs a compiler again."""
    model, asked = str(small.model()), ["--threads", "1,2", "--rows", "24", "--quant", "int8"]
    words = ["autotune", model, *asked, "--budget", "1s", "--rounds", "1", "--workload", "tg1", "--json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "[  1] defaults: " in captured.err
    assert found["how"] == "measured"
    assert {c["test"] for c in found["model_error"]} == {"tg1"}
    assert Path(found["database"]).is_file()
    assert main(["autotune", model, *asked, "--explain", "global.attend", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"threads", "split"} <= {r["choice"] for r in rows}
    assert any(r["verdict"] == "won" for r in rows)
    output = tmp_path / "a.ola"
    assert main(["compile", model, *asked, "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"].popitem()[1]["source"] in ("live", "user")
