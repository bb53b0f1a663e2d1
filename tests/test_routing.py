"""Which experts a model uses, written down and counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onelaunch.compiler.check.reference_weights import ReferenceWeights
from onelaunch.compiler.reports.routing import hit_rates, read_routing
from onelaunch.ir.errors import LoadError, UsageError
from onelaunch.ir.ops.experts import chosen
from onelaunch.ir.reference import KvCache, RowBatch, evaluate_all
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.runtime import load
from onelaunch.tests import small
from onelaunch.tests.checkpoints import save_random

LIMITS = {"rows": 16, "slots": 2, "context": 64, "outputs": 4, "kv_dtype": "f32"}
CONFIG = {"num_hidden_layers": 2, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random(folder, "qwen3_moe", **CONFIG)
    return folder


@pytest.mark.parametrize("chunk", [1, 11])
def test_a_trace_names_the_experts_of_every_row(chunk, model, compiled, tmp_path):
    """Those of the first layer, whose router sees what the embedding and attention give."""
    with load(compiled(model, limits=LIMITS), threads=2) as opened:
        opened.trace_routing(tmp_path / "trace")
        for start in range(0, len(PROMPT), chunk):
            rows = range(start, min(start + chunk, len(PROMPT)))
            opened.step([PROMPT[i] for i in rows], [0] * len(rows), rows)
    head, *steps = map(json.loads, (tmp_path / "trace").read_text().splitlines())
    assert (head["layers"], head["experts"], head["choices"]) == (2, 7, 3)
    got = [row for step in steps for row in step[0]]
    assert got == expected(model)


def expected(model) -> list[list[int]]:
    imported = import_checkpoint(open_checkpoint(model))
    program, weights = imported.program, ReferenceWeights(imported, imported.program)
    rows = RowBatch.of([(t, 0, i) for i, t in enumerate(PROMPT)], [])
    entry = evaluate_all(program.entry, {"rows": rows} | {w.name: weights[w.name[2:]] for w in program.entry.weights})
    layer = program.kinds[0]
    values = evaluate_all(
        layer,
        {**entry, "rows": rows, "kv": KvCache.empty(layer.cache.cache, 1, 64)}
        | {w.name: weights[f"0.{w.name[2:]}"] for w in layer.weights},
    )
    return chosen(values["gates"], 3).tolist()


def test_a_burst_of_decoding_is_traced_step_by_step(model, compiled, tmp_path):
    with load(compiled(model, limits=LIMITS), threads=2) as opened:
        plain = opened.generate(PROMPT, max_new_tokens=20, stop_tokens=()).tokens
        opened.trace_routing(tmp_path / "trace")
        assert opened.generate(PROMPT, max_new_tokens=20, stop_tokens=()).tokens == plain
    routing = read_routing(tmp_path / "trace")
    assert len(routing.loads[0]) == 20
    assert routing.assignments == 2 * 3 * (len(PROMPT) + 19)


def test_a_dense_model_has_nothing_to_trace(compiled, tmp_path):
    artifact = compiled(small.write_model(tmp_path / "dense"), limits=LIMITS)
    with load(artifact) as opened, pytest.raises(UsageError, match="expected a mixture of experts, got `llama`"):
        opened.trace_routing(tmp_path / "trace")


def write(path, steps, experts=4):
    head = {"routing": 1, "model": "m", "layers": 1, "experts": experts, "choices": 2}
    path.write_text("\n".join(json.dumps(line) for line in [head, *steps]) + "\n")
    return path


def test_hit_rates_are_those_of_caches_simulated_one_by_one(tmp_path):
    random = np.random.default_rng(0)
    steps = [[[sorted(random.choice(9, 2, replace=False, p=np.arange(1, 10) / 45).tolist())]] for _ in range(300)]
    routing = read_routing(write(tmp_path / "trace", steps, 9))
    loads = [e for step in steps for e in step[0][0]]
    for row in hit_rates(routing):
        cache: list[int] = []
        hits = 0
        for e in loads:
            hits += e in cache
            cache = [e, *(x for x in cache if x != e)][: row["resident"]]
        assert row["lru"] == pytest.approx(hits / len(loads))
        best = sorted(range(9), key=lambda e: -loads.count(e))[: row["resident"]]
        assert row["fixed"] == pytest.approx(sum(e in best for e in loads) / len(loads))
    assert hit_rates(routing)[-1]["fixed"] == 1.0


@pytest.mark.parametrize("text", ["", "{}", '{"routing": 2, "layers": 1, "experts": 4}', "not json", "\x00"])
def test_a_file_that_is_no_trace_is_refused(text, tmp_path):
    (tmp_path / "trace").write_text(text)
    with pytest.raises(LoadError, match="expected a routing trace"):
        read_routing(tmp_path / "trace")


def test_an_expert_out_of_range_is_refused(tmp_path):
    with pytest.raises(LoadError, match="out of range"):
        read_routing(write(tmp_path / "trace", [[[[4, 1]]]]))
