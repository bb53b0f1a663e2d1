"""From a path to a Checkpoint: which reader it is for.

A directory with config.json alone, no weights, opens where only shapes are needed (`onelaunch compile
--no-weights`).
"""

from __future__ import annotations

from pathlib import Path

from ..ir.errors import LoadError
from .checkpoint import Checkpoint
from .gguf import open_gguf
from .hf import open_hf
from .shapes import open_shapes


def open_checkpoint(
    path: str | Path, ignore: frozenset[str] = frozenset(), *, shapes_only: bool = False
) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory, a directory with one GGUF, or a file inside one of these.

    `ignore`: config fields to pass over although we do not know them (`--ignore-config`). `shapes_only`: a
    directory without weights is fine; reading a tensor of it is a LoadError.
    """
    place = Path(path)
    try:
        if place.is_file() and place.suffix == ".safetensors" and not _is_gguf(place):
            place = place.parent
        if not place.is_dir():
            return open_gguf(_expect_gguf(place), ignore)
        if (place / "config.json").is_file() and (any(place.glob("*.safetensors")) or not _ggufs(place)):
            has_weights = any(place.glob("*.safetensors")) or not shapes_only
            return open_hf(place, ignore) if has_weights else open_shapes(place, ignore)
        return open_gguf(_only_gguf(place), ignore)
    except OSError as error:
        raise LoadError(f"cannot read the checkpoint: {error.strerror or error}", place=str(path)) from error


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _expect_gguf(path: Path) -> Path:
    if not path.exists():
        raise LoadError(
            "expected a checkpoint, got a path that does not exist",
            place=str(path),
            hint="give a .gguf file or a Hugging Face directory",
        )
    if not path.is_file():
        raise LoadError("expected a regular file or a directory", place=str(path))
    if not _is_gguf(path):
        raise LoadError(
            "expected the magic `GGUF` at the start of the file, got something else",
            place=str(path),
            hint="give a .gguf file, or a directory with config.json and *.safetensors",
        )
    return path


def _ggufs(path: Path) -> list[Path]:
    return sorted(path.glob("*.gguf"))


def _only_gguf(path: Path) -> Path:
    found = _ggufs(path)
    if len(found) == 1:
        return _expect_gguf(found[0])
    if not found:
        raise LoadError(
            "expected config.json with *.safetensors, or one .gguf file, got neither",
            place=str(path),
            hint="a checkpoint directory holds config.json beside its weights",
        )
    names = ", ".join(f"`{p.name}`" for p in found)
    raise LoadError(
        f"expected one .gguf file, got {len(found)}: {names}", place=str(path), hint="name the file itself"
    )
