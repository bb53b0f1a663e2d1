"""Speculation on the command line: on by default, the same text without, and what it says about itself."""

from __future__ import annotations

import json
import re

from onelaunch.compiler.cli.compile import limits_of
from onelaunch.ir.limits import Limits
from onelaunch.tests import small

PROMPT = "abc abc abc abc abc abc "


def run(*options: str) -> tuple[list[int], dict[str, object] | None, str]:
    done = small.command("run", small.artifact(), "-p", PROMPT, "--raw", "--max-new-tokens", "60", "--json", "--stats",
                         *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["tokens"], result["speculation"], done.stderr


def test_text_is_the_same_and_the_statistics_add_up() -> None:
    tokens, found, notes = run()
    plain, nothing, silence = run("--speculate", "off")
    assert tokens == plain
    assert nothing is None
    assert "speculation" not in silence
    assert found is not None
    assert found["steps"] + sum(found["accepted"]) == len(tokens) - 1
    said = re.search(r"speculation: ([\d.]+) tokens per step; accepted by position (.*)", notes)
    assert said is not None
    assert float(said[1]) == round(found["tokens_per_step"], 2)
    assert re.findall(r"of (\d+)", said[2]) == [str(count) for count in found["drafted"]]


def test_bench_measures_a_text_that_repeats_itself() -> None:
    words = ("bench", small.artifact(), "--tokens", "16", "--depth", "0", "--prompt-tokens", "0", "--rounds", "1")
    done = small.command(*words, "--speculate", "ngram:3", "--json")
    assert done.returncode == 0, done.stderr
    plain, copied = json.loads(done.stdout)
    assert (plain["test"], copied["test"].split(",")[0]) == ("tg16 @ d0", "copy16")
    assert copied["tokens_per_step"] >= 1
    assert len(copied["acceptance"]) == 4  # by position, up to what was compiled
    assert copied["acceptance"][3] == 0  # of which one fewer was asked for


def test_what_is_compiled_by_default_fits_the_other_limits() -> None:
    def made(rows: int = 256, slots: int = 4, outputs: int | None = None, speculate: str = "auto") -> Limits:
        return limits_of(rows, slots, None, outputs, "bf16", speculate)

    assert (made().drafts, made().outputs) == (4, 10)
    assert (made(speculate="off").drafts, made(speculate="off").outputs) == (0, 8)
    assert (made(rows=1, slots=1).drafts, made(rows=3, slots=1).drafts) == (0, 2)
    assert (made(outputs=8).drafts, made(slots=16).drafts, made(slots=16).outputs) == (2, 4, 22)
    assert made(speculate="ngram:7").drafts == 7


def test_a_second_model_drafts_and_is_verified_with_the_first() -> None:
    made = small.place() / "drafted.ola"
    options = ("--threads", "2", "--rows", "24", "--quant", "int8", "--speculate", f"draft:{small.model()}:3")
    done = small.command("compile", small.model(), "-o", made, *options)
    assert done.returncode == 0, done.stderr
    assert "MB for each token guessed, up to 3 a step" in done.stderr
    plain = run("--speculate", "off")[0]
    told = ("run", made, "-p", PROMPT, "--raw", "--max-new-tokens", "60", "--json", "--speculate", "draft:2")
    result = json.loads(small.command(*told).stdout)
    assert result["tokens"] == plain
    assert result["speculation"]["accepted"] == result["speculation"]["drafted"]  # it drafts for itself
    checked = small.command("verify", made, small.model(), "--draft", small.model(), "--tokens", "8")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    missing = small.command("verify", made, small.model())
    assert missing.returncode == 2
    assert "--draft: expected the model that drafts in it, got none" in missing.stderr


def test_a_draft_model_without_a_path_is_asked_for() -> None:
    done = small.command("compile", small.model(), "--speculate", "draft:3")
    assert done.returncode == 2
    assert "expected draft:PATH:4, the model that drafts, got `draft:3`" in done.stderr
