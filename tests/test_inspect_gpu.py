"""`inspect` of a GPU target: its code, what it uses, and a modelled step whose numbers add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onelaunch.compiler.cli import main
from onelaunch.compiler.gpu import report as gpu_report
from onelaunch.compiler.gpu.report import find_target
from onelaunch.ir.errors import UsageError
from onelaunch.runtime import Artifact


@pytest.fixture
def view(gpu_artifact: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Any:
    """What `inspect ARTIFACT --target sm_90 ... --json` prints."""

    def call(*words: str) -> Any:
        assert main(["inspect", str(gpu_artifact[1]), "--target", "sm_90", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_source_ptx_and_sass_are_those_of_the_artifact(view: Any) -> None:
    (source,) = view("--source")
    assert source["file"] == "kernels/triton/step.py"
    assert "def step_few(" in source["text"]
    for found, entry in zip(view("--ptx"), ("step_few", "step_many"), strict=True):
        assert f".entry {entry}(" in found["text"]
    few, many = view("--sass")
    assert "BAR.SYNC" in few["text"]
    assert few["file"] != many["file"]


def test_mix_counts_every_instruction_and_the_cost_of_main_loops(view: Any) -> None:
    few, many = view("--mix")
    assert (few["bucket"], many["bucket"], few["machine"]) == ("few", "many", "h100")
    for kernel in (few, many):
        assert kernel["loop"] + sum(b["instructions"] for b in kernel["branches"]) == sum(kernel["mix"].values())
    matrices = [b for b in few["branches"] if b["format"]]
    assert matrices
    assert all(b["issue_budget"] > loop["per_weight"] > 0.5 for b in matrices for loop in b["loops"][:1])


def test_phases_are_modelled_with_their_bounds(view: Any) -> None:
    found = view("--phases")
    assert found["machine"] == "h100"
    assert found["us"] == pytest.approx(found["launch_us"] + sum(p["us"] for p in found["phases"]))
    assert sum(p["share"] for p in found["phases"]) == pytest.approx(1 - found["launch_us"] / found["us"])
    assert {p["bound"] for p in found["phases"]} <= {"bytes", "issue", "join", "worker"}
    assert any("counted in the code" in line for line in found["assumptions"])
    slower = view("--phases", "--gbps", "10")
    assert slower["floor_us"] == pytest.approx(found["floor_us"] * 335)
    assert view("--phases", "--depth", "200")["bytes"] > found["bytes"]


def test_the_queue_of_a_worker_is_the_targets(view: Any) -> None:
    assert view("--schedule", "--worker", "131") != view("--schedule")
    assert [r["section"] for r in view("--schedule") if "commit" in r["task"]] == ["exit"]


def test_the_timeline_opens_and_adds_up(view: Any, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    summary = view("--timeline", str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    assert sum(e["dur"] for e in events if e["tid"] == 131) == pytest.approx(summary["us"])


@pytest.mark.parametrize("words", [["--mix"], ["--phases"], ["--schedule"]])
def test_tables_print(gpu_artifact: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["inspect", str(gpu_artifact[1]), "--target", "sm_90", *words]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) > 5
    assert "…" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mix"], "--mix: expected a GPU target, got the CPU's"),
        (["--mix", "--target", "sm_80"], "--target: expected one of"),
        (["--schedule", "--target", "sm_90", "--worker", "132"], "--worker: expected at most 131 on h100, got 132"),
        (["--mix", "--sass", "--target", "sm_90"], "expected one view, got --sass, --mix"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    gpu_artifact: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["inspect", str(gpu_artifact[1]), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_target_is_named_by_architecture_or_machine(gpu_artifact: tuple[Path, Path]) -> None:
    artifact = Artifact.open(gpu_artifact[1])
    assert find_target(artifact, "") is None
    assert find_target(artifact, "cpu") is None
    for name in ("sm_90", "h100", "H100"):
        found = find_target(artifact, name)
        assert found is not None
        assert (found.name, found.machine.name) == ("sm_90", "h100")
    h200 = find_target(artifact, "h200")  # as many SMs, other memory
    assert h200 is not None
    assert gpu_report.target_schedule(h200).workers == 132
    with pytest.raises(UsageError, match="expected one of"):
        find_target(artifact, "a100")
