"""From a checkpoint to a Program and the place of every weight, refusing what does not fit before reading any.

Every weight of the family text must be in the checkpoint with the right shape, every tensor of the
checkpoint must be used or be known to be unused; all reasons are given at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import LoadError, expect
from ..ir.formats import FORMATS
from ..ir.graph import Program
from ..ir.model_text import ModelText, WeightText, parse_model
from ..ir.types import TensorType
from .checkpoint import Checkpoint
from .instantiate import evaluate_number, instantiate
from .orders import reorder
from .rope import inverse_frequencies

FAMILIES = Path(__file__).parent


@dataclass(frozen=True)
class Rounded:
    """Disk rows u8 [N, row_bytes] of a matrix in a format, chosen by more than its own values."""

    format: str
    rows: np.ndarray


@dataclass(frozen=True)
class WeightSource:
    """Where one weight comes from: a checkpoint tensor (or one per expert) and the changes made to it, or a computed
    constant. `rounded`: what to take where another format than the checkpoint's is wanted."""

    shape: tuple[int, ...]
    format: str
    tensors: tuple[str, ...] = ()
    changes: tuple[tuple[str, float], ...] = ()
    constant: np.ndarray | None = None
    rounded: Rounded | None = None


@dataclass(frozen=True)
class Imported:
    """A program and its weights: `sources["embed"]` for the model's own, `sources["3.q"]` for layer 3's."""

    program: Program
    sources: dict[str, WeightSource]
    checkpoint: Checkpoint
    ignored: dict[str, str]  # tensors left out, and why


def family_text(family: str) -> ModelText:
    """The parsed text of a family of ours."""
    path = FAMILIES / f"{family}.ol"
    known = sorted(p.stem for p in FAMILIES.glob("*.ol"))
    expect(path.exists(), f"unknown family `{family}`", hint=f"known: {', '.join(known)}")
    return parse_model(path.read_text(), path.name)


def import_checkpoint(checkpoint: Checkpoint, text: ModelText | None = None) -> Imported:
    """Bind a checkpoint to its family's text (or `text`). Raises LoadError with every reason."""
    text = text or family_text(checkpoint.family)
    hyper, constants = complete(checkpoint.hyper)
    sources, reasons = _bind(text, hyper, constants, checkpoint)
    ignored = _unused(checkpoint, sources, reasons)
    for cap in ("logit_softcap", "attn_softcap"):
        if hyper[cap]:
            reasons.append(f"`{cap}` {hyper[cap]} is not implemented in family `{checkpoint.family}`")
    orders = _orders(sources, checkpoint, reasons)
    if reasons:
        raise LoadError(reasons, place=str(checkpoint.path))

    def resolve(name: str, layer: int) -> tuple[str, TensorType]:
        key = name if layer < 0 else f"{layer}.{name}"
        expect(key in sources, f"unknown weight `w.{name}`")
        source = sources[key]
        first = next(n for n, s in sources.items() if s is source)  # a tied head is the embedding
        return first if layer < 0 else name, TensorType(source.format, source.shape)

    program, vectors = reorder(instantiate(text, hyper, resolve), orders)
    sources |= {key: WeightSource(x.shape, "f32", constant=x.astype(np.float32)) for key, x in vectors.items()}
    return Imported(program, sources, checkpoint, ignored)


def _orders(
    sources: dict[str, WeightSource], checkpoint: Checkpoint, reasons: list[str]
) -> dict[str, np.ndarray]:
    """The orders of columns of layers' matrices; of others they are a reason to refuse."""
    found: dict[str, np.ndarray] = {}
    for key, source in sources.items():
        own = [t for t in source.tensors if t in checkpoint.orders]
        if own and (len(source.shape) != 2 or not key.partition(".")[2]):
            reasons.append(f"tensor `{own[0]}`: columns in an order of their own (act-order), outside of a plain layer")
        elif own:
            found[key] = checkpoint.orders[own[0]]
    return found


def complete(hyper: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Hyper-parameters the texts use that follow from others, and the computed constants."""
    rope, context = hyper["rope"], hyper["context"]
    freq, factor = inverse_frequencies(hyper["head_dim"], rope["theta"], rope["scaling"], context)
    local, _ = inverse_frequencies(hyper["head_dim"], rope["local_theta"], rope["local_scaling"], context)
    more = {"norm_offset": float(hyper["norm_plus_one"]), "rope_factor": factor}
    constants = {"inv_freq": freq.astype(np.float32), "inv_freq_local": local.astype(np.float32)}
    return hyper | more, constants


def _bind(
    text: ModelText, hyper: dict[str, Any], constants: dict[str, np.ndarray], checkpoint: Checkpoint
) -> tuple[dict[str, WeightSource], list[str]]:
    sources: dict[str, WeightSource] = {}
    reasons: list[str] = []
    for owner, weights in text.weights:
        layers = range(hyper["layers"]) if owner else (-1,)
        for i in layers:
            for weight in weights:
                key = f"{i}.{weight.name}" if owner else weight.name
                found = _source(weight, i, hyper, constants, checkpoint, sources)
                if isinstance(found, str):
                    reasons.append(found)
                else:
                    sources[key] = found
    return sources, reasons


def _source(
    weight: WeightText,
    layer: int,
    hyper: dict[str, Any],
    constants: dict[str, np.ndarray],
    checkpoint: Checkpoint,
    sources: dict[str, WeightSource],
) -> WeightSource | str:
    shape = tuple(int(evaluate_number(s, hyper)) for s in weight.shape)
    if weight.constant:
        return WeightSource(shape, "f32", constant=constants[weight.constant])
    if weight.otherwise and hyper["tied"] and weight.otherwise in sources:
        return sources[weight.otherwise]
    place = dict(weight.places).get(checkpoint.source, "").replace("{i}", str(layer))
    names = tuple(place.replace("{e}", str(e)) for e in range(shape[0])) if "{e}" in place else (place,)
    for name in names:
        reason = _misfit(checkpoint, weight.name, name, shape[1:] if "{e}" in place else shape)
        if reason:
            return reason
    formats = {checkpoint.tensors[name].format for name in names}
    if len(formats) > 1:
        return f"weight `{weight.name}`: expected experts of one format, got {', '.join(sorted(formats))}"
    changes = tuple((n, float(evaluate_number(v, hyper))) for n, v in weight.changes)
    if not hyper.get("qk_permuted"):
        changes = tuple(c for c in changes if c[0] != "unpermute")
    changes = tuple(c for c in changes if c != ("plus", 0.0))
    return WeightSource(shape, formats.pop() if len(shape) > 1 else "f32", names, changes)


def _misfit(checkpoint: Checkpoint, weight: str, name: str, shape: tuple[int, ...]) -> str:
    """Why a tensor cannot be a weight, or part of one; empty when it can. A vector may be stored in any shape, and a
    matrix of one row as a vector."""
    info = checkpoint.tensors.get(name)
    if info is None:
        return f"missing tensor `{name}` (weight `{weight}`, {list(shape)})"
    vector = len(shape) == 1 or shape[0] == 1
    if info.shape != shape and not (vector and prod(info.shape) == prod(shape)):
        return f"tensor `{name}`: expected shape {list(shape)}, got {list(info.shape)}"
    if info.format not in FORMATS:
        return f"tensor `{name}`: format `{info.format}` is not supported"
    return ""


def _unused(checkpoint: Checkpoint, sources: dict[str, WeightSource], reasons: list[str]) -> dict[str, str]:
    """Tensors no weight uses: known harmless ones, else a reason to refuse."""
    used = {name for s in sources.values() for name in s.tensors}
    ignored = dict(checkpoint.ignored)
    for name in checkpoint.tensors:
        if name in used:
            continue
        if name == "rope_freqs.weight" or name.endswith("rotary_emb.inv_freq"):
            ignored[name] = "rotary frequencies are computed from the configuration"
        elif checkpoint.hyper["tied"] and name in ("lm_head.weight", "output.weight"):
            ignored[name] = "the head is tied to the embedding"
        else:
            reasons.append(f"tensor `{name}` is used by no weight of family `{checkpoint.family}`")
    return ignored
