"""Texts that a user gives as files, and the tokenizer of a checkpoint that is not compiled."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ...ir.errors import LoadError, UsageError
from ...models.checkpoint import Checkpoint
from ...runtime.tokenizer import Tokenizer


def read_text(path: Path, option: str) -> str:
    """A text file's contents, line ends as they are. UsageError if it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{option}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}",
            place=str(path), hint="`iconv -t utf-8` converts other encodings",
        ) from error  # fmt: skip
    except OSError as error:
        raise UsageError(f"{option}: expected a text file: {error.strerror}", place=str(path)) from error
    if not text.strip():
        raise UsageError(f"{option}: expected text, got an empty file", place=str(path))
    return text


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """LoadError if the checkpoint has none."""
    if checkpoint.tokenizer is None:
        raise LoadError("expected a checkpoint with a tokenizer, got one without", place=str(checkpoint.path))
    with tempfile.TemporaryDirectory(prefix="onelaunch-") as folder:
        checkpoint.tokenizer().write(Path(folder))
        return Tokenizer.load(folder)
