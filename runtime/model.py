"""A loaded model: text or tokens in, text, tokens or logits out.

    with load("model.ola") as model:
        print(model.generate("The sky is", max_new_tokens=20).text)
        for piece in model.stream("Why?", chat=True, temperature=0.7, seed=1):
            print(piece, end="")

Prompts given together, and streams read in turns, share steps. A request's text depends on its prompt, its
settings and its stream number alone, never on what runs beside it.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import UsageError
from ..ir.types import seen_tokens
from .backend import Backend, StepFault
from .cache import Cache
from .direct import DirectRows
from .generation import Generation, TextOutput
from .manifest import Manifest
from .request import Request
from .routing import RoutingTrace
from .rows import RowScheduler
from .settings import Message, Prompt, Settings, encode, split_prompts

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

BURST = 16  # steps between two looks at the tokens, where nobody waits for text


class Model:
    """Made by `load`. Safe to call from several threads: they take turns, and requests share steps."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        kv_pages: Sequence[int],
        read_tokenizer: Callable[[], Tokenizer | None] = lambda: None,
        *,
        target: str = "",
        threads: int = 1,
        segments: str = "mega",
        prefix_cache: bool = True,
        drafts: int = 0,
    ) -> None:
        self.manifest, self.target, self.threads, self.segments = manifest, target, threads, segments
        self.name, self.limits, self.vocab = manifest.name, manifest.limits, manifest.vocab
        self._backend, self._read_tokenizer = backend, read_tokenizer
        self.drafts = drafts  # guesses a step may have
        self._cache = Cache(manifest.caches, kv_pages, backend.state.pages, self.limits.context, prefix_cache)
        self._scheduler = RowScheduler(backend, self.limits, self._cache, self.vocab)
        self._direct = DirectRows(backend, self.limits, self._cache, manifest.caches, self.vocab)
        self._lock = threading.RLock()
        self._closed = False
        self._fault: StepFault | None = None
        self._trace: RoutingTrace | None = None
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_read = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Read at first use: models driven by token ids never pay for it. None: the artifact has none."""
        with self._lock:
            if not self._tokenizer_read:
                self._tokenizer, self._tokenizer_read = self._read_tokenizer(), True
            return self._tokenizer

    @overload
    def generate(self, prompt: str | Sequence[int] | Sequence[Message], **options: Any) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]] | list[list[Message]], **options: Any
    ) -> list[Generation]: ...

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt (text, token ids or chat messages), or each of several; `options` are `Settings`.

        Returns a Generation, or a list of them for a list of prompts. UsageError if one cannot run as asked.
        """
        settings = Settings.of(options)
        many, prompts = split_prompts(prompt)
        outputs = [self._output(p, settings, i) for i, p in enumerate(prompts)]
        requests = [output.request for output in outputs]
        try:
            self._submit(requests)
            while not all([self._pump(output)[1] for output in outputs]):
                self._advance(1 if settings.stops else BURST)
        finally:
            self._cancel(requests)
        results = [output.result() for output in outputs]
        return results if many else results[0]

    def stream(self, prompt: Prompt, **options: Any) -> TextStream:
        """Text of one prompt as it comes, as an iterator of non-empty pieces; `options` are `Settings`.

        The request starts with the first piece asked for and is cancelled when the stream is closed.
        """
        many, prompts = split_prompts(prompt)
        if many:
            raise UsageError("stream: expected one prompt, got a list", hint="use one stream per prompt")
        return TextStream(self, self._output(prompts[0], Settings.of(options), 0))

    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Compute exactly these rows; logits float32 [n_outputs, vocab]. For tests and research.

        Defaults: slot 0, positions from 0, the last row as the only output. What was computed stays cached
        until `reset` or the next `generate`; a position may be at most one past what its slot holds.
        """
        slots = [0] * len(tokens) if slots is None else slots
        positions = range(len(tokens)) if positions is None else positions
        outputs = [len(tokens) - 1] if outputs is None else outputs
        lists = [[operator.index(x) for x in values] for values in (tokens, slots, positions, outputs)]
        return self._directly(lambda direct: direct.step(*lists))

    def reset(self) -> None:
        """Forget what `step` and the benchmarks cached."""
        self._directly(lambda direct: direct.release())

    def bench_decode(self, n: int, depth: int, slots: int = 1, rows: int = 1) -> list[float]:
        """Seconds of each of `n` steps of `rows` tokens of each of `slots` slots, from `depth` cached tokens on."""
        return self._directly(lambda direct: direct.bench_decode(n, depth, slots, rows))

    def bench_prefill(self, n: int) -> float:
        """Seconds to read a prompt of `n` tokens, up to its first generated token."""
        return self._directly(lambda direct: direct.bench_prefill(n))

    def bytes_per_token(self, depth: int) -> float:
        """Bytes a decode step of one row must read: all active weights, and K and V of what the row sees."""
        seen = [seen_tokens(depth, group.window, group.sinks) for group in self.manifest.caches]
        kv = sum(group.token_bytes() * n for group, n in zip(self.manifest.caches, seen, strict=True))
        return float(self.manifest.traffic["weights_per_step"]) + kv

    def trace_routing(self, path: str | Path) -> None:
        """Write which experts every step from now on uses, until the model is closed (routing.py: the format)."""
        with self._lock:
            self._ready()
            if not hasattr(self._backend.state, "routing"):
                raise UsageError(f"trace_routing: expected a mixture of experts, got `{self.manifest.family}`")
            experts = int(self.manifest.raw["hyper"]["experts"])
            self._trace = RoutingTrace(Path(path), self.name, experts, self._backend.state)
            self._backend.observer = self._trace.step

    def read_gbps(self) -> float:
        """What a plain read of the weights reaches with the same workers, GB/s: a decode step's limit."""
        with self._lock:
            self._ready()
            return self._backend.read_gbps()

    def close(self) -> None:
        """Stop the workers and give the memory back; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                if self._trace is not None:
                    self._trace.close()
                self._backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<onelaunch.Model {self.name}: {self.target}, {self.threads} threads>"

    def _ready(self) -> None:
        if self._closed:
            raise UsageError("model: expected an open one, got a closed one")
        if self._fault:
            raise self._fault

    def _directly(self, use: Callable[[DirectRows], Any]) -> Any:
        with self._lock:
            self._ready()
            if not self._scheduler.idle:
                raise UsageError(
                    "model: expected no running requests, got some", hint="close the streams first"
                )
            try:
                return use(self._direct)
            except BaseException as error:
                self._note(error)
                if not isinstance(error, UsageError):
                    self._direct.release()  # an interrupt leaves rows and lengths half written
                raise

    def _note(self, error: BaseException) -> None:
        if isinstance(error, StepFault):
            self._fault = error

    def _submit(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._ready()
            if self._scheduler.idle:
                self._direct.release()
            for request in requests:
                self._scheduler.submit(request)

    def _advance(self, burst: int) -> None:
        with self._lock:
            self._ready()
            try:
                self._scheduler.step(burst)
            except StepFault as error:
                self._note(error)
                raise

    def _pump(self, output: TextOutput) -> tuple[str, bool]:
        """New text, and whether that was all. A request that met its stop string is ended here."""
        piece = output.pump()
        if output.ended:
            self._cancel([output.request])
        return piece, output.ended

    def _cancel(self, requests: Sequence[Request]) -> None:
        with self._lock:
            if not self._closed:
                self._scheduler.cancel(requests)

    def _output(self, prompt: Prompt, settings: Settings, index: int) -> TextOutput:
        """A request that is checked but not yet submitted, and its text."""
        self._ready()
        tokenizer = self.tokenizer
        ids = encode(prompt, tokenizer, settings.chat)
        room = self._cache.capacity - len(ids) + 1
        wanted = max(1, room) if settings.max_new_tokens is None else settings.max_new_tokens
        if settings.stops and tokenizer is None:
            raise UsageError("stop: expected a model with a tokenizer, got none", hint="use `stop_tokens`")
        stop_tokens = settings.stop_tokens
        if stop_tokens is None:
            stop_tokens = tokenizer.eos if tokenizer else ()
        request = Request(ids, wanted, settings.sampling(index), tuple(map(int, stop_tokens)), self.drafts)
        self._scheduler.check(request)
        return TextOutput(request, tokenizer, settings.stops)


class TextStream(Iterator[str]):
    """Iterator of text pieces; `result` is the Generation once it ended. Closing it cancels the request."""

    def __init__(self, model: Model, output: TextOutput) -> None:
        self._model, self._output = model, output
        self._started = self._over = False

    def __next__(self) -> str:
        if self._over:
            raise StopIteration
        try:
            if not self._started:
                self._model._submit([self._output.request])
                self._started = True
            while True:
                piece, ended = self._model._pump(self._output)
                self._over = ended
                if piece:
                    return piece
                if ended:
                    raise StopIteration
                self._model._advance(1)
        except BaseException:
            self.close()
            raise

    @property
    def result(self) -> Generation:
        if not self._output.ended:
            raise UsageError("stream: expected one read to its end, got a running one")
        return self._output.result()

    def close(self) -> None:
        """End the request now; its slot and pages are free at once."""
        self._over = True
        if self._started:
            self._model._cancel([self._output.request])

    def __del__(self) -> None:
        self.close()
