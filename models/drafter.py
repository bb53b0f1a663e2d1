"""A second model that drafts for the first, in one program: its names made its own, its weights beside the others'.

The two share nothing but tokens, so they must mean the same by them, and positions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ..ir.errors import LoadError
from ..ir.graph import Graph, Program
from ..ir.ops import Commit, ExpertLinear, Guess, Sample
from ..ir.types import StateType, TensorType, Value
from .checkpoint import Checkpoint, TokenizerFiles
from .importer import Imported, WeightSource

PREFIX = "draft_"  # of graphs, activations and the model's own weights
FILE = "draft:"  # of tensors in the joint checkpoint


def with_drafter(target: Imported, draft: Imported, passes: int) -> Imported:
    """`target` with `draft` guessing `passes` tokens a step. LoadError with every reason why they do not fit."""
    reasons = _misfits(target.checkpoint, draft.checkpoint)
    if any(isinstance(op, ExpertLinear) for graph in draft.program.graphs for op in graph.ops):
        reasons.append("expected a draft model without experts")
    if reasons:
        raise LoadError(
            [f"draft model: {reason}" for reason in reasons],
            place=str(draft.checkpoint.path),
            hint="a draft model is a smaller one of the same family, with the same tokenizer",
        )
    program = dataclasses.replace(target.program, drafter=as_drafter(draft.program), passes=passes)
    sources = {joint_key(key, len(target.program.layers)): _source(source) for key, source in draft.sources.items()}
    return Imported(
        program.verify(),
        target.sources | sources,
        _joint(target.checkpoint, draft.checkpoint),
        target.ignored | {FILE + name: why for name, why in draft.ignored.items()},
    )


def as_drafter(program: Program) -> Program:
    """The same model under names of its own, its exit guessing instead of sampling."""
    made = program.map(lambda graph: _renamed(graph, own_weights=graph in (program.entry, program.exit)))
    return dataclasses.replace(made, layers=tuple(PREFIX + n for n in program.layers), exit=_guessing(made.exit))


def _renamed(graph: Graph, own_weights: bool) -> Graph:
    """Activations and, of entry and exit, weights get the prefix; those of layers have numbers of their own."""
    values = {v.name: _value(v, own_weights) for v in (*graph.params, *(op.out for op in graph.ops))}
    ops = tuple(dataclasses.replace(op.with_operands(values), out=values[op.out.name]) for op in graph.ops)
    params, results = (tuple(values[v.name] for v in of) for of in (graph.params, graph.results))
    return dataclasses.replace(graph, name=PREFIX + graph.name, params=params, ops=ops, results=results)


def _value(value: Value, own_weights: bool) -> Value:
    if not isinstance(value.type, TensorType) or (value.is_weight and not own_weights):
        return value
    name = f"w.{PREFIX}{value.name[2:]}" if value.is_weight else PREFIX + value.name
    return Value(name, value.type)


def _guessing(graph: Graph) -> Graph:
    logits = next(op for op in graph.ops if isinstance(op, Sample)).logits
    slots = next(p for p in graph.params if p.type == StateType("slots"))
    guess = Guess(Value(f"{PREFIX}guess", slots.type), logits, slots)
    ops = tuple(op for op in graph.ops if not isinstance(op, Sample | Commit))
    return dataclasses.replace(graph, ops=(*ops, guess), results=(guess.out,))


def joint_key(key: str, first: int) -> str:
    """The key of a draft model's weight among those of both: its layers are numbered on from `first`."""
    layer, dot, name = key.partition(".")
    return f"{first + int(layer)}.{name}" if dot else PREFIX + key


def _source(source: WeightSource) -> WeightSource:
    return dataclasses.replace(source, tensors=tuple(FILE + name for name in source.tensors))


def _joint(target: Checkpoint, draft: Checkpoint) -> Checkpoint:
    """The target's checkpoint that also reads the draft's tensors."""
    tensors = {FILE + name: dataclasses.replace(info, name=FILE + name) for name, info in draft.tensors.items()}

    def read(name: str) -> Any:
        return draft.read(name.removeprefix(FILE)) if name.startswith(FILE) else target.read(name)

    return dataclasses.replace(target, tensors=target.tensors | tensors, read=read)


# ---- whether they mean the same by a token ----------------------------------------------------------------


def _misfits(target: Checkpoint, draft: Checkpoint) -> list[str]:
    want, got = target.hyper["vocab"], draft.hyper["vocab"]
    if want != got:
        return [f"expected a vocabulary of {want} tokens, as the model has, got {got}"]
    if target.tokenizer is None or draft.tokenizer is None:
        return []
    ours, theirs = _tokens(target.tokenizer()), _tokens(draft.tokenizer())
    for text in sorted(ours.keys() | theirs.keys()):
        if ours.get(text) != theirs.get(text):
            shown = [f"token {i}" if i is not None else "no token" for i in (ours.get(text), theirs.get(text))]
            return [f"expected the model's tokenizer, where `{text}` is {shown[0]}, got one where it is {shown[1]}"]
    return []


def _tokens(files: TokenizerFiles) -> Mapping[str, int]:
    """What text is which token."""
    found = json.loads(files.files["tokenizer.json"])
    vocab = found["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    return dict(pairs) | {token["content"]: token["id"] for token in found.get("added_tokens", [])}
