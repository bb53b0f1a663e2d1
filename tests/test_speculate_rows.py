"""The row scheduler over steps that draft: whatever is guessed, each request says what it says alone."""

from __future__ import annotations

import random

import pytest

from onelaunch.ir.limits import Limits
from onelaunch.runtime.request import Request
from onelaunch.tests.drafting_toy import DraftingToy
from onelaunch.tests.prefixes import Fixture
from onelaunch.tests.test_prefix_fuzz import random_requests
from onelaunch.tests.test_rows import alone

LIMITS = {"context": 512, "outputs": 12, "few_rows": 8, "drafts": 4}


def fixture(rng: random.Random) -> tuple[Fixture, int]:
    limits = Limits(rows=rng.choice([12, 16, 70]), slots=rng.choice([1, 2, 4]), **LIMITS)
    kv_tokens = rng.choice([None, 256, 320, 450])
    return Fixture(limits, kv_tokens, toy=DraftingToy), min(512, kv_tokens or 512)


def drafting(rng: random.Random, longest: int, count: int) -> list[Request]:
    requests = random_requests(rng, longest, count)
    for request in requests:
        request.drafts = rng.choice([0, 1, 3, 4])
    return requests


@pytest.mark.parametrize("seed", range(14))
def test_random_prompts_say_what_each_says_alone(seed: int) -> None:
    rng = random.Random(seed)
    f, longest = fixture(rng)
    requests = drafting(rng, longest, 12)
    cancelled = f.serve(rng, requests)
    for request in requests:
        assert request.tokens == alone(request)[: len(request.tokens)]
        assert request in cancelled or request.finish == ("stop" if stopped(request) else "length")
        assert request in cancelled or len(request.tokens) == len(alone(request))
    f.check_no_leak()


def stopped(request: Request) -> bool:
    return request.tokens[-1] in request.stop_tokens


def test_what_is_drawn_above_does_draft() -> None:
    """Guesses are accepted, refused and cut off by the end; steps hold a slot's five rows."""
    accepted = drafted = longest = 0
    for seed in range(6):
        rng = random.Random(seed)
        f, context = fixture(rng)
        requests = drafting(rng, context, 12)
        f.run(*requests)
        accepted += sum(sum(r.accepted) for r in requests)
        drafted += sum(sum(r.drafted) for r in requests)
        assert not any(sum(r.drafted) for r in requests if not r.drafts)
        longest = max(longest, f.backend.longest)
    assert 0.3 * drafted < accepted < 0.9 * drafted
    assert accepted > 500
    assert longest == 5


@pytest.mark.parametrize("seed", range(5))
def test_an_interrupt_at_any_line_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    limits = Limits(rows=16, slots=3, **LIMITS)
    f = Fixture(limits, rng.choice([256, 400]), toy=DraftingToy)
    requests = drafting(rng, 200, 6)
    f.serve_interrupted(rng, requests)
    assert all(request.tokens == alone(request) for request in requests)


def test_a_step_counts_what_it_commits() -> None:
    f = Fixture(Limits(rows=16, slots=3, **LIMITS), toy=DraftingToy)
    f.backend.right = 1.0
    request = Request([1, 2, 3], 101, drafts=4)
    f.run(request)
    assert request.tokens == alone(request)
    assert request.steps + sum(request.accepted) == 101
    assert request.steps < 35  # some steps have no guess
    assert request.drafted == request.accepted


def test_a_burst_never_outruns_the_ring_of_a_window() -> None:
    """As many steps as rows, each of five tokens, would write over what the window still reads."""
    f = Fixture(Limits(rows=70, slots=3, **LIMITS), toy=DraftingToy)
    f.backend.right = 1.0
    request = Request([1, 2, 3], 400, drafts=4)
    f.run(request, burst=70)
    assert request.tokens == alone(request)
