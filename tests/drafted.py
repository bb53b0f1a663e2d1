"""Tiny programs with a second model in them that drafts."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import LIMITS, Tiny, tiny

from onelaunch.models.drafter import as_drafter, joint_key

DRAFTING = replace(LIMITS, rows=16, outputs=8, few_rows=6, drafts=3, drafter="model")


def drafted(target: Tiny, draft: Tiny, passes: int = DRAFTING.drafts) -> Tiny:
    """`target` with `draft` guessing for it."""
    program = replace(target.program, drafter=as_drafter(draft.program), passes=passes)
    first = len(target.program.layers)
    made = Tiny(program.verify(), target.formats, target.seed)
    made.__dict__["weights"] = target.weights | {joint_key(key, first): value for key, value in draft.weights.items()}
    return made


def opposite(model: Tiny) -> Tiny:
    """The same model but for its logits, which are negative: it never says what `model` does."""
    turned = Tiny(model.program, model.formats, model.seed)
    weights = dict(model.weights)
    weights["norm"] = -weights["norm"]
    turned.__dict__["weights"] = weights
    return turned


def likeness(model: Tiny, seed: int = 1) -> Tiny:
    """A model that says what `model` does about as often as not."""
    near = Tiny(model.program, model.formats, model.seed)
    random = torch.Generator().manual_seed(seed)
    near.__dict__["weights"] = {
        key: value + (0.15 * value.std() * torch.randn(value.shape, generator=random) if value.ndim > 1 else 0)
        for key, value in model.weights.items()
    }
    return near


__all__ = ["DRAFTING", "drafted", "likeness", "opposite", "tiny"]
