"""One sequence to continue, and what has become of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.limits import PAGE_TOKENS
from ..ir.sampling import Sampling
from .prefix import page_key

FINISH = {1: "stop", 2: "length", 3: "invalid"}  # slot_finished; invalid: the logits were not finite


@dataclass(eq=False)
class Request:
    """One sequence to continue. `tokens`, with the stop token, grows while it runs; `finish` says why it ended.

    Times are `time.perf_counter` seconds, 0 = not yet.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    drafts: int = 0  # guesses a step may have, of a step compiled to have any

    tokens: list[int] = field(default_factory=list)
    finish: str = ""  # stop, length, invalid or cancelled; "" until then
    slot: int = -1  # while it runs
    done: int = 0  # prompt tokens computed, here or by an earlier request
    reused: int = 0  # of them, those in the cache when it started
    kept: int = 0  # pages the cache was told of
    steps: int = 0  # that committed tokens; it and the next two are counted where there are drafts
    drafted: tuple[int, ...] = ()  # how often a step had an n-th guess
    accepted: tuple[int, ...] = ()  # how often that was right
    submitted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    _keys: list[bytes] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Positions it may fill: the last token it makes is never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def unread(self) -> int:
        return len(self.prompt) - self.done

    @property
    def computed(self) -> int:
        """Positions whose keys and values are in the cache: all but the last token's."""
        return len(self.prompt) + len(self.tokens) - 1 if self.tokens else self.done

    def keys(self, count: int) -> list[bytes]:
        """Its first `count` pages of tokens."""
        read = len(self.prompt)
        for start in range(len(self._keys) * PAGE_TOKENS, count * PAGE_TOKENS, PAGE_TOKENS):
            end = start + PAGE_TOKENS
            page = [*self.prompt[start:end], *self.tokens[max(0, start - read) : max(0, end - read)]]
            self._keys.append(page_key(page))
        return self._keys[:count]

    def reusable(self) -> list[bytes]:
        """The pages it need not compute: whole ones, without the last token's."""
        return self.keys((len(self.prompt) - 1) // PAGE_TOKENS)
