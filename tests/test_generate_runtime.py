"""The whole runtime on a compiled toy model: text, streams, explicit rows, benchmarks, wrong input."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onelaunch.ir.errors import UsageError, VerifyError
from onelaunch.runtime import Model, StepFault, host, load
from onelaunch.runtime.generation import StopStrings
from onelaunch.tests import toy
from onelaunch.tests.toy import FAULT, NAN, VOCAB, answer

NOWHERE = [258, 259]  # stop tokens the toy model never says


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONELAUNCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        host.kernel_folder.cache_clear()
        library = toy.compiled(tmp_path_factory.mktemp("toy"))
        root = toy.write_artifact(tmp_path_factory.mktemp("artifact") / "toy", library)
        yield toy.zipped(root, root.parent / "toy.ola")
    host.kernel_folder.cache_clear()


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with load(path) as model:
        yield model


def text_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


def test_text_in_text_out(model: Model) -> None:
    result = model.generate("hello", max_new_tokens=40)
    assert result.tokens == answer(list(b"hello"), 40, [toy.END])
    assert result.text == text_of(result.tokens)
    assert (result.prompt_tokens, result.finish_reason) == (5, "length")
    assert result.timings.decode_per_second > 0


def test_token_ids_chat_and_messages(model: Model) -> None:
    assert model.generate([1, 2, 3], max_new_tokens=5).tokens == answer([1, 2, 3], 5)
    expected = answer(list(b"<hi>"), 5)
    assert model.generate("hi", chat=True, max_new_tokens=5).tokens == expected
    assert model.generate([{"role": "user", "content": "hi"}], chat=True, max_new_tokens=5).tokens == expected
    assert model.generate(np.array([1, 2, 3]), max_new_tokens=5).tokens == answer([1, 2, 3], 5)  # type: ignore[call-overload]


def test_a_stop_token_ends_the_text_before_it(model: Model) -> None:
    full = answer([9], 30)
    stop = full[12]
    result = model.generate([9], max_new_tokens=30, stop_tokens=[stop])
    assert result.finish_reason == "stop"
    assert result.tokens == full[: full.index(stop) + 1]
    assert result.text == text_of(result.tokens[:-1])


def test_prompts_together_say_what_they_say_alone(model: Model) -> None:
    prompts = [[i, i + 1, 3 * i] * (i + 1) for i in range(7)]
    settings = {"max_new_tokens": 50, "temperature": 0.8, "seed": 11, "stop_tokens": NOWHERE}
    together = model.generate(prompts, repetition_penalty=1.1, **settings)
    for i, (prompt, result) in enumerate(zip(prompts, together, strict=True)):
        assert result.tokens == answer(prompt, 50, seed=11, stream=i, penalty=1.1)
        single = model.generate(prompt, repetition_penalty=1.1, first_stream=i, **settings)
        assert (single.tokens, single.text) == (result.tokens, result.text)


def test_pieces_join_to_the_text(model: Model) -> None:
    for stop in ([], text_stop(model)):
        whole = model.generate("abc", max_new_tokens=60, stop=stop)
        stream = model.stream("abc", max_new_tokens=60, stop=stop)
        pieces = list(stream)
        assert "".join(pieces) == whole.text
        assert all(pieces)
        assert (stream.result.tokens, stream.result.finish_reason) == (whole.tokens, whole.finish_reason)
        assert next(stream, None) is None


def text_stop(model: Model) -> list[str]:
    text = model.generate("abc", max_new_tokens=60).text
    return [text[20:23], "never said"]


def test_a_stop_string_cuts_the_text_and_the_tokens(model: Model) -> None:
    text = model.generate("abc", max_new_tokens=60).text
    stop = text[20:23]
    result = model.generate("abc", max_new_tokens=60, stop=stop)
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"
    assert stop in text_of(result.tokens)
    assert stop not in text_of(result.tokens[:-1])


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_do_not_depend_on_the_pieces(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(2, 7))) for _ in range(3)]
    ends = [end for end in range(61) if any(text[:end].endswith(stop) for stop in stops)]
    cut = ends[0] - max(len(s) for s in stops if text[: ends[0]].endswith(s)) if ends else 60
    strings, out, at = StopStrings(stops), "", 0
    while at < 60:
        size = rng.randint(1, 5)
        out += strings.push(text[at : at + size])
        assert text[:cut].startswith(out)
        at += size
    assert out + strings.finish() == text[:cut]
    assert strings.matched == bool(ends)


def test_of_two_stop_strings_the_first_complete_one_counts() -> None:
    assert StopStrings(["abcd", "bc"]).push("abcd") == "a"
    assert StopStrings(["bcd", "abcd"]).push("abcd") == ""


def test_a_stream_that_ran_ahead_still_ends_at_its_stop_string(model: Model) -> None:
    stop = text_stop(model)
    expected = model.generate("abc", max_new_tokens=60, stop=stop)
    ahead = model.stream("abc", max_new_tokens=60, stop=stop)
    pieces = [next(ahead)]
    list(model.stream("other", max_new_tokens=80))  # its steps compute rows of both
    assert "".join(pieces + list(ahead)) == expected.text
    assert ahead.result.tokens == expected.tokens


def test_streams_read_in_turns_and_from_threads_do_not_mix(model: Model) -> None:
    prompts = ["one", "second", "the third", "4", "fifth prompt"]
    expected = [model.generate(p, max_new_tokens=40).text for p in prompts]
    streams = [model.stream(p, max_new_tokens=40) for p in prompts]
    got = ["" for _ in prompts]
    live = set(range(len(prompts)))
    while live:
        for i in sorted(live):
            piece = next(streams[i], None)
            got[i] += piece or ""
            live -= {i} if piece is None else set()
    assert got == expected
    results: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda i=i: results.update({i: "".join(model.stream(prompts[i], max_new_tokens=40))})
        )
        for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(len(prompts))] == expected


def test_a_closed_stream_gives_its_slot_back(path: Path) -> None:
    with load(path, kv_tokens=512) as model:
        stream = model.stream("x", max_new_tokens=500)
        next(stream)
        with pytest.raises(UsageError, match="running"):
            model.reset()
        stream.close()
        model.reset()
        assert model.generate([1], max_new_tokens=500, stop_tokens=NOWHERE).tokens == answer([1], 500)


def test_without_a_limit_the_context_is_filled(model: Model) -> None:
    assert model.generate([1] * 500, stop_tokens=NOWHERE).tokens == answer([1] * 500, 13)


def test_steps_return_logits_of_the_rows_asked_for(model: Model) -> None:
    first, second = [5, 6, 7, 8], [9, 1]
    logits = model.step(first + second, [0] * 4 + [2] * 2, [0, 1, 2, 3, 0, 1], [1, 3, 5])
    assert logits.shape == (3, VOCAB)
    assert logits.argmax(1).tolist() == [answer(p, 1)[0] for p in ([5, 6], first, second)]
    token = int(logits[1].argmax())
    assert model.step([token], positions=[4]).argmax() == answer(first, 2)[1]
    # Back to an earlier position: what came after is forgotten.
    assert model.step([40], positions=[2]).argmax() == answer([5, 6, 40], 1)[0]
    with pytest.raises(UsageError, match="position up to 3, got 5"):
        model.step([1], positions=[5])
    model.reset()
    with pytest.raises(UsageError, match="position up to 0, got 3"):
        model.step([1], positions=[3])


def test_a_ring_that_forgot_is_not_read(model: Model) -> None:
    for start in range(0, 400, 16):
        model.step([7] * 16, positions=range(start, start + 16))
    assert model.step([8], positions=[390]).argmax() == answer([7] * 390 + [8], 1)[0]
    with pytest.raises(UsageError, match="window cached, got 200 after 400"):
        model.step([8], positions=[200])
    assert model.step([8], positions=[0]).argmax() == answer([8], 1)[0]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (([],), "1 to 16 rows, got 0"),
        (([1] * 17,), "1 to 16 rows, got 17"),
        (([1, 1, 1], [0, 1, 0], [0, 0, 1]), "side by side"),
        (([1, 1], [0, 0], [0, 2]), "side by side"),
        (([1], [3], [0]), "slot from 0 to 2, got 3"),
        (([1], [0], [0], [1]), "output row from 0 to 0, got 1"),
        (([VOCAB],), "token from 0 to 259, got 260"),
        (([1, 2], [0], [0, 1]), "as many slots"),
        (([1] * 5, [0] * 5, range(5), range(5)), "at most 4 outputs, got 5"),
    ],
)
def test_wrong_rows_are_refused(model: Model, rows: tuple[list[int], ...], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        model.step(*rows)
    assert model.generate([1], max_new_tokens=3).tokens == answer([1], 3)


def test_benchmarks_time_steps_and_leave_the_model_usable(model: Model) -> None:
    assert len(model.bench_decode(20, depth=100)) == 20
    assert len(model.bench_decode(5, depth=300, slots=3)) == 5
    assert len(model.bench_decode(5, depth=0)) == 5
    assert model.bench_prefill(200) > 0
    assert model.read_gbps() > 0
    assert model.generate([1, 2], max_new_tokens=9).tokens == answer([1, 2], 9)
    assert len(model.bench_decode(5, depth=300, slots=2, rows=2)) == 5
    assert len(model.bench_decode(9, depth=500, rows=4)) == 9
    assert model.generate([1, 2], max_new_tokens=9).tokens == answer([1, 2], 9)
    with pytest.raises(UsageError, match=r"0 to 512, got 5 steps of 1 rows from 510 on"):
        model.bench_decode(5, depth=510)
    with pytest.raises(UsageError, match=r"0 to 512, got 10 steps of 4 rows from 500 on"):
        model.bench_decode(10, depth=500, rows=4)
    with pytest.raises(UsageError, match=r"1 to \d+ slots and \d+ rows in all, got 1 slots of 90 rows"):
        model.bench_decode(1, depth=0, rows=90)


def test_a_repeated_benchmark_decodes_the_same_tokens(model: Model) -> None:
    state = model._backend.state
    model.bench_decode(8, depth=90)
    first = state.slot_tokens[0, :8].tolist()
    prompt = [(i * 31 + 5) % (VOCAB // 2) for i in range(91)]
    assert first == answer(prompt, 8)
    model.bench_decode(3, depth=200)
    model.bench_decode(8, depth=90)
    assert state.slot_tokens[0, :8].tolist() == first


def test_bytes_per_token_counts_windows(model: Model) -> None:
    # group 0: 2 layers x 2 heads x 256 B / 64 tokens = 16; group 1: 3 x 1 x 320 / 64 = 15, at most 70 tokens
    assert model.bytes_per_token(0) == 1000 + 16 + 15
    assert model.bytes_per_token(99) == 1000 + 100 * 16 + 70 * 15


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("", {}, "at least one token, got none"),
        ([], {}, "got nothing"),
        ([[]], {}, "at least one token, got none"),
        ([1] * 513, {}, "at most 512 tokens .the compiled context., got 513"),
        ([1, 300], {}, "token ids 0 to 259, got 300"),
        ([1.5], {}, "expected text or token ids"),
        (3, {}, "got int"),
        ([{"role": "user", "content": "x"}], {}, "add `chat=True`"),
        ("x", {"max_new_tokens": 0}, "at least 1, got 0"),
        ("x", {"max_new_tokens": 600}, r"at most 512 after a prompt of 1 tokens .* got 600"),
        ("x", {"temperature": -1}, "temperature: expected"),
        ("x", {"top_p": "a"}, "not supported"),
        ("x", {"temprature": 1}, "did you mean `temperature`"),
    ],
)
def test_wrong_requests_say_why(model: Model, prompt: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        model.generate(prompt, **options)
    with pytest.raises(UsageError):
        model.stream(prompt, **options)


def test_not_a_number_logits_are_an_error_and_the_model_goes_on(model: Model) -> None:
    with pytest.raises(VerifyError, match="got not-a-number after token 0"):
        model.generate([[1, 2], [1, NAN]], max_new_tokens=20)
    assert model.generate([1, 2], max_new_tokens=20).tokens == answer([1, 2], 20)
    assert np.isnan(model.step([NAN])).all()


def test_a_fault_ends_the_model(model: Model) -> None:
    with pytest.raises(StepFault, match="worker 0 stopped at record 5"):
        model.generate([FAULT], max_new_tokens=5)
    with pytest.raises(StepFault):
        model.generate([1], max_new_tokens=5)


def test_an_interrupt_leaves_the_model_usable(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = model._backend.run, 3

    def run(steps: int) -> int:
        nonlocal left
        done = real(steps)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(model._backend, "run", run)
    with pytest.raises(KeyboardInterrupt):
        model.generate([[1], [2]], max_new_tokens=200)
    assert model.generate([5, 6], max_new_tokens=60).tokens == answer([5, 6], 60)
    model.reset()


def test_a_closed_model_says_so(path: Path) -> None:
    model = load(path, threads=1)
    stream = model.stream("x", max_new_tokens=50)
    next(stream)
    model.close()
    model.close()
    for use in (lambda: model.generate("x"), lambda: model.step([1]), model.read_gbps, lambda: list(stream)):
        with pytest.raises(UsageError, match="expected an open one, got a closed one"):
            use()


def test_a_forked_child_is_told_to_load_its_own(model: Model) -> None:
    child = os.fork()
    if child == 0:  # no test machinery in here: leave by _exit alone
        try:
            model.step([1])
        except UsageError as error:
            os._exit(7 if "before a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert model.generate([1], max_new_tokens=3).tokens == answer([1], 3)
