"""Speculation as a caller sees it: how it is asked for, and what came of it. The rules are in `ir/drafting.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..ir.errors import UsageError, nearest
from ..ir.limits import Limits
from .request import Request

WORDS = ("auto", "off", "ngram")


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


def parse_speculate(text: str) -> tuple[str, int | None]:
    """`off`, `auto`, `ngram` or `ngram:K` as a word and K; UsageError for anything else."""
    word, colon, number = text.partition(":")
    if word not in WORDS or (colon and word != "ngram"):
        raise UsageError(
            f"speculate: expected off, auto, ngram or ngram:K, got `{text}`", hint=nearest(word, WORDS)
        )
    if colon and not re.fullmatch(r"[1-9]\d{0,2}", number):
        raise UsageError(f"speculate: expected ngram:K with K from 1, got `{text}`")
    return word, int(number) if colon else None


def drafts_of(text: str, limits: Limits) -> int:
    """Drafts a step may have; `auto` and `ngram`: as many as were compiled in. UsageError if there are fewer."""
    word, wanted = parse_speculate(text)
    if word == "off" or (word == "auto" and not limits.drafts):
        return 0
    if not limits.drafts:
        raise UsageError(
            f"speculate: expected an artifact compiled with drafts, got one without for `{text}`",
            hint="compile it with `--speculate ngram:4`",
        )
    if wanted and wanted > limits.drafts:
        raise UsageError(
            f"speculate: expected at most ngram:{limits.drafts}, what was compiled, got `{text}`",
            hint=f"compile it with `--speculate {text}`",
        )
    return wanted or limits.drafts
