"""Prefix reuse against the toy model: what is shared, kept and evicted, and who waits for whom."""

from __future__ import annotations

import pytest

from onelaunch.ir.limits import PAGE_TOKENS, Limits
from onelaunch.runtime.prefix import Node, page_key
from onelaunch.runtime.rows import Request
from onelaunch.tests.prefixes import Fixture, tokens
from onelaunch.tests.test_rows import alone, finish
from onelaunch.tests.toy import NAN, groups

WINDOWED = groups()[1:]  # a window of 70 tokens


@pytest.mark.parametrize(
    ("first", "again", "reused"),
    [
        (64, 64, 0),  # the last token is computed, and so its page is
        (65, 65, 64),
        (128, 128, 64),
        (128, 129, 128),
        (129, 129, 128),
        (300, 300, 256),
        (300, 130, 128),
        (63, 100, 0),  # part of a page is not shared
        (127, 200, 64),
    ],
)
def test_whole_pages_but_for_the_last_token_are_reused(first: int, again: int, reused: int) -> None:
    f = Fixture(Limits(rows=16, slots=3, context=512, outputs=4, few_rows=4), kinds=groups()[:1])
    prompt = tokens(512)
    f.run(Request(prompt[:first], 1))
    before = sum(f.backend.rows)
    second = Request(prompt[:again], 1)
    f.run(second)
    assert second.reused == reused
    assert sum(f.backend.rows) - before == again - reused
    f.check_no_leak()


def test_the_answer_is_reused_too() -> None:
    f = Fixture()
    first = Request(tokens(50), 100)
    f.run(first, burst=16)
    second = Request([*first.prompt, *first.tokens, 1, 2, 3], 20)
    f.run(second)
    assert second.reused == 128  # 149 positions were filled
    assert second.tokens == alone(second)


def test_a_window_resumes_only_where_all_of_it_is_held() -> None:
    """Window 70: from position 64n on, pages n-2 and n-1 are needed. Its pool here has no room for others' pages."""
    f = Fixture(Limits(rows=16, slots=1, context=512, outputs=4, few_rows=4), kinds=groups())
    prompt = tokens(400)
    f.run(Request(prompt, 1))
    assert f.cache.counts()[1] == (0, 2, 1)  # pages 4 and 5; the ring's third was not full
    for cut, reused in ((65, 0), (129, 0), (300, 0), (330, 0), (390, 384)):
        again = Request([*prompt[:cut], 7], 5)
        path = f.cache.find(again.reusable())
        assert len(path) * PAGE_TOKENS == reused, cut
    f.run(again)
    assert again.reused == 384
    assert again.tokens == alone(again)


def test_a_large_pool_holds_windows_of_long_ago() -> None:
    f = Fixture()
    prompt = tokens(400)
    f.run(Request(prompt, 1))
    for cut in (65, 129, 300, 390):
        again = Request([*prompt[:cut], 7], 5)
        f.run(again)
        assert again.reused == cut // PAGE_TOKENS * PAGE_TOKENS
        assert again.tokens == alone(again)
        f.check()


def test_a_page_is_known_by_all_tokens_before_it() -> None:
    """Windowed layers hold nothing of the first page by then, and yet it must be the same."""
    f = Fixture(kinds=WINDOWED)
    prompt = tokens(330)
    f.run(Request(prompt, 1))
    same, other = Request([*prompt, 5], 1), Request([prompt[0] + 1, *prompt[1:], 5], 1)
    f.run(same)
    f.run(other)
    assert (same.reused, other.reused) == (320, 0)


def test_a_window_resumes_only_where_its_sinks_are_held() -> None:
    f = Fixture(kinds=groups(sinks=6)[1:])
    prompt = tokens(330)
    for last, reused in ((1, 0), (2, 320)):
        request = Request([*prompt, last], 1)
        f.run(request)
        assert request.reused == reused
    f.run(Request([*prompt[:70], NAN], 5))  # all it held is given up, and that is the first page
    again = Request([*prompt, 3], 1)
    f.run(again)
    assert again.reused == 0
    f.check()


def test_a_hash_alone_is_not_believed() -> None:
    class Same(bytes):
        def __hash__(self) -> int:
            return 1

    root = Node(None, b"", [-1])
    made = [root.child(Same(page_key([i] * PAGE_TOKENS))) for i in range(3)]
    assert len({id(node) for node in made}) == 3
    assert root.path([Same(page_key([1] * PAGE_TOKENS))]) == [made[1]]
    assert root.path([Same(page_key([7] * PAGE_TOKENS))]) == []


def test_the_least_recently_used_page_goes_first_and_of_a_prompt_its_end() -> None:
    f = Fixture(Limits(rows=16, slots=1, context=512, outputs=4, few_rows=4), kinds=groups()[:1])
    a, b = tokens(192, 1), tokens(192, 2)
    for prompt in (a, b, a):
        f.run(Request([*prompt, 9], 1))
    f.run(Request(tokens(256, 3), 1))  # eight pages in all: six kept, a fourth prompt needs four

    def known(prompt: list[int]) -> int:
        return len(f.cache.find([page_key(prompt[i : i + 64]) for i in range(0, 192, 64)]))

    assert (known(a), known(b)) == (3, 1)
    f.check_no_leak()


def test_prompts_that_begin_the_same_wait_for_the_first_to_be_read() -> None:
    f = Fixture()
    stem = tokens(200)
    requests = [Request([*stem, i], 10) for i in range(3)]
    f.run(*requests)
    assert [request.reused for request in requests] == [0, 192, 192]
    assert sum(f.backend.rows) == 201 + 2 * 9 + 3 * 9
    assert [request.tokens for request in requests] == [alone(request) for request in requests]


def test_nobody_waits_for_what_was_computed_and_is_gone() -> None:
    f = Fixture(Limits(rows=16, slots=2, context=512, outputs=4, few_rows=4))
    prompt = tokens(500)
    first, second = Request(prompt, 5), Request([*prompt[:70], 1], 5)
    f.rows.submit(first)
    while first.done < 480:
        f.rows.step()
    f.rows.submit(second)
    f.rows.step()
    assert (second.slot, second.reused) == (1, 0)  # the window's first page went to later positions
    finish(f.rows)
    assert second.tokens == alone(second)


def test_a_burst_does_not_run_ahead_of_what_the_rings_hold() -> None:
    """A ring holds a window and a step's rows: laid out further ahead, a page would go while it is still read."""
    f = Fixture(Limits(rows=5, slots=3, context=512, outputs=4, few_rows=4))
    requests = [Request(tokens(count, count), 250) for count in (180, 181)]
    f.run(*requests, burst=400)
    assert all(request.tokens == alone(request) for request in requests)


def test_holders_of_a_page_are_counted() -> None:
    f = Fixture()
    stem = tokens(128)
    f.run(Request([*stem, 1], 1))
    requests = [Request([*stem, i], 30) for i in range(3)]
    for request in requests:
        f.rows.submit(request)
    f.rows.step()
    for g in range(2):
        assert sorted(f.cache._held(g).tolist())[-3:] == [1, 3, 3]
    f.rows.cancel(requests[:2])
    assert all(f.cache._held(g).max() == 1 for g in range(2))
    finish(f.rows)
    f.check_no_leak()


def test_one_that_waits_lets_others_pass_and_keeps_its_turn() -> None:
    f = Fixture()
    stem = tokens(200)
    first, second, other, fourth = (
        Request([*stem, 1], 5), Request([*stem, 2], 5), Request([1, 2, 3], 90), Request([4], 5),
    )  # fmt: skip
    for request in (first, second, other, fourth):
        f.rows.submit(request)
    f.rows.step()
    assert [r.slot >= 0 for r in (first, second, other, fourth)] == [True, False, True, False]
    while second.slot < 0:
        f.rows.step()
    assert first.done >= 192
    assert fourth.slot < 0 or first.finish
    finish(f.rows)
    assert all(r.tokens == alone(r) for r in (first, second, other, fourth))


def test_nobody_waits_for_what_is_known_or_cancelled() -> None:
    f = Fixture()
    stem = tokens(200)
    first, second = Request([*stem, 1], 5), Request([*stem, 2], 5)
    f.rows.submit(first)
    f.rows.submit(second)
    f.rows.step()
    f.rows.cancel([first])
    f.rows.step()
    assert second.slot >= 0
    finish(f.rows)
    assert second.tokens == alone(second)
    third, fourth = Request([*stem, 3], 5), Request([*stem, 4], 5)
    f.rows.submit(third)
    f.rows.submit(fourth)
    f.rows.step()
    assert (third.reused, fourth.reused) == (192, 192)


def test_what_a_cancelled_prompt_computed_is_reused() -> None:
    f = Fixture()
    prompt = tokens(300)
    gone = Request(prompt, 5)
    f.rows.submit(gone)
    for _ in range(9):
        f.rows.step()
    f.rows.cancel([gone])
    again = Request(prompt, 5)
    f.run(again)
    assert again.reused == 9 * 16 // 64 * 64
    assert again.tokens == alone(again)


def test_pages_beside_not_a_number_are_cleared_when_their_last_holder_ends() -> None:
    f = Fixture()
    stem = tokens(128)
    good, bad = Request([*stem, 1], 60), Request([*stem, NAN], 5)
    f.rows.submit(good)
    f.rows.submit(bad)
    while not bad.finish:
        f.rows.step()
    assert (bad.finish, bad.reused) == ("invalid", 128)
    finish(f.rows)
    assert good.tokens == alone(good)
    assert not any(pool.spoiled.any() for pool in f.cache.pools)
    again = Request([*stem, 2], 5)
    assert f.cache.find(again.reusable()) == []
    f.check()
    assert all(NAN not in kv for kv in f.backend.kv)
    f.run(again)
    assert again.tokens == alone(again)
    f.check_no_leak()


def test_off_nothing_is_kept() -> None:
    f = Fixture(keep=False)
    for _ in range(2):
        request = Request(tokens(300), 60)
        f.run(request, burst=16)
        assert (request.reused, request.tokens) == (0, alone(request))
    assert [known for _, known, _ in f.cache.counts()] == [0, 0]
