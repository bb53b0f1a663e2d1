"""Tuning: choices reach the code and change no number, searches lose nothing, the database gives what holds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onelaunch.codegen.cpu.units import HEADER_CHOICES, TEMPLATES
from onelaunch.compiler import driver
from onelaunch.compiler.build import LEVELS, host_level
from onelaunch.compiler.gpu.machines import machine_for
from onelaunch.compiler.gpu.step_work import Cost
from onelaunch.compiler.reports.artifact import tuned_words
from onelaunch.compiler.tune import database, lookup, modelled
from onelaunch.compiler.tune.database import Entry, find, read, write
from onelaunch.compiler.tune.session import subject
from onelaunch.compiler.tune.space import clash, space
from onelaunch.ir.errors import CompileError, HostError, UsageError
from onelaunch.ir.limits import Limits
from onelaunch.ir.schedule_text import parse_schedule, show_schedule
from onelaunch.ir.tuning import CHOICES, UNTUNED, Tuning
from onelaunch.passes import schedule
from onelaunch.passes.tile import tile
from onelaunch.runtime import load
from onelaunch.runtime.artifact import Artifact
from onelaunch.tests import small
from onelaunch.tests.compiled import ArtifactCache, all_logits
from onelaunch.tests.test_vm import GREEDY, Pair
from onelaunch.tests.tiny import tiny

LIMITS = {"rows": 64, "slots": 2, "context": 256, "outputs": 64}
EVERY = {"threads": 1, "panel": 3, "block": 48, "few_rows": 2, "ahead": 0, "cache_fetch": 1024, "fetch": 512}


@pytest.fixture(autouse=True)
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAUNCH_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(database, "LIVE", {})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_model(tmp_path_factory.mktemp("tuned") / "small")


def request(checkpoint: Path, output: Path, **more: object) -> driver.Request:
    return driver.Request(checkpoint, output, limits=Limits(**LIMITS), workers=(1, 2), quant="int4", **more)  # type: ignore[arg-type]


# ---- choices ----------------------------------------------------------------------------------------------


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(UsageError) as error:
        Tuning.of({"panle": 4, "block": 0, "ring x.y": 4, "fetch": 100})
    assert len(error.value.reasons) == 4
    assert "`panle`" in error.value.reasons[0]
    assert "from 1 to 256" in error.value.reasons[1]
    assert error.value.hint == "did you mean `panel`?"


def test_defaults_are_no_choice() -> None:
    assert Tuning.of({name: c.default for name, c in CHOICES.items()}) == UNTUNED


def test_a_phase_and_a_schedule_print_what_was_chosen_and_read_it_back() -> None:
    program = tiny("llama", "q4_0").lowered
    graph = next(g for g in program.graphs if any(p.name == "down" for p in g.phases))
    chosen = Tuning.of({f"fetch {graph.name}.down": 4096, "ahead": 0})
    program = program.map(lambda g: tile(g, chosen))
    text = show_schedule(schedule(program, Limits(), "few", 2, chosen))
    assert "phase down linear(layout=plain, unit=32, fetch=4096)" in text
    assert text.count("fetch=") == 1
    assert "\n  choices ahead=0\n" in text
    again = parse_schedule(text)
    assert show_schedule(again) == text
    assert again.tuning["ahead"] == 0
    with pytest.raises(CompileError, match="expected one of threads"):
        parse_schedule(text.replace("choices ahead=0", "choices ahaed=0"))


def test_no_choice_of_a_processor_changes_a_bit(
    compiled: ArtifactCache, checkpoint: Path, tmp_path: Path
) -> None:
    """All that promise it at once, beside the default; and the artifact says what it was compiled with."""
    plain = compiled(checkpoint, quant="int4", workers=(1, 2), limits=LIMITS)
    driver.compile_model(request(checkpoint, tmp_path / "tuned", tuning=Tuning.of(EVERY)))
    tokens = [(7 * i) % 250 for i in range(96)]
    with load(plain) as default, load(tmp_path / "tuned") as tuned:
        assert tuned.threads == 1  # where nobody says
        assert tuned.limits.few_rows == 2
        for chunk in (1, 2, 7, 50):
            assert np.array_equal(all_logits(default, tokens, chunk), all_logits(tuned, tokens, chunk))
    units = {path.stem: path.read_text() for path in tmp_path.glob("tuned/kernels/*/*.cpp")}
    assert "#define OL_PANEL 3\n" in units["step"]
    assert "tile<Fmt, 512>" in units["step"]
    assert "#define OL_CACHE_FETCH 1024\n" in units["attend_bf16"]
    record = Artifact.open(tmp_path / "tuned").manifest.raw["tuned"][host_level().name]
    assert (record["source"], record["applied"]) == ("live", EVERY)


@pytest.mark.parametrize("name", ["fetch", "split", *HEADER_CHOICES])
def test_the_header_of_the_kernels_has_the_defaults(name: str) -> None:
    """What nobody chose is not defined, so that models share their kernels."""
    header = (TEMPLATES / "tuning.h").read_text()
    assert f"#define OL_{name.upper()} {CHOICES[name].default} " in header


def test_a_split_of_another_size_gives_the_tokens_of_the_reference() -> None:
    """Positions in the second split, with few rows, where splits have partials of their own, and with many."""
    pair = Pair(tiny("llama", "f32"), 2, limits=Limits(96, 1, 128, 1, 4, "f32", split_tokens=64))
    rows = pair.start(0, [(7 * i) % 90 for i in range(70)], GREEDY)
    pair.step(rows, [69])
    pair.decode(2)
    with pytest.raises(CompileError, match="multiple of 64, got 100"):
        Limits(split_tokens=100)


# ---- the space --------------------------------------------------------------------------------------------


def test_what_is_pruned_says_why() -> None:
    program = tiny("llama", "q4_0").lowered
    cpu = {d.key: d for d in space(program, Limits(context=128, drafts=4, outputs=16), LEVELS["cpu-avx512"], (1, 2))}
    assert "cores" in cpu["threads"].pruned[16]
    assert cpu["split"].pruned[512] == "a context of 128 tokens is less than one split"
    assert "4 drafts" in cpu["few_rows"].pruned[4]
    assert "warps" not in cpu
    gpu = {d.key: d for d in space(program, Limits(), machine_for("h100"))}
    assert "28 KiB" in gpu["chunk"].pruned[64]
    assert "panel" not in gpu
    assert clash(Tuning.of({"warps": 16}), program, Limits(), machine_for("h100"))
    assert clash(Tuning.of({"panel": 6}), program, Limits(), LEVELS["cpu-avx512"])
    assert not clash(Tuning.of({"panel": 6, "block": 48}), program, Limits(), LEVELS["cpu-avx512"])


def test_phases_of_one_body_are_chosen_for_together() -> None:
    found = space(tiny("llama", "q4_0").lowered, Limits(), LEVELS["cpu-avx512"])
    keys = [key for d in found for key in d.keys if d.choice.name == "fetch"]
    assert len(keys) == len(set(keys)) > 3


# ---- the database -----------------------------------------------------------------------------------------


def entry(program: str = "p", **more: object) -> Entry:
    level = host_level()
    values: dict[str, object] = {
        "model": "m", "program": program, "target": level.name, "choices": {"threads": 1}, "how": "measured",
        "default_us": 100.0, "us": 80.0, "workload": ["tg1"], "candidates": 3,
        "environment": lookup.cpu_environment(level),
    }  # fmt: skip
    return Entry(**(values | more))  # type: ignore[arg-type]


WRITER = """
import sys
from onelaunch.compiler.tune.database import Entry, write
for i in range(15):
    write(Entry("m", f"{sys.argv[1]}{i}", "t", {"ahead": 0}, "measured", 2.0, 1.0, [], 1, {"machine": "x"}))
"""


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], env=small.environment()) for name in "ab"]
    assert [w.wait(60) for w in writers] == [0, 0]
    assert len(read(database.user_file())) == 30


def test_what_was_found_on_another_machine_is_passed_by_and_said(tmp_path: Path) -> None:
    here = lookup.cpu_environment(host_level())
    database.user_file().write_text(json.dumps({"schema": 1, "entries": {
        "k": database.asdict(entry(environment=here | {"cores": 999}))}}))  # fmt: skip
    found = find("p", host_level().name, here)
    assert (found.entry, found.source) == (None, "fallback")
    assert found.passed_by == (f"user: found with cores 999, here it is {here['cores']}",)
    write(entry())
    assert find("p", host_level().name, here).source == "live"
    database.LIVE.clear()
    assert find("p", host_level().name, here).source == "user"


def test_a_damaged_database_is_named() -> None:
    database.user_file().write_text("{")
    with pytest.raises(HostError, match="tuning database"):
        find("p", "t", {})


def test_compile_takes_what_was_found_and_the_artifact_says_so(
    compiled: ArtifactCache, checkpoint: Path, tmp_path: Path
) -> None:
    """Threads alone: the code is that of the default, which is compiled already."""
    compiled(checkpoint, quant="int4", workers=(1, 2), limits=LIMITS)
    key = subject(request(checkpoint, tmp_path / "x")).key
    write(entry(key))
    for tune, threads in (("cached", 1), ("none", 0)):
        driver.compile_model(request(checkpoint, tmp_path / tune, tune=tune))
        manifest = Artifact.open(tmp_path / tune).manifest
        assert manifest.tuned_threads == threads
    record = Artifact.open(tmp_path / "cached").manifest.raw["tuned"][host_level().name]
    assert (record["us"], record["default_us"], record["how"], record["source"]) == (80.0, 100.0, "measured", "live")
    assert "threads=1 (live, measured on " in tuned_words(record)


def test_a_choice_that_the_limits_forbid_is_left_and_said(checkpoint: Path, tmp_path: Path) -> None:
    targets = driver.request_targets(request(checkpoint, tmp_path / "x"))
    limits = Limits(drafts=4, outputs=16)
    chosen = lookup.choose(tiny("llama", "q4_0").program, "", targets, limits, Tuning.of({"few_rows": 1}), "cached")
    assert (chosen.limits, chosen.tuning) == (limits, UNTUNED)
    (record,) = chosen.record.values()
    assert record["skipped"][0].startswith("few_rows: ")


# ---- the model --------------------------------------------------------------------------------------------


class Uncompiled(modelled.Modelled):
    """The modelled evaluator without its compiler: every body costs the same."""

    def _compiled(self, made, tuning):  # type: ignore[no-untyped-def]
        titles = [f"{g.name}.{p.name}.{op.out.name}" for g in self.program.graphs for p in g.phases for op in p.anchor]
        kernel = type("K", (), {"spills": 0, "registers": 100, "warps": 8, "shared": 1 << 16, "static_shared": 0})
        return modelled.Compiled(kernel(), dict.fromkeys(titles, Cost(1.5, 6e4)))  # type: ignore[arg-type]


def test_a_model_tells_choices_apart_by_phase() -> None:
    program = tiny("llama", "q4_0", hidden=1024, ffn=4096, heads=16, kv_heads=8, head_dim=64).lowered
    machine = replace(machine_for("h100"), boundary_us=5.0)
    made = Uncompiled(program, Limits(context=8192, few_rows=4), machine)
    finer = made.evaluate(Tuning.of({"split": 128}))
    attends = {name: pair for name, pair in finer.per_phase.items() if name.endswith(".attend")}
    assert attends.keys() >= {"global.attend"}
    before, after = attends["global.attend"]
    assert after < before
    assert made.evaluate(UNTUNED).ratio == 1
    assert made.evaluate(Tuning.of({"ahead_part": 64})).ratio > 1
    times = made.segments(UNTUNED)
    assert times["mega"] < times["per-phase"]
