"""Steps in which a second model drafts, on the Python VM: tokens are those of the first model alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from drafted import DRAFTING, drafted, likeness, opposite
from test_speculate_vm import DRAWN, GREEDY, PROMPTS, alone
from tiny import Tiny, tiny

from onelaunch.ir.errors import CompileError, VerifyError
from onelaunch.ir.graph import Program
from onelaunch.ir.limits import Limits
from onelaunch.ir.reference import Slot
from onelaunch.ir.sampling import Sampling
from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.schedule_text import parse_schedule, show_schedule
from onelaunch.ir.text import parse, show
from onelaunch.ir.validate import validate, validate_buckets
from onelaunch.ir.vm import VirtualMachine
from onelaunch.models.drafter import as_drafter

Asked = tuple[list[int], int, Sampling]
PAIRS = {
    "itself": lambda: (tiny("gemma3"), tiny("gemma3")),  # every phase on rows repeated by every worker
    "another family": lambda: (tiny("qwen2_moe"), tiny("llama")),
    "a likeness": lambda: (tiny("gemma3"), likeness(tiny("gemma3"))),
    "an opposite": lambda: (tiny("llama"), opposite(tiny("llama"))),
}


def machine_of(model: Tiny, workers: int = 2, limits: Limits = DRAFTING) -> VirtualMachine:
    schedules = {b: model.schedule(b, workers, limits) for b in BUCKETS}
    validate_buckets(schedules)
    return VirtualMachine(schedules, model.weights)


def run(machine: VirtualMachine, requests: list[Asked], chunk: int, seed: int = 0) -> list[list[int]]:
    """All requests, one per slot: prompts in chunks of so many rows beside what decodes, then to their ends."""
    done, steps = [0] * len(requests), 0
    for slot, (prompt, tokens, how) in enumerate(requests):
        limit = len(prompt) + tokens - 1
        machine.start(slot, Slot(how, limit, frozenset(), frozenset(prompt)), prompt, machine.limits.drafts)
    while True:
        rows, drafts = machine.rows() if steps else [], machine.state.row_draft[: machine.state.n_rows[0]].copy()
        outputs = list(range(len(rows)))
        for slot, (prompt, _, _) in enumerate(requests):
            part = prompt[done[slot] : done[slot] + chunk]
            rows += [(token, slot, done[slot] + i) for i, token in enumerate(part)]
            done[slot] += len(part)
            outputs += [len(rows) - 1] if part and done[slot] == len(prompt) else []
        if not rows:
            return [machine.state.slot_tokens[s, : machine.state.slot_count[s]].tolist() for s in range(len(requests))]
        machine.set_rows(rows, outputs)
        machine.state.row_draft[: len(drafts) if steps else 0] = drafts[: len(drafts) if steps else 0]
        machine.step("random", seed + steps)
        steps += 1


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("chunk", [6, 4, 16])
def test_text_is_that_of_plain_decoding(pair: str, chunk: int) -> None:
    """Chunks that fill a bucket leave no room for the token that follows: the slot catches up."""
    target, draft = PAIRS[pair]()
    machine = machine_of(drafted(target, draft), workers=3)
    requests = [(PROMPTS[0], 24, GREEDY), (PROMPTS[1], 14, replace(DRAWN, seed=3))]
    assert run(machine, requests, chunk) == [alone(target, *request) for request in requests]
    drafts, held = (int(x[0].sum()) for x in (machine.state.slot_drafted, machine.state.slot_accepted))
    if pair == "itself":
        assert held == drafts > 10
    if pair == "an opposite":
        assert held == 0 < drafts


def test_a_draft_model_follows_every_token() -> None:
    """The cache is poisoned: a position that it has not seen would make its logits not-a-number, and end drafts."""
    target = tiny("llama")
    machine = machine_of(drafted(target, likeness(target, 5)))
    run(machine, [(PROMPTS[0], 60, GREEDY), (PROMPTS[1], 30, GREEDY)], 16)
    s = machine.state
    assert s.slot_followed.tolist() == [len(PROMPTS[0]) + 59, len(PROMPTS[1]) + 29]
    assert 0 < s.slot_accepted[0].sum() < s.slot_drafted[0].sum()
    assert s.slot_drafted[:, 0].sum() >= s.slot_steps.sum() - 4  # only a first and a last step may have none


@pytest.mark.parametrize("length", [6, 16])
def test_a_slot_whose_prompt_fills_a_step_catches_up(length: int) -> None:
    """Its first token finds no room: no guess from the token before, and every later one right."""
    target = tiny("gemma3")
    machine, prompt = machine_of(drafted(target, target)), [(7 * i + 3) % 96 for i in range(length)]
    assert run(machine, [(prompt, 20, GREEDY)], length) == [alone(target, prompt, 20, GREEDY)]
    assert machine.state.slot_accepted[0].sum() == machine.state.slot_drafted[0].sum() > 8


def test_what_a_draft_model_writes_over_the_logits_is_found() -> None:
    """The host reads those of the step's outputs when all is done."""
    made = drafted(tiny("llama"), tiny("llama")).schedule("few", 2, DRAFTING)
    logits = made.buffer("exit", "logits")
    moved = tuple(replace(b, offset=logits.offset) if b.name == "draft_local/draft_q1" else b for b in made.buffers)
    assert moved != made.buffers
    with pytest.raises(VerifyError, match="`/logits` is needed after it, but `draft_q1` overwrote it"):
        validate(replace(made, buffers=moved))


def test_a_slot_without_drafts_is_not_followed() -> None:
    target = tiny("llama")
    machine = machine_of(drafted(target, target))
    machine.start(0, Slot(GREEDY, 30, frozenset(), frozenset(PROMPTS[1])), PROMPTS[1], 0)
    machine.set_rows([(token, 0, i) for i, token in enumerate(PROMPTS[1])], [2])
    while machine.rows():
        machine.step()
    assert machine.state.slot_tokens[0, :28].tolist() == alone(target, PROMPTS[1], 28, GREEDY)
    assert machine.state.slot_drafted.sum() == machine.state.slot_followed[0] == 0


def test_texts_of_a_program_with_a_draft_model_read_back() -> None:
    model = drafted(tiny("gemma3"), tiny("llama"))
    assert parse(show(model.program)) == model.program
    schedule = model.schedule("few", 2, DRAFTING)
    assert parse_schedule(show_schedule(schedule)) == schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, drafter=None), "passes of a drafter, and of nothing else"),
        (lambda p: replace(p, drafter=replace(p.drafter, exit=p.exit)), "expected distinct graphs"),
        (lambda p: replace(p, drafter=tiny("llama", vocab=64).program), "expected distinct graphs"),
        (lambda p: replace(p, drafter=as_drafter(tiny("llama", vocab=64).program)), "96 tokens, got 64"),
    ],
)
def test_programs_that_are_none_are_refused(change: Callable[[Program], Program], message: str) -> None:
    program = drafted(tiny("llama"), tiny("llama")).program
    made = change(program)
    with pytest.raises(CompileError, match=message):
        made.verify()


def test_passes_are_those_of_the_limits() -> None:
    model = drafted(tiny("llama"), tiny("llama"), passes=2)
    with pytest.raises(CompileError, match="expected a draft model of 3 passes, got one of 2"):
        model.schedule("few", 1, DRAFTING)
