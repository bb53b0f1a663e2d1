"""Work on rows that every worker repeats for itself: which it is, that it costs no join, and that copies stay whole."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from tiny import FAMILY_NAMES, LIMITS, Tiny, tiny, two_layers

from onelaunch.ir.errors import VerifyError
from onelaunch.ir.graph import Program
from onelaunch.ir.reference import Slot
from onelaunch.ir.schedule import Schedule
from onelaunch.ir.schedule_text import parse_schedule, show_schedule
from onelaunch.ir.validate import validate
from onelaunch.ir.vm import Outcome, VirtualMachine
from onelaunch.passes import SCHEDULE_PASSES, schedule
from onelaunch.passes.repeat import repeated


@cache
def model(family: str) -> Tiny:
    return tiny(family, layer_kinds=("local", "global"))


@cache
def gemma(workers: int) -> Schedule:
    return model("gemma3").schedule("few", workers)


# ---- which ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gemma_repeats_all_its_row_phases_and_other_families_their_gates_alone(family):
    program = model(family).lowered
    rows = {(g.name, p.name) for g in program.graphs for p in g.phases if p.anchor_kind == "rows"}
    gates = {row for row in rows if row[1] == "rows_gates"}
    assert len(gates) == (len(program.kinds) if "router" in str(program) else 0)
    assert repeated(program) == (rows if family == "gemma3" else gates)


ATTENTION = """
    q: f32[R, 64] = linear(h, w.q)
    k: f32[R, 64] = linear(h, w.k)
    v: f32[R, 64] = linear(h, w.v)
    kv1: kv[4, 16, 0] = append(kv, k, v, rows)
    a: f32[R, 64] = attend(q, kv1, rows, scale=0.25, softcap=0.0)
"""
NORM = "n: f32[R, 64] = rms_norm(y, w.m, eps=1e-05)"


def layer(*lines: str, result: str = "x1", attention: bool = True) -> Program:
    """A program of two equal layers; `lines` follow `y`, a matrix of the attended rows."""
    matrices = ", ".join(f"w.{name}: q8_0[64, 64]" for name in ("q", "k", "v", "o", "down", "last"))
    body = "\n".join(lines)
    text = f"""
          graph layer(
            x: f32[R, 64], kv: kv[4, 16, 0], rows: rows, w.n: f32[64], w.m: f32[64], {matrices}
          ) -> ({result}) {{
            h: f32[R, 64] = rms_norm(x, w.n, eps=1e-05)
            {ATTENTION if attention else ""}
            y: f32[R, 64] = linear({"a" if attention else "h"}, w.o)
            {body}
          }}
"""
    return Tiny(two_layers(text), {}, 0).lowered


def proved(program: Program, workers: int) -> Schedule:
    made = schedule(program, LIMITS, "few", workers)
    for _, run in SCHEDULE_PASSES:
        made = run(made)
    validate(made)
    return made


def test_a_norm_before_the_running_activation_is_repeated_with_the_embedding():
    program = layer(NORM, "x1: f32[R, 64] = add(x, n)")
    assert repeated(program) == {("entry", "rows_x"), ("layer", "rows_x1")}
    proved(program, 5)


def test_nothing_is_repeated_where_a_matrix_adds_to_the_running_activation_too():
    """Tiles of `x1` would reach one worker's copy only."""
    program = layer(
        "x1: f32[R, 64] = add(x, y)",
        "z: f32[R, 64] = linear(x1, w.down)",
        "n: f32[R, 64] = rms_norm(z, w.m, eps=1e-05)",
        "x2: f32[R, 64] = add(x1, n)",
        result="x2",
    )
    assert [p.name for p in program.kinds[0].phases][-1] == "rows_x2"
    assert repeated(program) == set()
    proved(program, 5)


def test_what_reads_a_shared_running_activation_is_not_repeated():
    """A worker without tiles of `last` may read `x` when others already have the sum in its place."""
    program = layer(
        "t: f32[R, 64] = rms_norm(x, w.m, eps=1e-05)",
        "z: f32[R, 64] = linear(t, w.down)",
        "n: f32[R, 64] = add(t, z)",
        "u: f32[R, 64] = linear(n, w.last)",
        "s: f32[R, 64] = add(u, y)",
        "x1: f32[R, 64] = add(x, s)",
    )
    assert {p.name for p in program.kinds[0].phases if p.anchor_kind == "rows"} == {"rows_t"}
    assert repeated(program) == set()


def test_nothing_is_repeated_in_layers_that_never_wait_for_all_workers():
    """The next layer's `y` could be written while a late worker still reads this one's."""
    program = layer(NORM, "x1: f32[R, 64] = add(x, n)", attention=False)
    assert repeated(program) == set()
    proved(program, 5)


# ---- what it saves --------------------------------------------------------------------------------


def test_sections_start_without_a_wait_for_what_every_worker_has_waited_for():
    made = gemma(4)
    assert made.section("entry").end == ""
    assert {made.section(name).end for name in ("local", "global")} == {"down"}
    assert not [t for s in made.sections for q in s.queues for t in q if "^" in t.waits]
    assert parse_schedule(show_schedule(made)) == made


def test_with_many_rows_nothing_is_repeated():
    made = model("gemma3").schedule("many", 4)
    assert all(t.signal for s in made.sections for q in s.queues for t in q if t.body == "rows")
    assert not any(b.private for b in made.buffers if ".unit" not in b.name and ".scratch" not in b.name)


# ---- workers without tiles ------------------------------------------------------------------------


def run_steps(made: Schedule, order: str) -> list[Outcome]:
    machine = VirtualMachine({made.bucket: made}, model("gemma3").weights)
    for slot in (0, 1):
        machine.start(slot, Slot(limit=64))
    machine.set_rows([(3, 0, 0), (5, 0, 1), (9, 1, 0)], [1, 2])
    return [machine.step(order, seed) for seed in range(3)]


@pytest.mark.parametrize("order", ["random", "burst", "highest"])
def test_workers_without_tiles_may_be_late(order):
    """Of 11 workers nine have no tile of `o` and `down`, five none of `gate_up`."""
    validate(gemma(11))
    for one, two in zip(run_steps(gemma(11), order), run_steps(gemma(1), "lowest"), strict=True):
        assert one.tokens == two.tokens
        assert torch.allclose(one.logits, two.logits, atol=1e-4)


def test_what_a_late_worker_reads_must_keep_its_place():
    made = gemma(11)
    at = made.buffer("local", "q1").offset
    moved = tuple(dataclasses.replace(b, offset=at) if b.name == "local/f" else b for b in made.buffers)
    with pytest.raises(VerifyError, match=r"`q1` in the bytes of `f` without waiting"):
        validate(dataclasses.replace(made, buffers=moved))


# ---- what the validator refuses -------------------------------------------------------------------


def refused(old: str, new: str, count: int = 1) -> str:
    text = show_schedule(gemma(2))
    assert old in text
    with pytest.raises(VerifyError) as caught:
        validate(parse_schedule(text.replace(old, new, count)))
    return str(caught.value)


def test_a_copy_that_is_not_whole_is_refused():
    said = refused("run rows_x1 rows 0:live wait o", "run rows_x1 rows 0:live:2 wait o")
    assert "`rows_x1` rows: expected worker 0 to run every row once for its own copy, got 0:live:2" in said


def test_workers_may_not_all_write_what_they_share():
    x = next(b for b in gemma(2).buffers if b.name == "/x")
    shared = tuple(dataclasses.replace(b, private=False) if b is x else b for b in gemma(2).buffers)
    with pytest.raises(VerifyError, match="expected drains that take every live tile once"):
        validate(dataclasses.replace(gemma(2), buffers=shared))


def test_tiles_of_a_matrix_may_not_go_to_copies():
    private = tuple(dataclasses.replace(b, private=True) if b.name == "local/a" else b for b in gemma(2).buffers)
    with pytest.raises(VerifyError, match="value `a` in buffer `local/a`: expected a buffer that all workers share"):
        validate(dataclasses.replace(gemma(2), buffers=private))


def test_results_of_one_phase_are_all_copies_or_none():
    made = gemma(2)
    shared = tuple(dataclasses.replace(b, private=False) if b.name == "/angles" else b for b in made.buffers)
    with pytest.raises(VerifyError, match="expected all results in private buffers or none"):
        validate(dataclasses.replace(made, buffers=shared))


def test_there_is_no_waiting_for_a_section_without_events():
    said = refused("run q_k_v pack.q8 0:live", "run q_k_v pack.q8 0:live wait ^")
    assert "waits for the section before, which has no end event" in said


def test_the_repeated_work_waits_for_what_it_reads():
    said = refused("run rows_x2 rows 0:live wait down", "run rows_x2 rows 0:live")
    assert "reads `f` without waiting" in said


def test_only_the_first_section_may_have_no_end():
    """Later ones keep the sections on both sides apart."""
    made = proved(layer(NORM, "x1: f32[R, 64] = add(x, n)"), 2)
    with pytest.raises(VerifyError, match="end event `` does not exist"):
        validate(made.map_sections(lambda s: dataclasses.replace(s, end="") if s.name == "layer" else s))
