"""Drafted tokens: how they are guessed and what makes checking them exact. Every target copies these rules.

A running slot's rows are its last token and up to k guesses of what follows. One step computes them all, and the
sampler chooses a token at each as if the guesses before it had been said. Commit goes down the rows while the token
chosen at one is the guess in the next: those are accepted; the first that differs is committed in its guess's place,
and what was computed behind it is ignored (its keys and values lie beyond the slot's length, until later rows at the
same positions replace them).

This is speculative sampling (Leviathan et al., 2023; Chen et al., 2023) with nothing lost:

- A guess g found by looking it up is a distribution q that is 1 at g. The rule there is to accept g with probability
  min(1, p(g) / q(g)) = p(g), else to draw from the positive part of p - q, normalised: p without g, divided by
  1 - p(g). Drawing x from p and accepting iff x = g does both: x = g has probability p(g), and given x != g, x has
  just that distribution. No coupling of p and q accepts more often than the sum of min(p, q), which is p(g).
- x is more than distributed as in plain decoding, it is the same token: the sampler is a function of the logits, the
  tokens seen, the seed, the stream and the position, and a row's logits do not depend on the other rows of its step.

Who guesses is settled when a step is compiled: the text so far (`look_up`), or a second model in the same step.
A model's guesses are greedy: its likeliest token after each. So q is 1 at g for it as well, all of the above holds
whatever model guesses, accepting iff x = g is the best coupling there is, and no distribution of the model is kept.
What that costs: a guess drawn from the model's q would hold with probability 1 - TV(p, q), the sum of min(p, q);
its likeliest token holds with p(g). Greedy text loses nothing; at high temperature, p flat and q like it, a draw
would hold more often. A repetition penalty is not applied to guesses, so with one they hold less often too.

A step with a draft model is the model's own and then k passes of the other over rows that commit and each pass write
(`vm/guess.py`). The first takes, of each slot of the step, the tokens that the draft model has not followed yet, prompt
tokens included, so its cache has what the other's has; the guess after the last of them is the first draft. Each later
pass takes one row, the draft before. What holds in the next step is then followed already, but for the last draft.

So stop tokens, limits and not-a-number logits end a slot exactly where plain decoding would, whatever is guessed.
One exception is made for damaged numbers: where a guess itself has no finite logits, its slot ends as one whose own
logits are not, since not-a-number in the cache poisons sums even where it is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 2, 4  # tokens of a run that is looked up
MATCH_BITS = 28  # compiled code ranks a place by one number: shared tokens << MATCH_BITS | place


def look_up(history: NDArray[np.int32] | Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens to follow `history`, a slot's tokens by position: all `count`, or none.

    They are what followed an earlier place where the tokens were as they are at the end: the place that shares the
    longest run, of SHORTEST to LONGEST tokens, and of those the last. A copy that gets to the end of the history
    goes on from its own beginning, as what repeats does.

    example: after 7 1 2 3 9 8 2 3, three tokens: 9 8 2 (what followed 2 3)
    """
    tokens = np.asarray(history)
    end = len(tokens) - 1  # the place that is compared with all before it
    shared = np.zeros(max(end, 0), np.int32)
    same = np.ones(max(end, 0), bool)
    for n in range(min(LONGEST, end)):
        same[n:] &= tokens[: end - n] == tokens[end - n]
        same[:n] = False
        shared += same
    if count < 1 or not (shared >= SHORTEST).any():
        return []
    place = int(np.flatnonzero(shared == shared.max())[-1])
    return [int(tokens[place + 1 + i % (end - place)]) for i in range(count)]


def adapted(drafts: int, guessed: int, held: int, most: int) -> int:
    """How many to guess next: twice as many if all held, else one more than held. No guess changes nothing.

    Measured on SmolLM2 (tests/bench/speculate.py): text that copies soon has `most`, prose one.
    """
    if not guessed:
        return drafts
    return min(most, 2 * drafts if held == guessed else held + 1)
