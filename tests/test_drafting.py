"""Where drafts come from: looking up what followed before, how many, and what may be asked for."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from onelaunch.codegen.cpu.units import look_up_unit
from onelaunch.ir import drafting
from onelaunch.ir.drafting import adapted, look_up
from onelaunch.ir.errors import CompileError, UsageError
from onelaunch.ir.limits import Limits
from onelaunch.runtime.speculate import FORMS, Wish, drafts_of, parse_speculate
from onelaunch.tests.native import LEVEL_FLAGS, TEMPLATES, TESTS, host_levels
from onelaunch.tests.test_sample import pointer

each_level = pytest.mark.parametrize("level", host_levels())


@pytest.mark.parametrize(
    ("history", "count", "drafts"),
    [
        ([7, 1, 2, 3, 9, 8, 2, 3], 3, [9, 8, 2]),
        ([1, 2, 5, 1, 2, 6, 1, 2], 1, [6]),  # the last of equal places
        ([9, 1, 2, 5, 1, 2, 6, 9, 1, 2], 1, [5]),  # three shared tokens before two
        ([1, 2, 3, 4, 5, 0, 2, 3, 4, 6, 1, 2, 3, 4], 1, [5]),
        ([8, 1, 2, 3, 4, 5, 7, 1, 2, 3, 4, 6, 8, 1, 2, 3, 4], 1, [6]),  # a fifth shared token counts no more
        ([4, 5, 4, 5], 5, [4, 5, 4, 5, 4]),  # goes on from its own beginning
        ([3, 3, 3], 4, [3, 3, 3, 3]),
        ([1, 2, 3, 9, 3], 2, []),  # one token is too little
        ([5], 2, []),
        ([5, 5], 2, []),
        ([1, 2, 7, 1, 2], 0, []),
        ([1, 2, 7, 1, 2], -3, []),
    ],
)
def test_what_followed_the_longest_shared_run(history, count, drafts):
    assert look_up(history, count) == drafts
    for level in host_levels():
        assert native_look_up(level, history, count) == drafts


@each_level
def test_every_level_finds_the_same(level):
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        history = rng.integers(0, rng.choice([2, 4, 20]), int(rng.choice([1, 2, 3, 4, 5, 17, 40, 700])))
        count = int(rng.integers(0, 8))
        expected = look_up(history, count)
        assert native_look_up(level, history, count) == expected
        found += bool(expected)
    assert 100 < found < 390


def native_look_up(level, history, count):
    tokens, drafts = np.array(history, np.int32), np.zeros(16, np.int32)
    n = harness(level).harness_look_up(pointer(tokens), len(tokens), count, pointer(drafts))
    return drafts[:n].tolist()


@cache
def harness(level):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "drafts.cpp").write_text(look_up_unit())
        flags = [*LEVEL_FLAGS[level], f"-DOL_LEVEL={level}", f"-I{TEMPLATES}", f"-I{folder}"]
        source, out = str(TESTS / "draft_harness.cpp"), f"{folder}/drafts.so"
        common = ["g++", "-O2", "-std=c++17", "-Wno-psabi", "-shared", "-fPIC"]
        subprocess.run([*common, *flags, source, "-o", out], check=True)
        return ctypes.CDLL(out)


def test_how_many_to_guess_follows_what_held():
    cases = [((1, 1, 1, 4), 2), ((2, 2, 2, 4), 4), ((4, 4, 4, 4), 4), ((4, 4, 2, 4), 3), ((4, 4, 0, 4), 1)]
    cases += [((3, 0, 0, 4), 3), ((4, 2, 2, 4), 4), ((1, 1, 0, 1), 1)]
    for given, expected in cases:
        assert adapted(*given) == expected
        for level in host_levels():
            assert harness(level).harness_adapted(*given) == expected


def test_the_first_places_share_no_more_tokens_than_there_are():
    """The longest run would begin before position 0."""
    assert drafting.LONGEST == 4
    assert look_up([1, 2, 9, 0, 1, 2], 1) == [9]
    assert look_up([1, 2, 9, 5, 1, 2, 8, 0, 1, 2], 1) == [8]


def test_all_rows_of_a_step_stay_among_the_few():
    limits = Limits(slots=4, outputs=10, drafts=4)
    assert [limits.drafts_beside(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [4, 3, 1, 1, 0, 0, 0]
    assert limits.decode_rows == 10  # two slots with three drafts each, two that read a prompt
    assert Limits(slots=4).decode_rows == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafts": 8}, "limits: expected drafts 0 to 7, got 8"),
        ({"drafter": "gram"}, "limits: expected drafter ngram or model, got gram"),
        ({"drafts": -1}, "limits: expected drafts 0 to 7, got -1"),
        ({"drafts": 4}, "limits: expected outputs >= 10, got 8"),
        ({"drafts": 4, "rows": 9, "outputs": 12}, "limits: expected rows >= 10, got 9"),
    ],
)
def test_limits_without_room_for_drafts_are_refused(changes, message):
    with pytest.raises(CompileError) as error:
        Limits(**changes)
    assert error.value.reasons == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngrm:4", f"speculate: expected {FORMS}, got `ngrm:4`"),
        ("auto:4", f"speculate: expected {FORMS}, got `auto:4`"),
        ("", f"speculate: expected {FORMS}, got ``"),
        ("draft:", "speculate: expected draft:PATH:K with K from 1, got `draft:`"),
        ("draft:0", "speculate: expected draft:PATH:K with K from 1, got `draft:0`"),
        ("draft:a.gguf:0", "speculate: expected draft:PATH:K with K from 1, got `draft:a.gguf:0`"),
        ("ngram:", "speculate: expected ngram:K with K from 1, got `ngram:`"),
        ("ngram:0", "speculate: expected ngram:K with K from 1, got `ngram:0`"),
        ("ngram:4x", "speculate: expected ngram:K with K from 1, got `ngram:4x`"),
    ],
)
def test_a_wrong_spelling_is_refused(text, message):
    with pytest.raises(UsageError) as error:
        parse_speculate(text)
    assert error.value.reasons == (message,)


def test_who_drafts_may_be_a_path_with_colons_in_it():
    assert parse_speculate("draft:a:b.gguf:3") == Wish("draft", 3, "a:b.gguf")
    assert parse_speculate("draft:a:b.gguf") == Wish("draft", None, "a:b.gguf")
    assert parse_speculate("draft:3") == Wish("draft", 3)
    assert parse_speculate("draft") == Wish("draft")


def test_what_was_compiled_bounds_what_may_be_asked_for():
    with_drafts, without = Limits(drafts=3, outputs=12), Limits()
    assert [drafts_of(text, with_drafts) for text in ("off", "auto", "ngram", "ngram:2")] == [0, 3, 3, 2]
    assert [drafts_of(text, without) for text in ("off", "auto")] == [0, 0]
    with pytest.raises(UsageError, match="at most ngram:3, what was compiled, got `ngram:4`") as error:
        drafts_of("ngram:4", with_drafts)
    assert error.value.hint == "compile it with `--speculate ngram:4`"
    with pytest.raises(UsageError, match="an artifact compiled with drafts, got one without for `ngram`"):
        drafts_of("ngram", without)
    with pytest.raises(UsageError, match="expected ngram or ngram:K, what was compiled, got `draft:2`"):
        drafts_of("draft:2", with_drafts)


def test_who_drafts_is_who_was_compiled():
    limits = Limits(drafts=3, outputs=12, drafter="model")
    assert [drafts_of(text, limits) for text in ("off", "auto", "draft", "draft:2")] == [0, 3, 3, 2]
    with pytest.raises(UsageError, match="expected draft or draft:K, what was compiled, got `ngram:2`"):
        drafts_of("ngram:2", limits)
    with pytest.raises(UsageError, match=r"got `draft:b\.gguf:2`"):
        drafts_of("draft:b.gguf:2", limits)
    with pytest.raises(UsageError, match="at most draft:3") as error:
        drafts_of("draft:4", limits)
    assert error.value.hint == "compile it with `--speculate draft:PATH:4`"
