"""Every op's docstring example parses, prints back, infers, and evaluates to the shape it declares."""

from __future__ import annotations

import pytest
import torch
from docstrings import sections
from tiny import POSITIONS, SLOTS, random_inputs, shape_of

from onelaunch.ir.errors import CompileError
from onelaunch.ir.graph import Graph
from onelaunch.ir.ops import OPS, Attend
from onelaunch.ir.reference import KvCache, RowBatch, Slots, evaluate
from onelaunch.ir.text import parse, show
from onelaunch.ir.types import CacheType, StateType, TensorType, Value

each_op = pytest.mark.parametrize("name", sorted(OPS))


def example(name: str) -> Graph:
    found = sections(OPS[name])
    assert "example" in found, f"op `{name}` has no `example:`"
    graph = parse(found["example"][1], name)
    assert isinstance(graph, Graph)
    return graph


@each_op
def test_example_uses_the_op_and_round_trips(name):
    graph = example(name)
    assert [op.name for op in graph.ops] == [name]
    assert show(graph) == sections(OPS[name])["example"][1]
    assert parse(show(graph)) == graph


@each_op
def test_example_evaluates_to_what_it_infers(name):
    graph = example(name)
    result = evaluate(graph, random_inputs(graph))[graph.results[0].name]
    kind = graph.ops[0].infer()
    if isinstance(kind, TensorType):
        assert tuple(result.shape) == shape_of(kind)
        assert result.isfinite().all()
    elif isinstance(kind, CacheType):
        assert isinstance(result, KvCache)
        assert result.keys.shape == result.values.shape == (SLOTS, POSITIONS, kind.kv_heads, kind.head_dim)
    else:
        assert isinstance(result, Slots)


@each_op
def test_example_does_not_change_its_inputs(name):
    graph = example(name)
    inputs, same = random_inputs(graph), random_inputs(graph)
    evaluate(graph, inputs)
    for key, value in inputs.items():
        tensors = [(value, same[key])]
        if isinstance(value, KvCache):
            tensors = [(value.keys, same[key].keys), (value.values, same[key].values)]
        elif isinstance(value, RowBatch | Slots):
            tensors = []
        assert all(a.equal(b) for a, b in tensors)


@each_op
def test_a_wrong_result_type_is_refused(name):
    text = sections(OPS[name])["example"][1]
    op = example(name).ops[0]
    wrong = text.replace(f"{op.out.name}: {op.out.type}", f"{op.out.name}: f32[3, 3, 3]")
    with pytest.raises(CompileError, match="is declared"):
        parse(wrong)


@pytest.mark.parametrize(("window", "kept"), [(0, 0), (3, 0), (3, 2)])
def test_attention_of_rows_together_is_that_of_each_by_itself(window, kept):
    """Rows of two slots in any order, against one row and one head at a time."""
    random, scale, cap = torch.Generator().manual_seed(0), 0.3, 5.0
    keys, values = (torch.randn(2, 12, 2, 4, generator=random) for _ in range(2))
    q, sinks = torch.randn(5, 16, generator=random), torch.randn(4, generator=random)
    rows = RowBatch.of([(0, 1, 9), (0, 0, 0), (0, 1, 10), (0, 0, 1), (0, 1, 11)], [])
    kind, out = CacheType(2, 4, window, kept), Value("a", TensorType("f32", ("R", 16)))
    attend = Attend(out, *(Value(n, k) for n, k in (("q", out.type), ("kv", kind), ("rows", StateType("rows")))),
                    Value("s", TensorType("f32", (4,))), scale, cap)  # fmt: skip
    found = attend.reference(q, KvCache(keys, values), rows, sinks).view(5, 4, 4)
    for r, (_, slot, position) in enumerate([(0, 1, 9), (0, 0, 0), (0, 1, 10), (0, 0, 1), (0, 1, 11)]):
        seen = [p for p in range(position + 1) if not window or p > position - window or p < kept]
        for head in range(4):
            k, v = (t[slot, seen, head // 2] for t in (keys, values))
            score = cap * torch.tanh(k @ q[r].view(4, 4)[head] * scale / cap)
            weight = torch.cat([score, sinks[head, None]]).softmax(0)[:-1]
            assert torch.allclose(found[r, head], weight @ v, atol=1e-6)
