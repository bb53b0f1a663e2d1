"""What the CUDA backend says to the driver while it runs, with the toy model as kernel.

Run by test_cuda_backend.py in a process of its own that finds the fake driver of fake_cuda.cpp as libcuda.so.1. This
tests the protocol and the state traffic; nothing here ran on a GPU, and no device code was executed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from onelaunch.ir.errors import HostError, UsageError, VerifyError
from onelaunch.runtime import StepFault, load
from onelaunch.runtime.cuda_driver import Driver
from onelaunch.tests import gpu_checks, toy
from onelaunch.tests.cuda_fake import Fake, called, fake, root, write
from onelaunch.tests.toy import FAULT, NAN, answer

__all__ = ["fake", "root"]  # fixtures

NOWHERE = [258, 259]  # stop tokens the toy model never says


# Tokens


def test_text_of_many_requests_is_what_the_model_says(fake: Fake, root: Path) -> None:
    prompts = [[i, i + 1, 3 * i] * (i + 1) for i in range(7)]
    settings = {"max_new_tokens": 50, "temperature": 0.8, "seed": 11, "stop_tokens": NOWHERE}
    with load(root) as model:
        results = model.generate(prompts, repetition_penalty=1.1, **settings)
        for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            assert result.tokens == answer(prompt, 50, seed=11, stream=i, penalty=1.1)
        assert model.generate([1] * 500, stop_tokens=NOWHERE).tokens == answer([1] * 500, 13)
    assert (model.target, model.threads) == ("sm_90", 132)


@pytest.mark.parametrize("burst", ["generate", "stream"])
def test_the_same_prompt_twice_starts_from_its_own_seen_tokens(fake: Fake, root: Path, burst: str) -> None:
    """The device marked tokens of the first one; the host's copy of the marks is what the prompt alone makes."""
    options = {"max_new_tokens": 30, "repetition_penalty": 1.2, "stop_tokens": NOWHERE}
    with load(root, kv_tokens=64) as model:
        for _ in range(3):
            if burst == "generate":
                tokens = model.generate([5, 6], **options).tokens
            else:
                stream = model.stream([5, 6], **options)
                for _ in stream:
                    pass
                tokens = stream.result.tokens
            assert tokens == answer([5, 6], 30, penalty=1.2)


def test_streams_that_start_and_stop_beside_each_other_do_not_mix(fake: Fake, root: Path) -> None:
    options = {"max_new_tokens": 40, "repetition_penalty": 1.2, "stop_tokens": NOWHERE}
    with load(root) as model:
        first, second = model.stream([1, 2, 3], **options), model.stream([4] * 30, **options)
        for _ in range(4):
            next(first), next(second)
        second.close()
        third = model.stream([4] * 30, **options)
        next(third)
        for stream, prompt in ((first, [1, 2, 3]), (third, [4] * 30)):
            for _ in stream:
                pass
            assert stream.result.tokens == answer(prompt, 40, penalty=1.2)


def test_stop_tokens_end_a_burst_early(fake: Fake, root: Path) -> None:
    full = answer([9], 30)
    with load(root) as model:
        for stop in full[3:9]:
            result = model.generate([9], max_new_tokens=30, stop_tokens=[stop])
            assert result.tokens == full[: full.index(stop) + 1]
            assert result.finish_reason == "stop"


def test_logits_and_explicit_rows(fake: Fake, root: Path) -> None:
    first, second = [5, 6, 7, 8], [9, 1]
    with load(root) as model:
        logits = model.step(first + second, [0] * 4 + [2] * 2, [0, 1, 2, 3, 0, 1], [1, 3, 5])
        assert logits.argmax(1).tolist() == [answer(p, 1)[0] for p in ([5, 6], first, second)]
        state = model._backend.state
        assert state.slot_tokens[0, :2].tolist() == logits.argmax(1)[:2].tolist()
        model.bench_decode(8, depth=90)
        assert state.slot_tokens[0, :8].tolist() == answer([(i * 31 + 5) % 130 for i in range(91)], 8)
        assert model.generate([1, 2], max_new_tokens=9).tokens == answer([1, 2], 9)


def test_a_burst_may_go_round_the_ring_of_tokens(fake: Fake, root: Path) -> None:
    with load(root) as model:
        model.step([5, 6, 7])
        backend, state = model._backend, model._backend.state
        state.slot_count[0], state.slot_limit[0] = 508, 500
        state.n_rows[0] = state.n_outputs[0] = 1
        state.row_token[0], state.row_position[0], state.row_output[0], state.output_row[0] = 8, 3, 0, 0
        assert backend.run(8) == 8
        ring = state.slot_tokens[0]
        assert [*ring[508:], *ring[:4]] == answer([5, 6, 7, 8], 8)


def test_not_a_number_logits_clear_whole_pages_and_leave_others(fake: Fake, root: Path) -> None:
    with load(root) as model:
        other = model.stream([1, 2], max_new_tokens=60, stop_tokens=NOWHERE)
        next(other)
        fake.log()
        with pytest.raises(VerifyError, match="not-a-number"):
            model.generate([NAN], max_new_tokens=20)
        cleared = [line.split()[1:] for line in fake.log() if line.startswith("cuMemsetD2D8Async")]
        assert [[int(x) for x in sizes] for sizes in cleared] == [[4 * 256, 0, 256, 2 * 2], [4 * 320, 0, 320, 3 * 1]]
        for _ in other:
            pass
        assert other.result.tokens == answer([1, 2], 60)


# Traffic and launches


def test_decoding_uploads_nothing_and_synchronises_once_a_burst(fake: Fake, root: Path) -> None:
    with load(root) as model:
        stream = model.stream([1, 2, 3], max_new_tokens=60, stop_tokens=NOWHERE)
        next(stream)
        fake.log()
        for _ in range(10):
            next(stream)
        log = fake.log()
        replays = called(log).count("cuGraphLaunch")
        assert replays >= 10
        # Two small ranges and the fault record come back; nothing else happens.
        step = ["cuCtxPushCurrent", "cuGraphLaunch", *["cuMemcpyDtoHAsync"] * 3, "cuStreamSynchronize"]
        assert [name for name in called(log) if name != "kernel"] == [*step, "cuCtxPopCurrent"] * replays
        stream.close()
        model.generate([4], max_new_tokens=2)
        fake.log()
        model.generate([4], max_new_tokens=20, stop_tokens=NOWHERE)
        names = called(fake.log())
        assert names.count("cuGraphLaunch") == 20  # none after the last token
        assert names.count("cuStreamSynchronize") == 3 + 1  # bursts of 1, 16 and 3; the seen marks of the slot


def test_only_what_the_host_changed_goes_up(fake: Fake, root: Path) -> None:
    with load(root) as model:
        model.step([1])
        fake.log()
        model.step([2], positions=[1])
        sizes = [int(line.split()[1]) for line in fake.log() if line.startswith("cuMemcpyHtoDAsync")]
        assert 0 < sum(sizes) < 600  # of a state of 10 KB
        assert "slot_tokens" in vars(model._backend.state)
        with pytest.raises(ValueError, match="read-only"):
            model._backend.state.slot_tokens[0, 0] = 1


def test_each_bucket_is_captured_once_and_replayed(fake: Fake, root: Path) -> None:
    with load(root) as model:
        model.generate([list(range(i, i + 9)) for i in range(3)], max_new_tokens=20, stop_tokens=NOWHERE)
        log = fake.log()
        launches = [line for line in log if line.startswith("cuLaunchKernelEx")]
        assert launches == ["cuLaunchKernelEx grid 132 1 1 block 256 1 1 shared 100000"] * 2
        assert called(log).count("cuStreamBeginCapture") == called(log).count("cuGraphInstantiate") == 2
        assert "cuFuncSetAttribute 8 100000" in log
        kernels = [dict(zip(w[1::2], map(int, w[2::2]), strict=True)) for w in map(str.split, log) if w[0] == "kernel"]
        assert {k["records"] for k in kernels} == {4}
        assert all(k["table"] == (1132 if k["rows"] <= toy.LIMITS.few_rows else 2132) for k in kernels)
        assert {k["table"] for k in kernels} == {1132, 2132}


def test_a_step_in_segments_is_one_graph_of_a_launch_per_depth(fake: Fake, root: Path) -> None:
    with load(root, segments="per-phase") as model:
        assert (model.segments, model.generate([1, 2], max_new_tokens=20).tokens) == ("per-phase", answer([1, 2], 20))
        log = fake.log()
        grids = [int(line.split()[2]) for line in log if line.startswith("cuLaunchKernelEx")]
        assert grids == [132, 132, 1] * 2  # the commit needs one worker; a bucket each
        assert [line for line in log if line.startswith("launched")] == ["launched step alone"] * 6
        assert called(log).count("cuStreamBeginCapture") == called(log).count("cuGraphInstantiate") == 2
        kernels = [dict(zip(w[1::2], map(int, w[2::2]), strict=True)) for w in map(str.split, log) if w[0] == "kernel"]
        assert [(k["grid"], k["records"], k["table"]) for k in kernels[:3]] == [(132, 2, 0), (132, 2, 0), (1, 2, 1132)]
        assert called(log).count("kernel") == 3 * called(log).count("cuGraphLaunch")
        assert all(a["epoch"] == c["epoch"] for a, c in zip(kernels[::3], kernels[2::3], strict=True))
    with load(root) as model:
        assert "launched step cooperatively" in fake.log()


def test_each_bucket_may_have_a_kernel_of_its_own(fake: Fake, tmp_path: Path) -> None:
    folder = "kernels/sm_90"
    few = {"entry": "step_few", "cubin": f"{folder}/few.cubin", "num_warps": 4, "shared": 60_000}
    many = {"entry": "step_many", "cubin": f"{folder}/many.cubin"}
    with load(write(tmp_path / "two", entries={"few": few, "many": many})) as model:
        assert model.generate([1, 2, 3, 4, 5, 6], max_new_tokens=5).tokens == answer([1, 2, 3, 4, 5, 6], 5)
        log = fake.log()
    assert [line.split()[1] for line in log if line.startswith("launched")] == ["step_few", "step_many"]
    shapes = [line.split()[5:] for line in log if line.startswith("cuLaunchKernelEx")]
    assert shapes == [["block", "128", "1", "1", "shared", "60000"], ["block", "256", "1", "1", "shared", "100000"]]
    assert [line for line in log if line.startswith("cuFuncSetAttribute")] == [
        "cuFuncSetAttribute 8 60000", "cuFuncSetAttribute 8 100000",
    ]  # fmt: skip
    occupancy = [line.split()[1:] for line in log if line.startswith("cuOccupancy")]
    assert occupancy == [["128", "60000"], ["256", "100000"]]


@pytest.mark.parametrize("segments", ["mega", "per-phase"])
def test_launches_are_timed_by_events_inside_the_graph(fake: Fake, root: Path, segments: str) -> None:
    with load(root, segments=segments) as model:
        backend, live = model._backend, fake.live()
        backend.time_launches(0)
        fake.log()
        model.bench_decode(1, 40)
        records = [132, 132, 1] if segments == "per-phase" else [265]
        assert backend.launch_times() == pytest.approx([1e-3 * n for n in records])  # the fake's clock: 1 ms a record
        assert called(fake.log()).count("cuEventRecordWithFlags") == 0  # they are nodes of the graph
        assert fake.live() == live + len(records) + 1
        assert model.generate([1, 2], max_new_tokens=9).tokens == answer([1, 2], 9)
        fake.set(fail_cuEventRecordWithFlags=999)
        with pytest.raises(HostError, match=r"cuEventRecordWithFlags failed with .*UNKNOWN"):
            backend.time_launches(0)
        assert model.generate([1, 2], max_new_tokens=9).tokens == answer([1, 2], 9)


def test_the_first_step_finds_the_weights_and_zeroed_memory(fake: Fake, root: Path) -> None:
    with load(root):
        # Memory comes full of rubbish: weights are exact but for their guard, all else is zero.
        first = next(line.split() for line in fake.log() if line.startswith("first"))
    assert int(first[2]) == 4 * sum(range(250)) + 4096 * 0xA5
    assert int(first[4]) == 0


# Life and death


def test_close_gives_everything_back_once(fake: Fake, root: Path) -> None:
    model = load(root)
    stream = model.stream([1], max_new_tokens=50)
    next(stream)
    state = model._backend.state
    model.close()
    assert fake.live() == 0
    model.close()
    for use in (lambda: model.generate([1]), lambda: model.step([1]), model.read_gbps, lambda: list(stream)):
        with pytest.raises(UsageError, match="expected an open one, got a closed one"):
            use()
    assert state.slot_count.shape == (3,)  # a view that outlived the model is not a crash


def test_a_forgotten_model_gives_everything_back(fake: Fake, root: Path) -> None:
    model = load(root)
    del model
    gc.collect()
    assert fake.live() == 0


@pytest.mark.parametrize("prompt", [[FAULT], [1, 2, 3, 4, 5, FAULT]], ids=["few rows", "many rows"])
def test_a_fault_is_named_and_ends_the_model(fake: Fake, root: Path, prompt: list[int]) -> None:
    with load(root) as model:
        with pytest.raises(StepFault, match="worker 0 stopped at record 5: expected 4 signals of event 3, got 2"):
            model.generate(prompt, max_new_tokens=5)
        with pytest.raises(StepFault):
            model.generate([1], max_new_tokens=5)
        fake.log()
        for again in (model._backend.step, lambda: model._backend.run(3)):
            with pytest.raises(StepFault, match="expected 4 signals of event 3, got 2"):
                again()
        assert "cuGraphLaunch" not in called(fake.log())


@pytest.mark.parametrize("check", gpu_checks.CHECKS, ids=lambda check: check.__name__)
def test_what_is_checked_on_a_gpu_holds_for_the_toy_model(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[..., None]
) -> None:
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onelaunch.runtime.cuda.PROBE_TOTAL", 4_000_000)
    gpu_checks.run(check, write(tmp_path / "both", cpu=True), tmp_path)


class BenchMachine:
    """The device of gpu.py, without torch."""

    facts: ClassVar[dict[str, Any]] = {"ordinal": 0, "name": "Fake GPU", "arch": "sm_90", "driver": "580"}

    def __init__(self) -> None:
        self.copies = iter([90.0, 110.0])

    def copy_gbps(self) -> float:
        return next(self.copies)

    def clocks(self) -> dict[str, str]:
        return {"clocks.sm": "1980 MHz"}


def test_the_gpu_benchmark_reports_verdict_speeds_and_shares(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "names_of_launches", lambda artifact, workers, table: ["a.x", "a.y", "a.x"])
    out = tmp_path / "report.json"
    words = [str(write(tmp_path / "both", cpu=True)), "--json", str(out), "--tokens", "20", "--rounds", "3"]
    code = gpu.main(words, BenchMachine)
    assert code == 0, capsys.readouterr().err
    report = json.loads(out.read_text())
    found = report["verdict"]
    assert found["passed"]
    assert found["steps"] == found["tokens_equal"] == found["generated_as_cpu"] == 20
    assert [(p["phase"], p["launches"]) for p in report["phases"]] == [("a.x", 2), ("a.y", 1)]
    assert [p["us"] for p in report["phases"]] == pytest.approx([133e3, 132e3])  # the fake's clock: 1 ms a record
    modes = report["modes"]
    assert {name: mode["launches"] for name, mode in modes.items()} == {"mega": 1, "per-phase": 3}
    assert {name: len(mode["rounds_us"]) for name, mode in modes.items()} == {"mega": 3, "per-phase": 3}
    assert modes["mega"]["device_us"] == modes["per-phase"]["device_us"] == pytest.approx(265e3)
    assert modes["mega"]["of_copy"] == pytest.approx(modes["mega"]["gbps"] / 100)
    assert capsys.readouterr().out.startswith("passed: 20 of 20 tokens")
    assert gpu.main([str(write(tmp_path / "gpu"))], BenchMachine) == 3  # no CPU target to hold it against


def test_a_signal_that_is_missing_is_the_fault_that_names_it(fake: Fake, tmp_path: Path) -> None:
    broken = gpu_checks.without_a_signal(write(tmp_path / "toy"), tmp_path / "broken", 132)
    with pytest.raises(StepFault, match="worker 0 stopped at record 2: expected 132 signals of event 1, got 131"):
        load(broken)
    load(broken, threads=66).close()


def test_a_device_error_is_a_host_error_and_closing_still_works(fake: Fake, root: Path) -> None:
    with load(root) as model:
        fake.set(fail_cuStreamSynchronize=700)
        with pytest.raises(HostError, match=r"cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS") as error:
            model.step([1])
        assert error.value.exit_code == 5
        fake.set(fail_cuStreamSynchronize=0)


@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuStreamSynchronize", "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_loses_nothing(
    fake: Fake, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, moment: str
) -> None:
    real, left = Driver.call, -1

    def interrupted(self: Driver, name: str, *arguments: Any) -> Any:
        nonlocal left
        left -= name == call
        if left == 0 and moment == "before":
            left -= 1
            raise KeyboardInterrupt
        result = real(self, name, *arguments)
        if left == 0:
            left -= 1
            raise KeyboardInterrupt
        return result

    with load(root) as model:
        backend = model._backend
        for caller in (backend, backend.state, backend._graphs):
            monkeypatch.setattr(caller, "_call", lambda *a: interrupted(backend._context.driver, *a))
        other = model.stream([3, 2], max_new_tokens=70, repetition_penalty=1.1, stop_tokens=NOWHERE)
        next(other)
        for left, stop in ((1, []), (2, []), (1, ["never said"]), (2, ["never said"])):  # noqa: B007
            with pytest.raises(KeyboardInterrupt):
                model.generate([[8], [9]], max_new_tokens=40, stop_tokens=NOWHERE, stop=stop)
        for _ in other:
            pass
        assert other.result.tokens == answer([3, 2], 70, penalty=1.1)
        assert model.generate([5, 6], max_new_tokens=60).tokens == answer([5, 6], 60)


def test_a_forked_child_is_told_to_load_its_own(fake: Fake, root: Path) -> None:
    with load(root) as model:
        child = os.fork()
        if child == 0:  # no test machinery in here: leave by _exit alone
            try:
                model.step([1])
            except UsageError as error:
                fake.log()
                model.close()
                os._exit(7 if "before a fork" in str(error) and fake.log() == [] else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert model.generate([1], max_new_tokens=3).tokens == answer([1], 3)
