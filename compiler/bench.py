"""Speeds of a loaded model, each beside the read bandwidth of the same threads at the same time.

A decode step reads every weight once, so what it reaches is a fraction of a plain read of the same memory.
Bandwidth of a shared machine drifts: it is read just before and just after each measurement, and the
fraction is the median over rounds of those pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from ..ir.errors import UsageError
from ..runtime import Generation, Model
from ..runtime.direct import fixed_tokens

DEPTHS = (0, 2048)


def measure(
    model: Model,
    prompt_tokens: int,
    tokens: int,
    depths: Sequence[int] | None,
    rows: int,
    rounds: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One entry per test: `pp512` reads a prompt, `tg64 @ d2048` generates from 2048 cached tokens on.

    With drafts also `copy64`, the text after a prompt that repeats itself.
    """
    context = model.limits.context
    chosen = [d for d in DEPTHS if d + tokens <= context] if depths is None else list(depths)
    if not chosen:
        raise UsageError(f"--tokens: expected at most {context}, the compiled context, got {tokens}")
    found = []
    prompt = min(prompt_tokens, context) if depths is None else prompt_tokens
    if prompt:
        progress(f"pp{prompt}, {model.threads} threads")
        model.bench_prefill(prompt)
        found.append(_prefill(model, prompt, rounds))
    for depth in chosen:
        progress(f"tg{tokens} @ d{depth}, {model.threads} threads")
        model.bench_decode(min(4, tokens), depth, rows)  # fills the cache up to the depth, and warms up
        found.append(_decode(model, tokens, depth, rows, rounds))
    model.reset()
    if model.drafts:
        progress(f"copy{tokens}, {model.threads} threads")
        found.append(_copy(model, tokens, rounds))
    return found


def _rounds(model: Model, rounds: int, run: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds of each round, and the mean of the bandwidths read before and after it."""
    seconds, bandwidths = [], []
    before = model.read_gbps()
    for _ in range(rounds):
        seconds.append(run())
        after = model.read_gbps()
        bandwidths.append((before + after) / 2)
        before = after
    return seconds, bandwidths


def _prefill(model: Model, count: int, rounds: int) -> dict[str, Any]:
    seconds, bandwidths = _rounds(model, rounds, lambda: model.bench_prefill(count))
    return _entry(model, f"pp{count}", [count / s for s in seconds], bandwidths)


def _decode(model: Model, tokens: int, depth: int, rows: int, rounds: int) -> dict[str, Any]:
    seconds, bandwidths = _rounds(model, rounds, lambda: sum(model.bench_decode(tokens, depth, rows)))
    weights = float(model.manifest.traffic["weights_per_step"])
    cache = mean(model.bytes_per_token(depth + i) for i in (0, tokens - 1)) - weights
    per_step = weights + rows * cache
    name = f"tg{tokens} @ d{depth}" + (f" x {rows} rows" if rows > 1 else "")
    entry = _entry(model, name, [rows * tokens / s for s in seconds], bandwidths)
    reached = [per_step * tokens / s * 1e-9 for s in seconds]
    entry |= {
        "bytes_per_token": per_step / rows,
        "gbps": median(reached),
        "fraction": median(g / b for g, b in zip(reached, bandwidths, strict=True)),
    }
    return entry


def _copy(model: Model, tokens: int, rounds: int) -> dict[str, Any]:
    """Text after a prompt that repeats itself, with guesses: what they bring depends on what the model says."""
    tokens = max(tokens, 2)
    prompt = (fixed_tokens(0, 48, model.vocab) * 4)[: max(1, model.limits.context - tokens)]
    results: list[Generation] = []

    def run() -> float:
        results.append(model.generate(prompt, max_new_tokens=tokens, stop_tokens=[]))
        return results[-1].timings.decode

    run()  # warms up
    seconds, bandwidths = _rounds(model, rounds, run)
    found = results[-1].speculation
    assert found is not None
    name = f"copy{tokens}, {found.tokens_per_step:.2f} tokens per step"
    entry = _entry(model, name, [(tokens - 1) / s for s in seconds], bandwidths)
    return entry | {"tokens_per_step": found.tokens_per_step, "acceptance": list(found.acceptance)}


def _entry(model: Model, test: str, rates: list[float], bandwidths: list[float]) -> dict[str, Any]:
    return {
        "model": model.name,
        "target": model.target,
        "threads": model.threads,
        "segments": model.segments,
        "test": test,
        "rounds": len(rates),
        "tokens_per_second": median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "bytes_per_token": None,
        "gbps": None,
        "read_gbps": median(bandwidths),
        "fraction": None,
    }
