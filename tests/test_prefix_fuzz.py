"""Random prompts that share prefixes, in small caches: whatever is shared and evicted, each says what it says alone."""

from __future__ import annotations

import random

import pytest

from onelaunch.ir.limits import Limits
from onelaunch.ir.sampling import Sampling
from onelaunch.runtime.rows import Request
from onelaunch.tests.prefixes import Fixture
from onelaunch.tests.test_rows import alone
from onelaunch.tests.toy import groups


def random_requests(rng: random.Random, longest: int, count: int) -> list[Request]:
    """Prompts that branch from each other anywhere, page boundaries preferred."""
    made: list[Request] = []
    for _ in range(count):
        stem = rng.choice(made).prompt if made and rng.random() < 0.8 else []
        cut = rng.choice([len(stem), len(stem) // 64 * 64, rng.randint(0, len(stem))])
        more = rng.choice([0, 1, 64, rng.randint(1, 150)])
        prompt = [*stem[:cut], *(rng.randrange(3) for _ in range(more))][: longest - 1] or [1]
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.7]), repetition_penalty=rng.choice([1.0, 1.2]), seed=rng.randrange(9)
        )
        stop = tuple(rng.sample(range(256), rng.choice([0, 8])))
        made.append(Request(prompt, rng.randint(1, min(120, longest - len(prompt))), sampling, stop))
    return made


def random_fixture(rng: random.Random, sinks: int = 0) -> tuple[Fixture, int]:
    limits = Limits(
        rows=rng.choice([1, 5, 16, 70]), slots=rng.choice([1, 2, 4]), context=512, outputs=4, few_rows=4
    )
    kv_tokens = rng.choice([None, 256, 320, 450])
    return Fixture(limits, kv_tokens, groups(limits, sinks)), min(512, kv_tokens or 512)


@pytest.mark.parametrize(("seed", "sinks"), [*((seed, 0) for seed in range(40)), *((seed, 9) for seed in range(12))])
def test_random_prompts_in_a_small_cache_say_what_each_says_alone(seed: int, sinks: int) -> None:
    rng = random.Random(seed)
    f, longest = random_fixture(rng, sinks)
    requests = random_requests(rng, longest, 14)
    cancelled = f.serve(rng, requests)
    for request in requests:
        assert request.tokens == alone(request, sinks)[: len(request.tokens)]
        assert (request.finish in ("stop", "length")) != (request in cancelled)
        assert request in cancelled or len(request.tokens) == len(alone(request, sinks))
    f.check_no_leak()


def test_the_random_prompts_do_share_and_do_evict() -> None:
    """What the test above draws is what it is about."""
    reused = evicted = 0
    for seed in range(10):
        rng = random.Random(seed)
        f, longest = random_fixture(rng)
        requests = random_requests(rng, longest, 14)
        f.run(*requests)
        reused += sum(request.reused for request in requests)
        known = sum(known for _, known, _ in f.cache.counts())
        evicted += sum(len(r.prompt) // 64 for r in requests) > known
    assert reused > 2000
    assert evicted > 3


@pytest.mark.parametrize("seed", range(16))
def test_an_interrupt_at_any_line_tears_no_shared_page(seed: int) -> None:
    rng = random.Random(seed)
    f = Fixture(kv_tokens=rng.choice([256, 400]))
    requests = random_requests(rng, 200, 6)
    f.serve_interrupted(rng, requests)
    assert all(request.tokens == alone(request) for request in requests)
    assert all(held == 0 for held, _, _ in f.cache.counts())
    f.cache.forget()
    assert all(free == pool.size for (_, _, free), pool in zip(f.cache.counts(), f.cache.pools, strict=True))
