"""Perplexity, and how far a model's next tokens are from another's: the rule, and the arithmetic.

The rule is that of llama.cpp's `llama-perplexity`, so that figures compare: the text is one sequence of tokens, begin
token first where the model wants one; it is cut into windows of `size` tokens that do not overlap, what is left over is
dropped; where the model wants a begin token each window's first token is replaced by it; of each window the
predictions of the tokens behind its middle are scored, those at positions size/2 .. size-2. So every scored token has
at least half a window before it. Perplexity is exp of the mean of -log p(token), natural logarithms.

With a stride the windows overlap: each starts `stride` tokens behind the last and scores its last `stride` tokens, the
first one all but its first. Every token is scored once, with more before it, for `size / stride` times the work.

The divergence is that of Kullback and Leibler, of the reference P to the model Q: sum of P (log P - log Q) over all
tokens, in nats, the mean over the scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ...ir.errors import UsageError

Floats = NDArray[np.float64]
ROWS = 64  # rows of logits at a time in float64, to bound the temporaries


@dataclass(frozen=True)
class Window:
    """Tokens of one sequence; the predictions at positions first .. len-2, of the tokens behind them, are scored."""

    tokens: list[int]
    first: int

    @property
    def scored(self) -> range:
        return range(self.first, len(self.tokens) - 1)

    @property
    def targets(self) -> list[int]:
        return self.tokens[self.first + 1 :]


def windows(tokens: Sequence[int], size: int, stride: int = 0, bos: int = -1) -> list[Window]:
    """Cut a text by the rule above; stride 0: llama.cpp's. bos: the begin token, -1: the model wants none.

    UsageError where there is not one window, or the sizes make no sense.
    """
    if size < 4:
        raise UsageError(f"--chunk: expected at least 4 tokens, got {size}")
    if not 0 <= stride < size:
        raise UsageError(f"--stride: expected 1 to {size - 1}, less than the chunk of {size}, got {stride}")
    if len(tokens) < size:
        raise UsageError(
            f"--text: expected at least {size} tokens, one chunk, got {len(tokens)}",
            hint=f"give a longer text, or `--chunk {max(4, len(tokens) // 2)}`",
        )
    found = []
    for start in range(0, len(tokens) - size + 1, stride or size):
        piece = list(tokens[start : start + size])
        if bos >= 0:
            piece[0] = bos
        first = size // 2 if not stride else size - 1 - stride if start else 0
        found.append(Window(piece, first))
    return found


def log_softmax(logits: NDArray[np.float32]) -> torch.Tensor:
    """Log probabilities in float64, [rows, vocab]."""
    return torch.log_softmax(torch.from_numpy(np.ascontiguousarray(logits)).double(), dim=-1)


@dataclass(frozen=True)
class Score:
    """Of all scored tokens; `error`: one standard error of the perplexity. None: there was no reference.

    kl: mean nats, kl_99: what 99 of 100 tokens stay below; same_top: how often both find the same token likeliest.
    """

    tokens: int
    perplexity: float
    error: float
    kl: float | None
    kl_99: float | None
    same_top: float | None


@dataclass
class Tally:
    """Adds up rows of logits, piece by piece."""

    losses: list[Floats] = field(default_factory=list)
    divergences: list[Floats] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(
        self,
        logits: NDArray[np.float32],
        targets: Sequence[int],
        reference: NDArray[np.float32] | None = None,
    ) -> None:
        """Logits [n, vocab] of the predictions of `targets` [n], and the reference's [n, vocab]."""
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            q, wanted = log_softmax(logits[rows]), torch.tensor(targets[rows])
            self.losses.append(-q[torch.arange(len(wanted)), wanted].numpy())
            if reference is None:
                continue
            p = log_softmax(reference[rows])
            terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)  # 0 log 0 is 0
            self.divergences.append(terms.sum(dim=-1).numpy())
            self.same.append((p.argmax(dim=-1) == q.argmax(dim=-1)).numpy())

    def score(self) -> Score:
        losses = np.concatenate(self.losses)
        perplexity = float(np.exp(losses.mean()))
        spread = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else 0.0
        if not self.divergences:
            return Score(len(losses), perplexity, perplexity * spread, None, None, None)
        kl = np.concatenate(self.divergences)
        same = float(np.concatenate(self.same).mean())
        return Score(len(losses), perplexity, perplexity * spread, float(kl.mean()), float(np.quantile(kl, 0.99)), same)
