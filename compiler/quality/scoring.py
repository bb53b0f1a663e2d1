"""A loaded model's logits on the windows of a text, scored, and compared with those of a reference."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import HostError, UsageError, VerifyError
from ...runtime import Model
from .perplexity import Score, Tally, Window

Logits = NDArray[np.float32]
Progress = Callable[[str], None]


class ReferenceLogits:
    """The logits of the first model that is scored, in a file of `folder`: float32 [scored, vocab]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: Logits | None = None

    @property
    def written(self) -> bool:
        return self._rows is not None

    def make(self, rows: int, vocab: int) -> None:
        """HostError where the disk is too small."""
        needed, free = 4 * rows * vocab, shutil.disk_usage(self._folder).free
        if needed > free:
            raise HostError(
                f"eval: expected {needed / 1e9:.1f} GB for the reference's logits, got {free / 1e9:.1f} GB free",
                place=str(self._folder), hint="fewer `--chunks`, or another folder in $TMPDIR",
            )  # fmt: skip
        self._rows = np.memmap(self._folder / "logits.f32", np.float32, "w+", shape=(rows, vocab))

    def write(self, start: int, logits: Logits) -> None:
        assert self._rows is not None
        self._rows[start : start + len(logits)] = logits

    def read(self, start: int, count: int) -> Logits:
        assert self._rows is not None
        return self._rows[start : start + count]

    def expect_vocab(self, vocab: int, name: str) -> None:
        """UsageError for a model whose logits are of other tokens."""
        assert self._rows is not None
        had = self._rows.shape[1]
        if had != vocab:
            raise UsageError(f"--against: expected models of one vocabulary, got {had} tokens, and {vocab} of `{name}`")


def score_windows(
    model: Model, found: Sequence[Window], reference: ReferenceLogits | None, name: str, progress: Progress
) -> Score:
    """The score of a model; `reference`: what to compare with, or to fill if it is empty."""
    _expect_vocab(model, found, name)
    first = reference is not None and not reference.written
    if reference is not None and first:
        reference.make(sum(len(w.scored) for w in found), model.vocab)
    elif reference is not None:
        reference.expect_vocab(model.vocab, name)
    tally, at = Tally(), 0
    for i, window in enumerate(found):
        for part, logits in window_logits(model, window):
            if reference is not None and first:
                reference.write(at, logits)
            other = None if reference is None else reference.read(at, len(part))
            tally.add(logits, [window.tokens[p + 1] for p in part], other)
            at += len(part)
        progress(f"{name}: chunk {i + 1} of {len(found)}, perplexity {tally.score().perplexity:.4f}")
    return tally.score()


def _expect_vocab(model: Model, found: Sequence[Window], name: str) -> None:
    most = max(max(w.tokens) for w in found)
    if most >= model.vocab:
        raise UsageError(
            f"eval: expected models of one vocabulary, got token {most} for `{name}`, which has {model.vocab}"
        )


def window_logits(model: Model, window: Window) -> Iterator[tuple[range, Logits]]:
    """Positions and their logits [n, vocab], in order: prompts without, then as many rows as a step has logits for.

    VerifyError where they are not numbers.
    """
    model.reset()
    rows, outputs = model.limits.rows, min(model.limits.rows, model.limits.outputs)
    for start in range(0, window.first, rows):
        part = range(start, min(start + rows, window.first))
        model.step([window.tokens[i] for i in part], positions=part, outputs=[])
    for start in range(window.first, window.scored.stop, outputs):
        part = range(start, min(start + outputs, window.scored.stop))
        logits = model.step([window.tokens[i] for i in part], positions=part, outputs=range(len(part)))
        if not np.isfinite(logits).all():
            raise VerifyError(f"eval: expected logits that are numbers, got others at positions {part.start} and on")
        yield part, logits
    model.reset()
