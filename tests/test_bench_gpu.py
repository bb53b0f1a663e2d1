"""The GPU benchmark without a GPU: what it computes from timings. All of it against a fake driver: cuda_protocol.py."""

from __future__ import annotations

import importlib
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checkpoints import save_random
from compiled import ArtifactCache
from tiny import tiny

from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.vm import VirtualMachine
from onelaunch.runtime import Artifact
from onelaunch.tests.bench import gpu_report

LOGITS = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
TEXTS = {"cpu": [1, 2, 3], "mega": [1, 2, 3], "per-phase": [1, 2, 3]}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    return importlib.import_module("gpu")


def test_shares_are_of_medians_over_rounds_summed_over_a_phases_launches():
    rounds = [[1e-6, 5e-6, 3e-6], [1e-6, 6e-6, 2e-6], [9e-6, 7e-6, 1e-6]]
    rows = gpu_report.phase_shares(["a.x", "a.y", "a.x"], rounds)
    assert [(r["phase"], r["launches"]) for r in rows] == [("a.x", 2), ("a.y", 1)]
    assert [r["us"] for r in rows] == pytest.approx([3, 6])
    assert [r["share"] for r in rows] == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="zip"):
        gpu_report.phase_shares(["a.x", "a.y"], rounds)


def test_a_speed_is_the_median_round_against_the_copies():
    found = gpu_report.speed([2e-3, 1e-3, 4e-3], [9e-4, 8e-4], 1e9, 1000.0)
    assert (found["us_per_token"], found["fastest_us"], found["slowest_us"]) == pytest.approx((2000, 1000, 4000))
    assert (found["gbps"], found["of_copy"], found["device_us"]) == pytest.approx((500, 0.5, 850))


def test_the_verdict_passes_rounding_and_nothing_else():
    noise = 1e-3 * np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)
    assert gpu_report.verdict(LOGITS, LOGITS + noise, True, TEXTS)["passed"]
    tie = LOGITS.copy()
    tie[2, 7] = tie[2].max() + 1e-4  # a near tie of the CPU target, that the rounding turns
    found = gpu_report.verdict(tie, np.where(tie == tie[2, 7], tie - 2e-3, tie) + noise, True, TEXTS)
    assert (found["passed"], found["tokens_equal"], found["steps"]) == (True, 5, 6)


@pytest.mark.parametrize("fault", ["another token", "logits far off", "not a number", "per-phase differs", "texts"])
def test_the_verdict_fails_what_rounding_does_not_explain(fault: str):
    got, equal, texts = LOGITS.copy(), True, dict(TEXTS)
    if fault == "another token":
        got[3, 11] = got[3].max() + 0.5
    elif fault == "logits far off":
        got = np.roll(got, 1, axis=1)
    elif fault == "not a number":
        got[0, 0] = np.nan
    elif fault == "per-phase differs":
        equal = False
    else:
        texts["per-phase"] = [1, 2, 4]
    assert not gpu_report.verdict(LOGITS, got, equal, texts)["passed"]


def test_launches_are_named_by_the_phases_they_run():
    model = tiny("llama")
    vm = VirtualMachine({b: model.schedule(b, 4) for b in BUCKETS}, model.weights)
    table, made = vm.tables["few"].records, vm.tables["few"].schedule
    names = gpu_report.launch_names(made, table)
    assert names == [f"{graph.name}.{phase.name}" for graph, _ in made.program.sections() for phase in graph.phases]
    many = gpu_report.launch_names(vm.tables["many"].schedule, vm.tables["many"].records)
    assert [name for name, _ in groupby(many)] == names  # there a phase's prologue is shared: a launch of its own
    with pytest.raises(ValueError, match="with other records"):
        gpu_report.launch_names(model.schedule("few", 3), table)


def test_an_artifact_says_which_phases_its_launches_run(gpu: ModuleType, compiled: ArtifactCache, tmp_path: Path):
    save_random(tmp_path, "llama", num_hidden_layers=2)
    artifact = Artifact.open(compiled(tmp_path, limits={"context": 256}))
    phases = ["q_k_v", "attend", "o", "gate_up", "down"]
    names = gpu.names_of_launches(artifact, 2, artifact.tables(2)[0])
    assert names[1:11] == [f"global.{phase}" for phase in phases] * 2
    assert names[-2:] == ["exit.sample", "exit.commit"]


def report() -> dict[str, Any]:
    mode = {**gpu_report.speed([1e-3], [9e-4], 1e9, 2000.0), "launches": 1}
    return {
        "model": "m", "target": "sm_90", "workers": 132, "device": {"name": "GPU", "driver": "580.1"},
        "verdict": gpu_report.verdict(LOGITS, LOGITS, True, TEXTS), "copy_gbps": {"before": 1990.0, "after": 2010.0},
        "clocks": {"before": {"clocks.sm": "1980 MHz"}, "after": {}}, "modes": {"mega": mode},
        "phases": gpu_report.phase_shares(["a.x", "a.y"], [[1e-6, 3e-6]]),
    }  # fmt: skip


def test_the_table_says_the_verdict_before_any_speed():
    lines = gpu_report.markdown(report()).splitlines()
    assert lines[0].startswith("passed: 6 of 6 tokens as the CPU target's, worst cosine 1.00000")
    assert "clocks: before clocks.sm 1980 MHz; after not read" in lines
    assert "| mega (1) | 1000.0 | 1000.0 - 1000.0 | 900.0 | 1000 | 50 % |" in lines
    assert lines[-2:] == ["| a.x | 1 | 1.0 | 25.0 % |", "| a.y | 1 | 3.0 | 75.0 % |"]
    failed = report()
    failed["verdict"] = gpu_report.verdict(LOGITS, LOGITS, False, TEXTS)
    assert gpu_report.markdown(failed).startswith("FAILED")


def test_without_a_gpu_one_message_and_an_exit_code(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu, "probe", lambda: {"devices": [], "error": "cuda: expected NVIDIA's driver, got none"})
    assert gpu.main(["some-model"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: cuda: expected NVIDIA's driver, got none\n\nhint: this benchmark runs on a machine")
