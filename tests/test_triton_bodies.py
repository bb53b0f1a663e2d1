"""Every body of the generated GPU kernel, interpreted, against the IR's own reference (first rung of the ladder).

The kernel runs record by record beside the Python VM (interpreter_lockstep.py): norms and panels, matrices of every
layout and weight format with one row and several, head epilogues, attention over splits and windows, embedding,
samplers, commit. Nothing here says anything about speed, barriers or compiled code.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from interpreter_lockstep import Lockstep
from interpreter_step import random_model, start_slot

from onelaunch.codegen.triton.formats import READERS
from onelaunch.ir.limits import Limits
from onelaunch.ir.reference import INVALID, LENGTH, STOPPED, Slot
from onelaunch.ir.sampling import Sampling
from onelaunch.models.importer import import_checkpoint

pytestmark = pytest.mark.xdist_group("interpreted bodies")
LIMITS = Limits(rows=8, slots=2, context=384, outputs=4, few_rows=4, kv_dtype="f32")
# (token, slot, position): two splits of 256 tokens and one, both sides of a page; first rows too.
FEW, MANY = [(5, 1, 300), (7, 0, 13), (9, 1, 301)], [(i, i % 2, 62 * i + i % 2) for i in range(6)]
STEPS = {"one row": FEW[:1], "few rows": FEW, "many rows": MANY}
FAMILIES = {"llama": "q8_0", "qwen2": "q4_0", "qwen3": "bf16", "gemma3": "f32"}
# Largest difference over the largest value of the row. Panels of integer formats are int8 per 32 values (half a step
# is 1 / 254 of the largest), their products exact; bf16 rounds panels and caches at 2^-9, and the weights of
# attention, whose outputs may be smaller than what they are sums of.
EXACT, INT8, BRAIN, ATTEND = 5e-6, 4e-3, 4e-3, 8e-3


def allowed(kind: str, kv_dtype: str) -> float:
    match kind:
        case "pack.q8":
            return INT8
        case "pack.bf16":
            return BRAIN
        case "append" if kv_dtype == "bf16":
            return BRAIN
        case "attend" if kv_dtype == "bf16":
            return ATTEND
    return EXACT


def check(pair: Lockstep, rows: list[tuple[int, int, int]]) -> set[str]:
    """Run the step of these rows up to its logits; the kinds of bodies that were compared."""
    pair.set_rows(rows, [len(rows) - 1])
    kinds = set()
    for number, anchor, _ in pair.records():
        if anchor in ("sample", "commit"):
            continue
        pair.run_both(number)
        for found in pair.compare(number):
            assert found.error <= allowed(found.kind, pair.limits.kv_dtype), found
            kinds.add(found.kind)
    if pair.machine.program.routing[0]:
        noted, wanted = (state.routing[:, : len(rows)].tolist() for state in (pair.step.state, pair.machine.state))
        assert noted == wanted
    return kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_bodies_of_every_family_are_the_reference(family):
    fmt = FAMILIES[family]
    pair = Lockstep(random_model(family, fmt), LIMITS)
    panel = {"q8_0": "q8", "q4_0": "q8"}.get(fmt, fmt)
    for rows in STEPS.values():
        assert check(pair, rows) == {"rows", f"pack.{panel}", "heads", "append", "attend", "plain", "pairs"}


EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("q4_0", {"layers": 1}),
    "qwen3_moe": ("f32", {"layers": 1}),
    "mixtral": ("bf16", {"layers": 1}),
    "gpt_oss": ("mxfp4", {"hidden": 64, "head_dim": 32, "moe_ffn": 64, "layers": 1, "layer_kinds": ("local",)}),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_of_every_family_are_the_reference(family):
    """Rows that share experts and rows that do not; of more experts than the others have, and of all there are."""
    fmt, sizes = EXPERTS[family]
    pair = Lockstep(random_model(family, fmt, **sizes), LIMITS)
    for rows in STEPS.values():
        assert {"rows", "experts", "attend"} < check(pair, rows)


@pytest.mark.parametrize("fmt", READERS)
def test_matrices_of_every_format_are_the_reference(fmt):
    pair = Lockstep(random_model("llama", fmt, 1, layers=1), replace(LIMITS, kv_dtype="bf16"))
    for name in ("one row", "many rows"):
        check(pair, STEPS[name])


def test_columns_in_an_order_of_their_own_are_the_reference():
    """Of matrices that read a norm, attention's splits, and an activation of another phase."""
    made = random_model("llama", "q4_0", layers=1).checkpoint
    widths = {n: t.shape[1] for n, t in made.tensors.items() if "proj" in n}
    ordered = {n: np.random.default_rng(k).permutation(k) for n, k in widths.items()}
    pair = Lockstep(import_checkpoint(replace(made, orders=ordered)), LIMITS)
    assert any(op.name == "reorder" for op in pair.machine.program.kinds[0].ops)
    for name in ("one row", "few rows"):
        check(pair, STEPS[name])


@pytest.mark.parametrize(("family", "kv_dtype"), product(("llama", "gemma3"), ("f32", "bf16")))
def test_attention_with_a_softcap(family, kv_dtype):
    """gemma3 has a window as well; widths are no multiples of 16, groups no powers of two."""
    sizes = {"layers": 2, "hidden": 96, "heads": 6, "kv_heads": 2, "head_dim": 24, "vocab": 40}
    pair = Lockstep(random_model(family, "f32", 2, softcap=3.0, **sizes), replace(LIMITS, kv_dtype=kv_dtype))
    for rows in STEPS.values():
        check(pair, rows)


# ---- sampling and commit ------------------------------------------------------------------------

VOCAB = 4200  # two chunks of the sampler's loops
SAMPLERS = (
    Sampling(),
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.3, top_k=12, seed=2**63 + 5, stream=7),
    Sampling(temperature=1.0, top_p=0.6, seed=11),
    Sampling(temperature=2.0, min_p=0.2, seed=2**40),
    Sampling(temperature=0.9, top_k=300, top_p=0.8, min_p=0.01, repetition_penalty=1.4, seed=9),
    Sampling(repetition_penalty=5.0),
    Sampling(temperature=0.001, top_p=1e-6, seed=1),
)
SEEN = frozenset((1, 5, 40, 4111))


@pytest.fixture(scope="module")
def sampler():
    limits = Limits(rows=8, slots=8, context=128, outputs=8, few_rows=4, kv_dtype="f32")
    return Lockstep(random_model("llama", "f32", layers=1, vocab=VOCAB), limits)


def end_of_step(pair: Lockstep, logits: np.ndarray, slots: list[Slot]) -> np.ndarray:
    """Sample from logits [slots, vocab] and commit, on both: the tokens. The states must be equal to the last bit."""
    n = len(slots)
    for state in (pair.step.state, pair.machine.state):
        for number, how in enumerate(slots):
            start_slot(state, number, how, pair.limits)
    pair.set_rows([(i, i, 10 * i) for i in range(n)], list(range(n)))
    pair.put_logits(logits)
    for number, anchor, _ in pair.records():
        if anchor in ("sample", "commit"):
            pair.run_both(number)
            assert pair.step.state.output_token.tolist() == pair.machine.state.output_token.tolist()
    for name in pair.machine.state._views:
        assert (getattr(pair.step.state, name) == getattr(pair.machine.state, name)).all(), name
    return pair.step.state.output_token[:n].copy()


@pytest.mark.parametrize("seed", range(2))
def test_every_sampler_draws_the_references_token(sampler, seed):
    logits = np.random.default_rng(seed).standard_normal((len(SAMPLERS), VOCAB), np.float32) * (1 + 3 * seed)
    logits[:, 5] += 6  # a seen token leads where nothing penalises it
    logits[6, 4111] = logits[6].max()
    tokens = end_of_step(sampler, logits, [Slot(how, seen=SEEN) for how in SAMPLERS])
    assert tokens[0] == logits[0].argmax()
    assert len(set(tokens.tolist())) > len(SAMPLERS) / 2
    assert sampler.step.state.n_rows[0] == len(SAMPLERS)


def test_filters_cut_exactly_between_equal_tokens(sampler):
    """Four tokens of equal weight: half of it is the first two, and top_k 3 the first three."""
    logits = np.full((8, VOCAB), -100, np.float32)
    logits[:, [7, 100, 4100, 4150]] = 1
    half = [Slot(Sampling(temperature=1.0, top_p=0.5, seed=seed)) for seed in range(5)]
    three = [Slot(Sampling(temperature=1.0, top_k=3, seed=seed)) for seed in range(3)]
    tokens = end_of_step(sampler, logits, half + three).tolist()
    assert set(tokens[:5]) == {7, 100}
    assert set(tokens[5:]) <= {7, 100, 4100}


def test_ties_go_to_the_lower_index_and_damaged_logits_end_the_slot(sampler):
    logits = np.zeros((8, VOCAB), np.float32)
    logits[0, [4100, 70, 4150]] = 2
    logits[1, 33], logits[2, 4190], logits[3, 12] = np.nan, np.inf, -np.inf
    logits[4] = -np.inf
    logits[5, [60, 61]] = 1
    slots = [Slot()] * 5 + [Slot(stop=frozenset((60, 90))), Slot(limit=61), Slot(limit=62)]
    tokens = end_of_step(sampler, logits, slots)
    assert tokens.tolist() == [70, -1, -1, 0, -1, 60, 0, 0]
    finished = sampler.step.state.slot_finished.tolist()
    assert finished == [0, INVALID, INVALID, 0, INVALID, STOPPED, LENGTH, LENGTH]
