"""inspect's numbers: they add up to what the manifest says, in JSON and in tables."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onelaunch.compiler.cli import main
from onelaunch.compiler.reports import artifact as report
from onelaunch.ir.schedule_text import parse_schedule, show_schedule
from onelaunch.runtime import Artifact
from onelaunch.tests import small


@pytest.fixture
def view(capsys: pytest.CaptureFixture[str]) -> Any:
    """What `inspect ARTIFACT ... --json` prints."""

    def call(*words: str) -> Any:
        assert main(["inspect", str(small.artifact()), *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_overview_has_the_floor(view: Any) -> None:
    found = view("--gbps", "10")
    assert found["bytes_per_step"] == found["weights_bytes"] == sum(found["weights_by_format"].values())
    assert found["floor_ms"] == pytest.approx(found["bytes_per_step"] / 10e9 * 1e3)
    # Two layers of two kv heads of 16 dims, K and V, bf16
    assert found["kv_bytes_per_token"] == 2 * 2 * 16 * 2 * 2
    assert "08-allocate.ir" in found["ir"]
    assert found["threads"] == [1, 2]


def test_phase_bytes_add_up_to_a_step(view: Any) -> None:
    rows = view("--phases", "--gbps", "10", "--depth", "99")
    embedding = next(t for t in view("--tensors") if t["tensor"] == "embed")
    looked_up = embedding["bytes"] // 260  # the table is the head as well: its row is counted on top
    assert sum(r["weight_bytes"] for r in rows) == view("--gbps", "1")["bytes_per_step"] + looked_up
    attend = next(r for r in rows if r["kind"] == "attend")
    assert attend["cache_bytes"] == 100 * 2 * 2 * 16 * 2 * 2
    assert attend["layers"] == 2
    gate_up = next(r for r in rows if r["phase"] == "gate_up")
    assert gate_up["operations"] == 2 * 2 * (2 * 128 * 64)
    assert gate_up["us"] == pytest.approx(gate_up["weight_bytes"] / 10e3)


def test_tensors_tell_source_and_packed_formats(view: Any) -> None:
    rows = {r["tensor"]: r for r in view("--tensors")}
    gate_up = rows["0.gate_up"]
    assert (gate_up["source_format"], gate_up["format"], gate_up["matrices"]) == ("f32", "q8_0", 2)
    assert gate_up["source_bits"] == 32
    assert gate_up["bits"] == 8.5
    assert gate_up["note"] == "quantized from f32"
    assert sum(r["bytes"] for r in rows.values()) == view("--gbps", "1")["weights_bytes"]


def test_memory_fits_the_workspace(view: Any) -> None:
    rows = view("--memory")
    workspace = Artifact.open(small.artifact()).manifest.workspace_bytes
    assert max(r["offset"] + r["bytes"] for r in rows) <= workspace
    alive = {r["buffer"]: r["alive"] for r in rows}
    assert alive["/x"] == "the whole step"
    assert alive["global/mul"] == "gate_up .. down"


def test_schedule_is_the_queue_of_a_worker(view: Any) -> None:
    first, second = view("--schedule"), view("--schedule", "--worker", "1")
    assert first != second
    assert [r["section"] for r in first if "commit" in r["task"]] == ["exit"]
    assert {r["layers"] for r in first if r["section"] == "global"} == {2}


def test_texts_read_back(view: Any) -> None:
    text = view("--ir", "allocate")[0]["text"]
    assert show_schedule(parse_schedule(text)) == text
    source = view("--source")[0]
    assert source["file"].endswith("step.cpp")
    assert "ol_step" in source["text"]


@pytest.mark.parametrize("words", [[], ["--tensors"], ["--phases"], ["--schedule"], ["--memory"]])
def test_tables_print(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["inspect", str(small.artifact()), "--gbps", "20", *words]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) > 5
    assert "…" not in out


def test_two_views_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small.artifact()), "--tensors", "--memory"]) == 2
    assert "expected one view, got --tensors, --memory" in capsys.readouterr().err


def test_an_unknown_pass_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small.artifact()), "--ir", "fuze"]) == 2
    assert "did you mean `fuse`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "packed", "bits", "rank", "note"),
    [
        ("q5_0", "q5_0", 5.5, 2, "5-6 bit codes kept as they are"),
        ("q6_k", "q6_k", 7.0, 2, "widened by 0.44 bits"),
        ("q4_0", "q4_0", 4.5, 2, ""),
        ("bf16", "q8_0", 8.5, 2, "quantized from bf16"),
        ("f32", "f32", 40.0, 1, "vector, padded"),
    ],
)
def test_packing_notes(source: str, packed: str, bits: float, rank: int, note: str) -> None:
    assert report._packing_note(source, packed, bits, rank) == note
