"""From the integers the kernel reads: how often a layer joins, and that every weight byte is read once."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from onelaunch.codegen.cpu.render import render_step
from onelaunch.codegen.triton.render import render_kernel
from onelaunch.compiler.check.table_proof import AT, joins, reading_faults
from onelaunch.compiler.weights import packed_weights, weight_plan
from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.table import END, lower
from onelaunch.tests.tiny import FAMILY_NAMES, MOE, tiny


@cache
def lowered(family, workers):
    """(schedule, table, bodies, weight plan) of each bucket."""
    model = tiny(family, "q4_0", hidden=128, ffn=320)
    schedules = {b: model.schedule(b, workers) for b in BUCKETS}
    bodies = render_step(schedules, 0).bodies if family in MOE else render_kernel(schedules).bodies
    plan = weight_plan(packed_weights(model.lowered))
    return {b: (s, lower(s, bodies[b], plan), bodies[b], plan) for b, s in schedules.items()}


each_family = pytest.mark.parametrize("family", FAMILY_NAMES)


@each_family
@pytest.mark.parametrize("workers", [1, 3, 8, 132])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_weight_byte_is_read_by_exactly_one_unit(family, workers, bucket):
    schedule, table, bodies, plan = lowered(family, workers)[bucket]
    assert reading_faults(schedule, table, bodies, plan) == []


@pytest.mark.parametrize(
    ("family", "count"), [("qwen3_moe", 7), ("mixtral", 7), ("gpt_oss", 7), ("qwen2_moe", 9)]
)
def test_a_layer_of_experts_joins_for_router_and_experts_too(family, count):
    """Gates are made by every worker for itself."""
    schedule, table, _, _ = lowered(family, 3)["few"]
    assert {found.count for found in joins(schedule, table) if found.layer >= 0} == {count - 1}


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in MOE])
@pytest.mark.parametrize("workers", [3, 132])
def test_a_dense_layer_joins_five_times(family, workers):
    schedule, table, _, _ = lowered(family, workers)["few"]
    layers = [found for found in joins(schedule, table) if found.layer >= 0]
    assert len(layers) == len(schedule.program.layers)
    assert {found.count for found in layers} == {5}


def test_with_many_rows_shared_prologues_join_too():
    schedule, table, _, _ = lowered("llama", 3)["many"]
    assert {found.count for found in joins(schedule, table) if found.layer >= 0} == {9}


@pytest.mark.parametrize(
    ("change", "expected"), [(-1, "are not all read"), (1, "are read twice")], ids=["tile left out", "tile repeated"]
)
def test_a_share_that_ends_elsewhere_is_noticed(change, expected):
    schedule, table, bodies, plan = lowered("llama", 3)["few"]
    planted = table.copy()
    record = int(np.argmax((planted[0, :, 0] != END) & (planted[0, :, AT["last"]] > 0)))
    planted[0, record, AT["last"]] += change
    assert any(expected in reason for reason in reading_faults(schedule, planted, bodies, plan))
