"""From committed tokens to text: incremental, with stop strings cut exactly, whatever the pieces were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.errors import VerifyError
from .rows import Request

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Timings:
    """Seconds: waiting for a slot, from there to the first token, from there to the last."""

    queue: float
    prompt: float
    decode: float
    prompt_per_second: float  # prompt tokens that were computed
    decode_per_second: float  # tokens after the first one


@dataclass(frozen=True)
class Generation:
    """What one prompt was continued with. `tokens` includes a stop token; `text` ends before what stopped it.

    finish_reason: "stop" (a stop token or string) or "length". reused_tokens: of the prompt's tokens, how many were
    in the cache already and not computed.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    timings: Timings
    reused_tokens: int = 0


class StopStrings:
    """Passes text on up to the first stop string, holding back what may still become one.

    The first is the one that is complete first (of those, the longest): how text is cut into pieces changes
    nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """The text that is now certain."""
        if self.matched or not piece:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.matched, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextOutput:
    """The text of one running request. `pump` returns what is new; `ended` is set once there is no more."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self.request = request
        self.ended = False
        self._detokenizer = tokenizer.stream(request.prompt) if tokenizer else None
        self._stops = StopStrings(stops)
        self._used = 0  # tokens looked at: with bursts, a request may have run past its stop string
        self._text: list[str] = []

    def pump(self) -> str:
        """New text; VerifyError if the logits were not finite."""
        request, pieces = self.request, []
        while self._used < len(request.tokens) and not self._stops.matched:
            token = request.tokens[self._used]
            self._used += 1
            if self._detokenizer and token not in request.stop_tokens:
                pieces.append(self._stops.push(self._detokenizer.push(token)))
        if request.finish and not self.ended and not self._stops.matched:
            if request.finish == "invalid":
                raise VerifyError(
                    f"logits: expected numbers, got not-a-number after token {len(request.tokens)}",
                    hint="the weights or the prompt overflow this model's number format; "
                    "`onelaunch verify` finds the layer",
                )
            if self._detokenizer:
                pieces.append(self._stops.push(self._detokenizer.finish()))
            pieces.append(self._stops.finish())
        self.ended = bool(request.finish) or self._stops.matched
        text = "".join(pieces)
        self._text.append(text)
        return text

    def result(self) -> Generation:
        """Everything, once `ended`."""
        r = self.request
        count = self._used
        queue, prompt = r.started - r.submitted, r.first_token - r.started
        decode = max(0.0, r.ended - r.first_token)
        return Generation(
            text="".join(self._text),
            tokens=r.tokens[:count],
            finish_reason="stop" if self._stops.matched else r.finish,
            prompt_tokens=len(r.prompt),
            timings=Timings(
                queue,
                prompt,
                decode,
                _rate(len(r.prompt) - r.reused, prompt),
                _rate(len(r.tokens) - 1, decode),
            ),
            reused_tokens=r.reused,
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0
