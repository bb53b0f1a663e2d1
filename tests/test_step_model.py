"""The modelled step: bytes are those of the weights, times add up, and every bound can be reached."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from onelaunch.compiler.gpu.machines import machine_for
from onelaunch.compiler.gpu.step_ahead import Ahead
from onelaunch.compiler.gpu.step_model import model, share
from onelaunch.compiler.gpu.step_work import Cost
from onelaunch.compiler.gpu.timeline import trace
from onelaunch.compiler.weights import packed_weights
from onelaunch.ir.limits import Limits
from onelaunch.ir.schedule import packed_name, parts
from onelaunch.tests.tiny import tiny

QWEN3_8B = {
    "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 12288, "vocab": 151936,
    "layer_kinds": ("global",) * 36, "query_scale": 128**-0.5,
}  # fmt: skip
H100 = machine_for("h100")


@cache
def qwen3_8b(workers=132):
    return tiny("qwen3", "q4_0", **QWEN3_8B).schedule("few", workers, Limits(rows=16, slots=2, context=4096))


@cache
def modelled():
    return model(qwen3_8b(), H100)


def test_the_bytes_are_every_matrix_once():
    program = qwen3_8b().program
    sizes = {w.key: w.size for w in packed_weights(program)}
    matrices = [
        (f"{layer}." if layer >= 0 else "") + packed_name(part)
        for graph, layer in program.sections()
        for phase in graph.phases
        if phase.anchor_kind == "linear"
        for part in parts(phase)
    ]
    small = modelled().memory - sum(sizes[key] for key in matrices)
    assert 0 <= small < 1e-3 * modelled().memory  # one row of the embedding and one cached token


@pytest.mark.parametrize("workers", [1, 7, 132])
def test_of_experts_the_bytes_are_those_of_one_rows(workers):
    sizes = {"hidden": 512, "experts": 16, "experts_used": 3, "moe_ffn": 192, "layer_kinds": ("global",) * 2}
    schedule = tiny("qwen3_moe", "q4_0", **sizes).schedule("few", workers, Limits(rows=16, slots=2, context=512))
    packed = {w.key: w.size for w in packed_weights(schedule.program)}
    found = {p.phase: p for p in model(schedule, H100).phases if p.section == "global"}
    for phase, key in (("gate_up", "0.gate_up"), ("down", "0.down")):
        assert found[phase].memory == packed[key] * 3 / 16
        trips = sum(r.trips for records in found[phase].records for r in records if r.memory)
        assert trips > 3 * len(found[phase].records[0])  # a tile begins with a look at the routes


def test_phases_and_launch_add_up_to_the_step():
    step = modelled()
    assert step.us == pytest.approx(H100.launch_us + sum(p.layers * p.us for p in step.phases))
    assert step.us > step.floor_us == pytest.approx(step.memory / 3350e3)
    assert len(step.phases) == len([e for s in qwen3_8b().sections for e in s.events])


def test_with_nothing_but_bytes_the_step_is_the_floor():
    ideal = replace(
        H100, launch_us=0.0, join_us=0.0, l2_latency_us=0.0, read_fraction=1.0, sm_share=32.0, l2_bytes_per_clock=1e9,
        boost_mhz=1_000_000,
    )  # fmt: skip
    step = model(qwen3_8b(), ideal)
    assert step.us == pytest.approx(step.floor_us, rel=1e-3)
    assert {p.bound for p in step.phases if p.memory > 1e6} <= {"bytes", "worker"}


@pytest.mark.parametrize(
    ("cost", "bound"),
    [(Cost(1.0), "bytes"), (Cost(20.0), "issue"), (Cost(1.0, in_flight=4096), "worker")],
)
def test_the_bound_of_a_phase_is_named(cost, bound):
    step = model(qwen3_8b(), H100, {"global.gate_up.gate_up": cost})
    assert next(p for p in step.phases if p.phase == "gate_up").bound == bound


def test_fewer_units_than_workers_leave_bandwidth_unused():
    """48 heads on 132 SMs: a third of the workers draw at most twice their even share."""
    qkv = next(p for p in modelled().phases if p.phase == "q_k_v")
    assert sum(1 for records in qkv.records if records) == 48
    assert qkv.us > 1.3 * H100.floor_us(qkv.memory) + H100.join_us


def test_a_context_costs_its_cache():
    deep = model(qwen3_8b(), H100, depth=4095)
    attend = next(p for p in deep.phases if p.phase == "attend")
    assert attend.memory == 4096 * 2 * 8 * 128 * 2
    assert deep.us > modelled().us + 36 * H100.floor_us(attend.memory)


def test_prefetched_bytes_come_while_workers_wait():
    without = qwen3_8b().map_sections(
        lambda s: replace(s, heads=(), queues=tuple(tuple(replace(t, prefetch=None) for t in q) for q in s.queues))
    )
    slower = model(without, H100)
    assert slower.memory == modelled().memory
    assert slower.us > modelled().us + 36 * 0.4


def test_one_row_of_an_8b_shape_reaches_four_fifths_of_the_floor():
    """With what the compiled loops of q4_0 cost at most, and 16 KiB in flight, as one of their iterations reads."""
    parts_read = ("q_k_v.q", "q_k_v.k", "q_k_v.v", "o.o", "gate_up.gate_up", "down.down")
    costs = {f"global.{part}": Cost(1.3, in_flight=16384) for part in parts_read}
    assert model(qwen3_8b(), H100, costs).of_floor >= 0.8


def test_memory_sends_in_the_order_of_asking():
    ahead = Ahead(2)
    ahead.ask([("a", 60.0), ("", 0.0)])
    ahead.ask([("b", 30.0), ("b", 30.0)])
    ahead.serve(80)
    first = ahead.use([frozenset("a"), frozenset("c")])
    assert [ask and ask.left for ask in first] == [0, None]
    assert [ask.left for ask in ahead.use([frozenset("b")] * 2)] == [20, 20]
    ahead.serve(100)  # nothing is asked for: the time is lost
    assert ahead.use([frozenset("b")] * 2) == [None, None]


def test_a_layer_joins_five_times_and_the_end_thrice():
    assert sum(p.layers for p in modelled().phases if p.join_us) == 36 * 5 + 3


def test_work_that_every_worker_repeats_costs_all_of_them_and_no_join():
    made = tiny("gemma3", "q4_0").schedule("few", 4)
    step = model(made, H100)
    assert sum(p.layers for p in step.phases if p.join_us) == 3 * 5 + 3 - 1  # the first phase follows none
    norms = [p for p in step.phases if p.kind == "rows"]
    assert [p.phase for p in norms] == ["rows_angles_local", "rows_x1", "rows_x2", "rows_x1", "rows_x2"]
    assert all(start == norm.start_us[0] > 0 for norm in norms for start in norm.start_us)
    assert all(p.join_us == 0 for p in step.phases if p.phase in ("q_k_v", "gate_up"))


def test_what_is_assumed_is_said():
    said = "\n".join(modelled().assumptions)
    assert "join_us 2 (assumed)" in said
    assert "bandwidth_gb_s 3350 (vendor)" in said
    assert "no kernel counted" in said


@pytest.mark.parametrize(
    ("sizes", "caps", "ends"),
    [
        ([10, 10], [100, 100], [2.0, 2.0]),  # even
        ([10, 10], [2, 100], [5.0, 1.25]),  # what one cannot draw, the other may
        ([5, 20], [100, 100], [1.0, 2.5]),  # who is done leaves its share
        ([0, 10], [100, 100], [0.0, 1.0]),
    ],
)
def test_a_link_is_shared_evenly(sizes, caps, ends):
    assert share(sizes, caps, 10) == pytest.approx(ends)


def test_every_track_of_the_timeline_is_the_whole_step():
    step = modelled()
    found = json.loads(json.dumps(trace(step, qwen3_8b())))
    events = [e for e in found["traceEvents"] if e["ph"] == "X"]
    for worker in (0, 47, 131):
        track = sorted((e for e in events if e["tid"] == worker), key=lambda e: e["ts"])
        assert sum(e["dur"] for e in track) == pytest.approx(step.us)
        for before, after in pairwise(track):
            assert after["ts"] == pytest.approx(before["ts"] + before["dur"])
    names = {e["name"] for e in events}
    assert {"q_k_v 0", "down 35", "embed", "commit", "wait", "launch"} <= names
    assert sum(e["args"]["bytes"] for e in events if "args" in e) == pytest.approx(step.memory)
