"""Speculation as a caller sees it: how it is asked for, and what came of it. The rules are in `ir/drafting.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..ir.errors import UsageError, nearest
from ..ir.limits import Limits
from .request import Request

WORDS = ("auto", "off", "ngram", "draft")
FORMS = "off, auto, ngram or ngram:K, draft or draft:PATH:K"
HOW = {"ngram": "ngram:4", "model": "draft:PATH:4"}


@dataclass(frozen=True)
class Speculation:
    """What guesses came to in one request: `steps` made the tokens after the first.

    drafted[n], accepted[n]: how often a step had an (n+1)-th guess, and how often that was right.
    """

    steps: int
    tokens_per_step: float
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @classmethod
    def of(cls, request: Request) -> Speculation | None:
        """None: the step was compiled without drafts, or the request had none."""
        if not request.drafts:
            return None
        steps = max(0, request.steps - 1)  # the first one read the prompt's last token
        rate = (len(request.tokens) - 1) / steps if steps else 0.0
        return cls(steps, rate, request.drafted, request.accepted)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of the n-th guesses that were right, those after a wrong one counted as wrong."""
        return tuple(a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True))

    def line(self) -> str:
        """For people to read."""
        shares = ", ".join(
            f"{share:.0%} of {count}" for share, count in zip(self.acceptance, self.drafted, strict=True)
        )
        return f"speculation: {self.tokens_per_step:.2f} tokens per step; accepted by position {shares}"


@dataclass(frozen=True)
class Wish:
    """How speculation is asked for. most: drafts of a step, None: as many as there may be; model: who drafts."""

    word: str
    most: int | None = None
    model: str = ""

    @property
    def drafter(self) -> str:
        """As `Limits.drafter` names it."""
        return "model" if self.word == "draft" else "ngram"


def parse_speculate(text: str) -> Wish:
    """`off`, `auto`, `ngram`, `ngram:K`, or `draft`, `draft:K` and, to compile, `draft:PATH` and `draft:PATH:K`.

    UsageError for anything else.
    """
    word, colon, rest = text.partition(":")
    if word not in WORDS or (colon and word in ("auto", "off")):
        raise UsageError(f"speculate: expected {FORMS}, got `{text}`", hint=nearest(word, WORDS))
    path, _, last = rest.rpartition(":")
    if re.fullmatch(r"[1-9]\d{0,2}", last) and (word == "draft" or not path):
        return Wish(word, int(last), path)
    if not colon:
        return Wish(word)
    if word == "ngram" or not rest or re.fullmatch(r"\d*", last):
        raise UsageError(f"speculate: expected {word}:{'PATH:' * (word == 'draft')}K with K from 1, got `{text}`")
    return Wish(word, None, rest)


def drafts_of(text: str, limits: Limits) -> int:
    """Drafts a step may have; `auto` and a word alone: as many as were compiled in. UsageError if there are fewer."""
    wish = parse_speculate(text)
    if wish.word == "off" or (wish.word == "auto" and not limits.drafts):
        return 0
    if not limits.drafts:
        raise UsageError(
            f"speculate: expected an artifact compiled with drafts, got one without for `{text}`",
            hint=f"compile it with `--speculate {HOW[wish.drafter]}`",
        )
    word = "draft" if limits.has_draft_model else "ngram"
    if wish.word not in ("auto", word) or wish.model:
        raise UsageError(
            f"speculate: expected {word} or {word}:K, what was compiled, got `{text}`",
            hint=f"compile it with `--speculate {text if wish.model else HOW[wish.drafter]}`",
        )
    if wish.most and wish.most > limits.drafts:
        raise UsageError(
            f"speculate: expected at most {word}:{limits.drafts}, what was compiled, got `{text}`",
            hint=f"compile it with `--speculate {text.replace('draft:', 'draft:PATH:')}`",
        )
    return wish.most or limits.drafts
