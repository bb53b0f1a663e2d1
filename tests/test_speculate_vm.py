"""Steps that draft, on the Python VM: tokens are those of the reference model, which knows no drafts."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from tiny import LIMITS, Tiny, tiny

from onelaunch.ir.limits import Limits
from onelaunch.ir.reference import ReferenceModel, Slot
from onelaunch.ir.sampling import Sampling
from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.vm import VirtualMachine, commit

GREEDY = Sampling()
DRAWN = Sampling(temperature=0.9, top_k=20, repetition_penalty=1.3, seed=11)
DRAFTING = replace(LIMITS, rows=16, outputs=8, few_rows=6, drafts=3)
PROMPTS = ([7, 3, 11, 60, 2, 19, 44, 7, 3, 11], [5, 90, 31])


def alone(model: Tiny, prompt: list[int], tokens: int, how: Sampling, stop: tuple[int, ...] = ()) -> list[int]:
    return ReferenceModel(model.program, model.weights, 1, 128).generate(prompt, tokens, how, stop)


def run(machine: VirtualMachine, requests: list[tuple[list[int], int, Sampling, tuple[int, ...]]]) -> list[list[int]]:
    """All requests, one per slot, from their prompts to their ends."""
    rows, outputs = [], []
    for slot, (prompt, tokens, how, stop) in enumerate(requests):
        limit = len(prompt) + tokens - 1
        machine.start(slot, Slot(how, limit, frozenset(stop), frozenset(prompt)), prompt, DRAFTING.drafts)
        rows += [(token, slot, i) for i, token in enumerate(prompt)]
        outputs.append(len(rows) - 1)
    machine.set_rows(rows, outputs)
    machine.step()
    steps = 0
    while machine.rows():
        machine.step("random", steps)
        steps += 1
    return [machine.state.slot_tokens[s, : machine.state.slot_count[s]].tolist() for s in range(len(requests))]


def machine_of(model: Tiny, workers: int = 2, limits: Limits = DRAFTING, buckets=BUCKETS) -> VirtualMachine:
    return VirtualMachine({b: model.schedule(b, workers, limits) for b in buckets}, model.weights)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2_moe"])
def test_text_is_that_of_plain_decoding(family):
    """Random models soon repeat themselves, so what is looked up does hold."""
    model = tiny(family)
    machine = machine_of(model, workers=3)
    texts = run(machine, [(PROMPTS[0], 40, GREEDY, ())])
    assert texts == [alone(model, PROMPTS[0], 40, GREEDY)]


class Oracle:
    """In place of `look_up`: guesses that hold for a while, then do not."""

    def __init__(self, texts: list[list[int]], seed: int) -> None:
        self.texts, self.random, self.longest = texts, random.Random(seed), 0

    def __call__(self, history: np.ndarray, count: int) -> list[int]:
        said = next(t for t in self.texts if t[: len(history)] == list(history))
        right = said[len(history) : len(history) + max(0, count)]
        right += [1] * (count - len(right))
        good = self.random.randint(0, max(0, count))
        self.longest = max(self.longest, good)
        return [t if i < good else (t + 1 + self.random.randrange(50)) % 96 for i, t in enumerate(right)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_guessed_the_text_is_the_same(family, seed):
    """Greedy and drawn with a penalty, stop tokens and limits inside guesses, windows that rings have left."""
    model = tiny(family, seed=seed, window=24)
    settings = [(PROMPTS[0], 60, GREEDY), (PROMPTS[1], 30, replace(DRAWN, seed=seed))]
    free = [alone(model, *request) for request in settings]
    stop = (free[1][11],) if seed else ()
    requests = [(*settings[0], ()), (*settings[1], stop)]
    oracle = Oracle([p + t for (p, _, _), t in zip(settings, free, strict=True)], seed)
    with mock.patch.object(commit, "look_up", oracle):
        texts = run(machine_of(model, workers=2), requests)
    assert texts == [alone(model, *request) for request in requests]
    assert oracle.longest == DRAFTING.drafts


def test_no_draft_of_the_rejected_is_ever_seen():
    model = tiny("llama")
    machine = machine_of(model)
    with mock.patch.object(commit, "look_up", lambda history, count: [77] * count):
        (text,) = run(machine, [(PROMPTS[1], 12, DRAWN, ())])
    bits = np.unpackbits(machine.state.slot_seen[0].view(np.uint8), bitorder="little")
    assert 77 not in text
    assert np.flatnonzero(bits).tolist() == sorted({*PROMPTS[1], *text})
