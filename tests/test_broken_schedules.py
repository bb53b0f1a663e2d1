"""Over 2,000 broken schedules: each is rejected with a reason, or computes the same in every interleaving tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from random import Random
from unittest import mock

import pytest
import torch
from drafted import drafted, likeness
from mutations import MUTATIONS
from tiny import LIMITS, Tiny, tiny

from onelaunch.ir.errors import VerifyError
from onelaunch.ir.reference import Slot
from onelaunch.ir.sampling import Sampling
from onelaunch.ir.schedule import BUCKETS, Buffer, Schedule, Task
from onelaunch.ir.schedule_text import show_schedule
from onelaunch.ir.validate import validate
from onelaunch.ir.vm import Outcome, VirtualMachine, commit

DRAFTING, MODEL = "llama with drafts", "llama with a draft model"
BASES = (
    *product(("llama", "gemma3", "qwen2_moe"), BUCKETS, (1, 2, 3)),
    (DRAFTING, "few", 2),
    *((f"{family} with a draft model", bucket, 2) for family in ("llama", "gemma3") for bucket in BUCKETS),
)
PROMPTS = ([3, 5], [9])
PER_BASE = 8  # mutants of each kind
ALWAYS_WRONG = ("dropped_signal", "wrong_target", "dropped_task", "doubled_task", "wrong_range", "wrong_drain")
INTERLEAVINGS = (("random", 1), ("burst", 3), ("highest", 0))


@cache
def model(family: str) -> Tiny:
    made = tiny(family.split()[0], layer_kinds=("local", "global"))
    return drafted(made, likeness(made), 2) if family.endswith("model") else made


@cache
def base(family: str, bucket: str, workers: int) -> Schedule:
    drafter = {"drafts": 2, "drafter": "model" if family.endswith("model") else "ngram"}
    limits = replace(LIMITS, outputs=6, **drafter) if " with " in family else LIMITS
    return model(family).schedule(bucket, workers, limits)


def run_steps(made: Schedule, tiny_model: Tiny, order: str, seed: int) -> list[Outcome]:
    """A prompt step and two decoding steps, poisoned; with drafts, a guess behind the last token of each slot."""
    machine = VirtualMachine({made.bucket: made}, tiny_model.weights)
    for slot in (0, 1):
        how = Slot(Sampling(temperature=0.7 * slot, seed=5), limit=64, seen=frozenset((3, 5, 9)))
        machine.start(slot, how, PROMPTS[slot], made.limits.drafts)
    machine.set_rows([(3, 0, 0), (5, 0, 1), (9, 1, 0)], [1, 2])
    with mock.patch.object(commit, "look_up", lambda history, count: [3] * count):
        return [machine.step(order, seed + i) for i in range(3)]


@pytest.mark.parametrize(("family", "outputs"), [(DRAFTING, [2, 4, 4]), (MODEL, [2, 3, 4])])
def test_steps_of_the_base_with_drafts_have_some(family, outputs):
    assert [len(step.tokens) for step in expected(family, "few", 2)] == outputs


@cache
def expected(family: str, bucket: str, workers: int) -> list[Outcome]:
    return run_steps(base(family, bucket, workers), model(family), "lowest", 0)


def computes_the_same(made: Schedule, key: tuple[str, str, int]) -> bool:
    """Whether a schedule gives the tokens and logits of the unbroken one, in several interleavings."""
    for order, seed in INTERLEAVINGS[: 1 if key[2] == 1 else None]:  # one worker has one order
        for one, two in zip(run_steps(made, model(key[0]), order, seed), expected(*key), strict=True):
            if one.tokens != two.tokens or not torch.allclose(one.logits, two.logits, atol=1e-4):
                return False
    return True


def mutants(name: str) -> Iterator[tuple[tuple[str, str, int], Schedule]]:
    """Distinct schedules one mutation makes of every base."""
    for key in BASES:
        made = base(*key)
        seen = {(made.sections, made.buffers)}
        for seed in range(40):
            changed = MUTATIONS[name](made, Random(f"{key}{seed}"))
            if changed is not None and (changed.sections, changed.buffers) not in seen:
                seen.add((changed.sections, changed.buffers))
                yield key, changed
            if len(seen) > PER_BASE:
                break


TALLY: dict[str, Counter[str]] = {}


def rejected(made: Schedule) -> bool:
    try:
        validate(made)
    except VerifyError as error:
        return bool(error.reasons)
    return False


def judge(name: str) -> Counter[str]:
    """Rejected and harmless mutants of one kind, each kind judged once; fails on one that is neither."""
    if name not in TALLY:
        counts: Counter[str] = Counter()
        for key, changed in mutants(name):
            if rejected(changed):
                counts["rejected"] += 1
            else:
                assert computes_the_same(changed, key), f"{name} of {key} was accepted:\n{difference(key, changed)}"
                counts["harmless"] += 1
        TALLY[name] = counts
    return TALLY[name]


def difference(key: tuple[str, str, int], changed: Schedule) -> str:
    lines = zip(show_schedule(base(*key)).splitlines(), show_schedule(changed).splitlines(), strict=False)
    return "\n".join(f"- {a}\n+ {b}" for a, b in lines if a != b)[:2000]


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_broken_schedule_is_rejected_or_shown_harmless(name):
    counts = judge(name)
    assert counts["rejected"] > 0
    if name in ALWAYS_WRONG:
        assert not counts["harmless"]


def test_the_corpus_is_large():
    total: Counter[str] = Counter()
    for name in MUTATIONS:
        total += judge(name)
    print(f"\n{total.total()} mutants: {total['rejected']} rejected, {total['harmless']} harmless")
    assert total.total() >= 2000
    assert total["rejected"] > 0.8 * total.total()


def test_the_machine_sees_what_the_validator_rejects():
    """Races that the waits leave open do show under some interleaving: the harmless ones were not just lucky."""
    seen, tried = 0, 0
    for name in ("dropped_wait", "overlapping_buffers", "dropped_signal_and_target"):
        for key, changed in mutants(name):
            if tried % 5 == 0:
                seen += _is_wrong(changed, key)
            tried += 1
    assert seen > 0.2 * (tried / 5)


def _is_wrong(changed: Schedule, key: tuple[str, str, int]) -> bool:
    try:
        return rejected(changed) and not computes_the_same(changed, key)
    except (VerifyError, RuntimeError, ValueError):
        return True


def test_mutants_are_well_formed():
    """A mutation changes only tasks, events and places: the program is the one that was asked for."""
    for name in MUTATIONS:
        for key, changed in list(mutants(name))[:2]:
            assert changed.program is base(*key).program
            assert all(isinstance(b, Buffer) for b in changed.buffers)
            assert all(isinstance(t, Task) for s in changed.sections for q in s.queues for t in q)
