"""The row scheduler against a toy model in numpy: any mix of requests says what each would say alone."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest

from onelaunch.ir.errors import UsageError
from onelaunch.ir.limits import Limits
from onelaunch.ir.sampling import Sampling
from onelaunch.runtime import cache, pool, prefix, rows
from onelaunch.runtime.backend import StepFault
from onelaunch.runtime.cache import Cache, Pool, page_counts
from onelaunch.runtime.rows import Request, RowScheduler
from onelaunch.tests.toy import FAULT, LIMITS, NAN, VOCAB, ToyBackend, answer, groups


def scheduler(
    limits: Limits = LIMITS, kv_tokens: int | None = None
) -> tuple[RowScheduler, ToyBackend, Cache]:
    counts = page_counts(groups(limits), limits, kv_tokens)
    backend = ToyBackend(limits, groups(limits), counts)
    pages = Cache(groups(limits), counts, backend.state.pages, limits.context)
    return RowScheduler(backend, limits, pages, VOCAB), backend, pages


def random_request(rng: random.Random, longest: int) -> Request:
    length = rng.choice([1, 2, rng.randint(1, 40), rng.randint(1, longest // 2)])
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        seed=rng.randrange(2**64),
        stream=rng.randrange(4),
    )
    stop = tuple(rng.sample(range(256), rng.choice([0, 1, 12])))
    new = rng.randint(1, min(80, longest - length))
    return Request([rng.randrange(256) for _ in range(length)], new, sampling, stop)


def alone(request: Request, sinks: int = 0) -> list[int]:
    s = request.sampling
    seed = s.seed if s.temperature else None
    return answer(
        request.prompt, request.max_new_tokens, request.stop_tokens, seed=seed, stream=s.stream,
        penalty=s.repetition_penalty, sinks=sinks,
    )  # fmt: skip


def finish(s: RowScheduler, burst: int = 1) -> None:
    for _ in range(10_000):
        if s.idle:
            return
        s.step(burst)
    raise AssertionError("requests never end")


def check_all(requests: list[Request]) -> None:
    for request in requests:
        assert request.tokens == alone(request)
        assert request.finish == ("stop" if request.tokens[-1] in request.stop_tokens else "length")


@pytest.mark.parametrize("seed", range(24))
def test_random_arrivals_say_what_each_says_alone(seed: int) -> None:
    rng = random.Random(seed)
    limits = Limits(
        rows=rng.choice([1, 2, 5, 16, 64]),
        slots=rng.choice([1, 2, 4]),
        context=rng.choice([200, 512]),
        outputs=4,
        few_rows=4,
    )
    kv_tokens = rng.choice([None, 256, 400])
    s, _, pages = scheduler(limits, kv_tokens)
    requests = [random_request(rng, min(limits.context, kv_tokens or 512)) for _ in range(9)]
    waiting = list(requests)
    while waiting or not s.idle:
        while waiting and rng.random() < 0.3:
            s.submit(waiting.pop())
        s.step(rng.choice([1, 1, 7]))
    check_all(requests)
    assert all(held == 0 for held, _, _ in pages.counts())


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupt_at_any_line_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    s, _, pages = scheduler(kv_tokens=400)
    requests = [random_request(rng, 200) for _ in range(5)]
    for request in requests:
        s.submit(request)
    while not s.idle:
        interrupted(lambda: s.step(rng.choice([1, 4])), after=rng.randint(1, 1500))
    check_all(requests)
    assert all(held == 0 for held, _, _ in pages.counts())


def interrupted(call: Any, after: int) -> None:
    """Run `call`, with Ctrl-C at the given line of the scheduler or the cache, if it gets that far."""
    left = after

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (rows.__file__, cache.__file__, pool.__file__, prefix.__file__):
            return None
        left -= event == "line"
        if left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


def test_cancelling_one_leaves_the_others_alone() -> None:
    rng = random.Random(0)
    s, _, pages = scheduler()
    requests = [Request([rng.randrange(256) for _ in range(40)], 60) for _ in range(5)]
    for request in requests:
        s.submit(request)
    for _ in range(30):
        s.step()
    s.cancel([requests[1], requests[4]])
    assert requests[1].finish == requests[4].finish == "cancelled"
    assert requests[1].tokens == alone(requests[1])[: len(requests[1].tokens)]
    finish(s)
    check_all([requests[0], requests[2], requests[3]])
    assert all(held == 0 for held, _, _ in pages.counts())


def test_prompts_share_the_row_budget_and_decoding_goes_first() -> None:
    s, backend, _ = scheduler()
    quick = Request([1], 50)
    s.submit(quick)
    s.step()
    long, short = Request(list(range(100)), 1), Request([7, 8, 9], 1)
    s.submit(long)
    s.submit(short)
    s.step()
    # 16 rows: one decodes, the short prompt takes its 3, the long one the remaining 12.
    assert (len(quick.tokens), short.finish, long.done) == (2, "length", 12)
    assert backend.rows == [1, 16]


def test_two_long_prompts_advance_evenly() -> None:
    s, _, _ = scheduler()
    pair = [Request(list(range(100)), 1), Request(list(range(100, 190)), 1)]
    for request in pair:
        s.submit(request)
    for _ in range(4):
        s.step()
    assert [request.done for request in pair] == [32, 32]


def test_bursts_stop_when_nothing_is_left_to_run() -> None:
    s, backend, _ = scheduler()
    request = Request([5], 40)
    s.submit(request)
    s.step(16)
    s.step(16)
    assert len(request.tokens) == 17
    finish(s, 100)
    assert request.tokens == alone(request)
    assert len(backend.rows) == 40


def test_a_request_waits_until_pages_are_free_and_keeps_its_turn() -> None:
    s, _, _ = scheduler(kv_tokens=256)
    first, second, third = Request([1], 190), Request([2], 150), Request([3], 10)
    for request in (first, second, third):
        s.submit(request)
    s.step()
    assert [r.slot >= 0 for r in (first, second, third)] == [True, False, False]
    finish(s)
    check_all([first, second, third])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request([], 1), "expected at least one token"),
        (Request([0] * 600, 1), r"at most 512 tokens .* got 600"),
        (Request([VOCAB], 1), r"token ids 0 to 259, got 260"),
        (Request([-1], 1), "got -1"),
        (Request([1], 0), "expected at least 1, got 0"),
        (
            Request([1] * 100, 200),
            r"at most 157 after a prompt of 100 tokens \(the KV cache is 256\), got 200",
        ),
        (Request([1], 1, stop_tokens=tuple(range(17))), "at most 16, got 17"),
    ],
)
def test_what_can_never_run_is_refused(request_: Request, reason: str) -> None:
    s, _, _ = scheduler(kv_tokens=256)
    with pytest.raises(UsageError, match=reason):
        s.submit(request_)
    assert s.idle


def test_the_whole_context_can_be_used() -> None:
    s, _, _ = scheduler()
    request = Request([3] * 500, 13)
    s.submit(request)
    finish(s)
    check_all([request])
    with pytest.raises(UsageError, match="at most 13"):
        s.check(Request([3] * 500, 14))


def test_not_a_number_ends_one_request_and_its_pages_are_cleared() -> None:
    s, backend, _ = scheduler()
    bad, good = Request([1, NAN], 5), Request([1, 2], 5)
    s.submit(bad)
    s.submit(good)
    s.step()
    assert (bad.finish, bad.tokens) == ("invalid", [])
    finish(s)
    check_all([good])
    assert all(NAN not in kv for kv in backend.kv)


def test_a_fault_reaches_the_caller() -> None:
    s, _, _ = scheduler()
    s.submit(Request([FAULT], 1))
    with pytest.raises(
        StepFault, match="worker 0 stopped at record 5: expected 4 signals of event 3, got 2"
    ) as e:
        s.step()
    assert e.value.exit_code == 4


def test_pages_are_contiguous_where_they_can_be() -> None:
    free, held = Pool(0, 10), np.zeros(10, np.int32)

    def take(count: int, after: int = -1) -> list[int]:
        pages = free.take(count, held, after)
        held[pages] = 1
        return pages.tolist()

    assert take(4) == [0, 1, 2, 3]
    assert take(3) == [4, 5, 6]
    held[:4] = 0
    assert take(3) == [7, 8, 9]  # the tightest run
    assert take(2) == [0, 1]
    held[4:7] = 0
    assert take(1, after=4) == [5]  # behind what is there already
    assert take(4) == [2, 3, 4, 6]
    assert free.room(held) == 0


def test_a_ring_repeats_its_pages_and_strays_stay_in_the_slot() -> None:
    tables = np.full((2, 3, LIMITS.pages), -1, np.int32)
    pages = Cache(groups(), page_counts(groups(), LIMITS), tables, LIMITS.context)
    pages.take(1, 512)
    ring = groups()[1].ring_pages
    assert tables[1, 1].tolist() == [i % ring for i in range(LIMITS.pages)]
    pages.take(2, 65)
    assert set(tables[0, 2].tolist()) == set(pages.of(2)[0].tolist())
