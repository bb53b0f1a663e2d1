"""From what the user names to an artifact that runs: names are fetched, models are compiled once and kept.

The cache is keyed by content: every byte of the model, of the compiler, and every option. Two processes that
want the same artifact wait for one of them to make it; it appears under its name at once or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..ir.errors import CompileError, LoadError, UsageError, nearest
from ..ir.limits import DRAFTS, Limits, decode_rows
from ..models.fetch import SOURCES, fetch
from .build import host_level

if TYPE_CHECKING:
    from ..runtime import Model

Progress = Callable[[str, float, str], None]
PACKAGE = Path(__file__).parent.parent
COMPILER = ("ir", "models", "passes", "codegen", "compiler")
MODEL_FILES = (".gguf", ".safetensors", ".json", ".jinja", ".model", ".txt")


def cache_folder() -> Path:
    """Where compiled models are kept."""
    base = os.environ.get("ONELAUNCH_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "onelaunch" / "artifacts"


def find_model(name: str) -> Path:
    """The path of a checkpoint or artifact: as given, or fetched if it is the name of one we know."""
    path = Path(name)
    if path.exists():
        return path
    if name in SOURCES:
        return fetch(name)
    hint = nearest(name, SOURCES) or f"give a .gguf file, a Hugging Face folder, or one of {', '.join(SOURCES)}"
    raise LoadError("expected a model, got a path that does not exist", place=name, hint=hint)


def is_artifact(path: Path) -> bool:
    return path.suffix == ".ola" or (path / "manifest.json").is_file()


def find_artifact(name: str, command: str) -> Path:
    """The path of an artifact, refusing a model that is not compiled."""
    path = find_model(name)
    if not is_artifact(path):
        hint = f"`onelaunch compile {name}` makes one"
        raise UsageError(f"{command}: expected an artifact, got a model that is not compiled", place=name, hint=hint)
    return path


def open_model(
    name: str,
    progress: Progress,
    *,
    threads: int | None = None,
    context: int | None = None,
    device: str = "auto",
    segments: str = "mega",
    prefix_cache: bool = True,
    speculate: str = "auto",
    all_slots: bool = False,
) -> Model:
    """Load an artifact, or the one compiled from a model now or earlier. One sequence's cache unless `all_slots`."""
    path = find_model(name)
    how = {"threads": threads, "device": device, "segments": segments, "prefix_cache": prefix_cache,
           "speculate": speculate}  # fmt: skip
    if is_artifact(path):
        return _load(path, all_slots, how)
    if device == "cuda":
        raise UsageError(
            "--device cuda: expected an artifact with a GPU target, got a model that is not compiled",
            place=name,
            hint=f"`onelaunch compile {name} --target sm_90` makes one, for sm_90 or what the device is",
        )
    limits, draft = _limits(context, speculate), draft_model(speculate)
    if draft is not None:
        how["speculate"] = f"draft:{limits.drafts}"
    cached = compiled(path, progress, limits, context is None, threads, draft)
    try:
        return _load(cached, all_slots, how)
    except LoadError:
        # What a crash or a full disk left is ours to repair: the model is still there.
        shutil.rmtree(cached, ignore_errors=True)
        return _load(compiled(path, progress, limits, context is None, threads, draft), all_slots, how)


def _limits(context: int | None, speculate: str) -> Limits:
    """With as many drafts as are asked for, or the usual ones."""
    from ..runtime.speculate import parse_speculate

    wish = parse_speculate(speculate)
    drafts = wish.most or DRAFTS if wish.model else max(wish.most or 0, DRAFTS)
    outputs = max(Limits.outputs, decode_rows(Limits.slots, Limits.few_rows, drafts))
    drafting: dict[str, Any] = {"drafts": drafts, "drafter": wish.drafter}
    try:
        return Limits(context=context or Limits.context, outputs=outputs, **drafting)
    except CompileError as error:
        raise UsageError(error.reasons, hint=error.hint) from error


def draft_model(speculate: str) -> Path | None:
    """The checkpoint of the model that is to draft; None: no model is."""
    from ..runtime.speculate import HOW, parse_speculate

    wish = parse_speculate(speculate)
    if wish.word != "draft":
        return None
    if not wish.model:
        raise UsageError(f"speculate: expected {HOW['model']}, the model that drafts, got `{speculate}`")
    path = find_model(wish.model)
    if is_artifact(path):
        hint = "give the checkpoint that it was compiled from"
        raise UsageError("speculate: expected a checkpoint to draft, got an artifact", place=str(path), hint=hint)
    return path


def _load(path: Path, all_slots: bool, how: dict[str, Any]) -> Model:
    from ..runtime import Artifact, load

    context = Artifact.open(path).manifest.limits.context
    return load(path, kv_tokens=None if all_slots else max(64, context), **how)


def compiled(
    model: Path,
    progress: Progress,
    limits: Limits,
    fit: bool,
    threads: int | None = None,
    draft: Path | None = None,
) -> Path:
    """The cached artifact of a model, compiled if it is not there; `fit`: no more context than it was trained for."""
    from filelock import FileLock

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    factors = {
        "onelaunch": __version__,
        "compiler": compiler_digest(),
        "model": model_digest(model, folder),
        "draft": model_digest(draft, folder) if draft else "",
        "target": host_level().name,
        "limits": limits.as_dict(),
        "fit_context": fit,
        "threads": threads,
        "tuned": tuned_before(model.name),
        "cores": os.cpu_count(),
    }
    key = hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()[:20]
    output = folder / f"{model.name.removesuffix('.gguf')}-{key}"
    if (output / "manifest.json").is_file():
        return output
    with FileLock(folder / f"{key}.lock"):
        if not (output / "manifest.json").is_file():
            _compile(model, output, limits, fit, threads, draft, progress)
            output.with_name(output.name + ".key.json").write_text(json.dumps(factors, indent=1) + "\n")
    return output


def _compile(
    model: Path,
    output: Path,
    limits: Limits,
    fit: bool,
    threads: int | None,
    draft: Path | None,
    progress: Progress,
) -> None:
    from .driver import DEFAULT_WORKERS, Request, compile_model

    workers = (*DEFAULT_WORKERS, os.cpu_count() or 1, threads) if threads else ()
    request = Request(model, output, limits=limits, workers=workers, fit_context=fit, draft=draft)
    compile_model(request, progress=progress)


def tuned_before(model: str) -> str:
    """What the tuning database holds under a model's name: tuning it again makes a new artifact of it."""
    from dataclasses import asdict

    from .tune.database import read, user_file

    mine = [asdict(e) for e in read(user_file()).values() if e.model == model]
    return hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:16] if mine else ""


def compiler_digest() -> str:
    """Of every file that decides what is compiled: an edited compiler never meets its older artifacts."""
    digest = hashlib.sha256()
    for path in sorted(p for part in COMPILER for p in (PACKAGE / part).rglob("*") if p.is_file()):
        if "__pycache__" not in path.parts:
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def model_digest(model: Path, folder: Path) -> str:
    """Of every file of a checkpoint. Remembered by path, size and time, since models are large."""
    if model.is_file():
        files = [model]
    else:
        files = sorted(p for p in model.iterdir() if p.is_file() and p.suffix in MODEL_FILES)
    memo_path = folder / "hashes.json"
    memo = _read_memo(memo_path)
    digest, before = hashlib.sha256(), len(memo)
    for path in files:
        info = path.stat()
        key = f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}|{info.st_ino}"
        if key not in memo:
            with path.open("rb") as file:
                memo[key] = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name if model.is_dir() else ''}\0{memo[key]}\n".encode())
    if len(memo) > before:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as written:
            json.dump(memo, written)
        os.replace(written.name, memo_path)
    return digest.hexdigest()


def _read_memo(path: Path) -> dict[str, Any]:
    try:
        memo = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}
