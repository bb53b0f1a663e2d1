"""The validator accepts what the passes make, and says which tasks and which value when it refuses."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import cache

import pytest
from tiny import FAMILY_NAMES, LIMITS, Tiny, tiny, two_layers

from onelaunch.ir.certificate import check_certificate
from onelaunch.ir.errors import VerifyError
from onelaunch.ir.ordering import classes, meet, run_window
from onelaunch.ir.placement import touches
from onelaunch.ir.schedule import BUCKETS, Schedule
from onelaunch.ir.schedule_text import parse_schedule, show_schedule
from onelaunch.ir.validate import validate, validate_buckets
from onelaunch.passes import SCHEDULE_PASSES, schedule


@cache
def model(family: str) -> Tiny:
    return tiny(family, layer_kinds=("local", "global"))


@cache
def base(family: str, bucket: str, workers: int) -> Schedule:
    return model(family).schedule(bucket, workers)


# ---- what is right is accepted --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("fmt", ["q8_0", "bf16"])
@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_every_lowering_is_accepted(family, fmt, workers):
    made = {bucket: tiny(family, fmt).schedule(bucket, workers) for bucket in BUCKETS}
    for bucket, certificate in validate_buckets(made).items():
        assert certificate.bucket == bucket
        assert certificate.counts["pairs"] > 0
        text = show_schedule(made[bucket])
        check_certificate(text, json.loads(json.dumps(certificate.as_dict())))
        assert validate(parse_schedule(text)) == certificate


def test_sixty_layers_and_sixty_four_workers_take_less_than_three_seconds():
    large = tiny("gemma3", "q4_k", hidden=2048, ffn=8192, heads=16, kv_heads=4, head_dim=128,
                 layer_kinds=("local",) * 5 * 10 + ("global",) * 10)  # fmt: skip
    for bucket in BUCKETS:
        made = large.schedule(bucket, 64)
        start = time.process_time()
        validate(made)
        assert time.process_time() - start < 3


def test_layers_do_not_change_the_cost():
    few, many = (tiny("llama", layer_kinds=("global",) * n).schedule("few", 2) for n in (3, 40))
    assert validate(few).counts == validate(many).counts


# ---- certificates ---------------------------------------------------------------------------------


def test_a_certificate_is_of_one_text():
    text = show_schedule(base("llama", "few", 2))
    certificate = validate(base("llama", "few", 2)).as_dict()
    check_certificate(text, certificate)
    with pytest.raises(VerifyError, match="expected sha256"):
        check_certificate(text.replace("wait attend", "wait q_k_v", 1), certificate)
    with pytest.raises(VerifyError, match="no order of running gets stuck"):
        check_certificate(text, certificate | {"proved": certificate["proved"][2:]})
    with pytest.raises(VerifyError, match="expected version"):
        check_certificate(text, certificate | {"version": 0})


def test_buckets_must_leave_the_logits_in_one_place():
    made = {bucket: base("llama", bucket, 2) for bucket in BUCKETS}
    far = made["few"].workspace_bytes
    moved = tuple(dataclasses.replace(b, offset=far) if b.name == "exit/logits" else b for b in made["few"].buffers)
    with pytest.raises(VerifyError, match="expected logits at"):
        validate_buckets(made | {"few": dataclasses.replace(made["few"], buffers=moved)})


# ---- reasons name both places ---------------------------------------------------------------------


def edited(family: str, bucket: str, workers: int, old: str, new: str) -> str:
    text = show_schedule(base(family, bucket, workers))
    assert old in text
    with pytest.raises(VerifyError) as caught:
        validate(parse_schedule(text.replace(old, new, 1)))
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_a_missing_wait_names_reader_writer_and_value():
    said = edited("llama", "few", 2, "run attend attend 0:live:2 wait q_k_v", "run attend attend 0:live:2")
    assert "worker 0 task" in said
    assert "reads `q1` without waiting for worker 1 task" in said or "reads `kv.k` without waiting" in said
    assert "which writes it" in said


def test_attention_before_the_append_is_refused():
    said = edited("qwen3", "many", 2, "run attend attend 0:live:2 wait q_k_v", "run attend attend 0:live:2 wait ^")
    assert "reads `kv.k` without waiting" in said


def test_a_deadlock_names_every_stuck_worker():
    said = edited("llama", "few", 2, "run attend attend 0:live:2 wait q_k_v", "run attend attend 0:live:2 wait down")
    assert "deadlock: worker 0" in said
    assert "deadlock: worker 1" in said
    assert "(0 of 2)" in said


def test_commit_waits_for_all_that_read_the_rows():
    said = edited("llama", "few", 2, "run commit commit 0:1 wait sample", "run commit commit 0:1 wait ^")
    assert "writes `state` without waiting" in said


def test_the_next_layer_waits_for_this_one():
    said = edited("llama", "few", 2, "run q_k_v pack.q8 0:live wait ^", "run q_k_v pack.q8 0:live")
    assert "starts before section `entry` has ended" in said


def test_a_value_that_is_overwritten_too_early_is_named():
    made = base("llama", "few", 2)
    at = made.buffer("local", "q1").offset
    moved = tuple(dataclasses.replace(b, offset=at) if b.name == "local/attend" else b for b in made.buffers)
    with pytest.raises(VerifyError, match=r"`attend`.*`q1`|`q1`.*`attend`"):
        validate(dataclasses.replace(made, buffers=moved))


def test_in_place_over_a_value_that_other_workers_still_read_is_refused():
    """`x + linear(norm(x))` in place: a worker may still pack `x` when another has its columns of the sum."""
    made = _one_layer("x1: f32[R, 64] = add(x, y)")
    assert made.buffer("layer", "x1").offset == made.buffer("layer", "x").offset
    with pytest.raises(VerifyError, match="`x1` in the bytes of `x`"):
        validate(made)


def test_parts_of_two_values_are_told_apart_only_where_rows_lie_alike():
    made = base("gemma3", "many", 2)
    sections = made.section("local"), made.section("global")
    window, stuck = run_window(*sections)
    assert not stuck
    touched = tuple(touches(made, made.graph(s.name)) for s in sections)
    rows = next(c for c in classes(made, window, touched) if c.value == "x1" and c.write)
    alike = dataclasses.replace(rows, value="other")
    wider = dataclasses.replace(alike, place=dataclasses.replace(rows.place, stride=2 * rows.place.stride))
    assert meet(rows, alike).tolist() == [[True, False], [False, True]]
    assert meet(rows, wider).all()


def _one_layer(last: str) -> Schedule:
    text = f"""
          graph layer(x: f32[R, 64], w.n: f32[64], w.up: q8_0[64, 64]) -> (x1) {{
            h: f32[R, 64] = rms_norm(x, w.n, eps=1e-05)
            y: f32[R, 64] = linear(h, w.up)
            {last}
          }}
"""
    made = schedule(Tiny(two_layers(text), {}, 0).lowered, LIMITS, "few", 2)
    for _, run in SCHEDULE_PASSES:
        made = run(made)
    return made
