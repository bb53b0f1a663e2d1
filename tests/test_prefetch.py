"""Which weights a worker asks for ahead of a join, and how many bytes of them."""

from __future__ import annotations

from functools import cache

import numpy as np

from onelaunch.compiler.weights import packed_weights, weight_plan
from onelaunch.ir.limits import ALIGN, Limits
from onelaunch.ir.record import FIELDS
from onelaunch.ir.table import AHEAD_BYTES, Asked, Body, lower
from onelaunch.tests.tiny import tiny

WORKERS = 2


@cache
def schedule():
    return tiny("qwen3", "q4_0").schedule("few", WORKERS, Limits(rows=16, slots=2, context=512))


def layer():
    found = schedule()
    return next(s for s in found.sections if "attend" in dict(s.events))


def test_the_weights_behind_attention_are_asked_for_before_it():
    names = {"q_k_v": "o", "attend": "gate_up", "o": None, "gate_up": "down", "down": None}
    for queue in layer().queues:
        asked = {task.signal: task.prefetch and task.prefetch.weight for task in queue if task.signal}
        assert asked == names


def test_what_is_asked_for_is_the_workers_own_range():
    for queue in layer().queues:
        down = next(task for task in queue if task.body == "down")
        asked = next(task.prefetch for task in queue if task.signal == "gate_up")
        size = asked.size // (down.last - down.first)
        assert (asked.offset, asked.size) == (down.first * size, (down.last - down.first) * size)


def test_workers_share_what_may_be_asked_for():
    section = layer()
    tasks = [task for queue in section.queues for task in queue if task.signal == "gate_up"]
    whole = [task.prefetch.size for task in tasks]
    assert [Asked(schedule(), sum(whole)).size(section, task) for task in tasks] == whole
    limit = sum(whole) // 2
    cut = [Asked(schedule(), limit).size(section, task) for task in tasks]
    assert 0 < sum(cut) <= limit
    assert all(size % ALIGN == 0 for size in cut)
    assert all(a <= b for a, b in zip(cut, whole, strict=True))


def test_the_table_asks_for_no_more():
    plan = weight_plan(packed_weights(schedule().program))
    bodies = {(s.name, t.phase, t.body): Body(0, ()) for s in schedule().sections for q in s.queues for t in q}
    size = FIELDS.index("prefetch_size")

    def most(ahead):
        return int(np.max(lower(schedule(), bodies, plan, ahead)[:, :, size])) * ALIGN

    sections = schedule().sections
    asked = [t.prefetch for s in sections for q in s.queues for t in q] + [h for s in sections for h in s.heads]
    assert most(1 << 30) == max(a.size for a in asked if a)
    assert most(2 * 1024) == 1024
    assert most(None) <= AHEAD_BYTES
