"""What `onelaunch eval` does: each format of a model on one text, beside its bytes and a reference's predictions.

Everything that is scored is a compiled step: a checkpoint is compiled in each format that is asked for, an artifact is
taken as it is. The reference is the checkpoint as stored, compiled too, or what `--against` names; its logits are kept
in a temporary file, float32, so that every format is compared with the same bits and one model is loaded at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import UsageError, nearest
from ...ir.limits import Limits
from ...models.importer import Imported, import_checkpoint
from ...models.open import open_checkpoint
from ...passes.quantize import FLOATS, SCHEMES
from ...runtime import Artifact, Model, load
from ...runtime.load import read_tokenizer
from ...runtime.tokenizer import Tokenizer
from ..driver import POLICY, Request, calibrate, compile_model, quant_policy, quantized, silent
from ..ondemand import is_artifact
from ..reports.artifact import overview
from .calibrate import read_pieces
from .perplexity import Window, windows
from .scoring import ReferenceLogits, score_windows
from .sensitivity import Sensitivity, sensitivities
from .text_file import checkpoint_tokenizer, read_text

OUTPUTS = 128  # rows with logits per step of what is compiled here
STORED = "as stored"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to evaluate on what. `chunk`, `stride`: of perplexity.windows; `chunks`: windows at most, 0 is all.

    quants: schemes and policy files to compile the model in; against: another model as the reference.
    """

    model: Path
    text: Path
    quants: Sequence[str] = ()
    calibrate: Path | None = None
    against: Path | None = None
    chunk: int = 512
    chunks: int = 0
    stride: int = 0
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Subject:
    """One row of the table: an artifact, or a checkpoint in a format."""

    name: str
    path: Path
    quant: str = ""


@dataclass(frozen=True)
class Prepared:
    """The text cut up, before anything is compiled."""

    windows: list[Window]
    tokens: int
    digest: str
    bos: int

    @property
    def scored(self) -> int:
        return sum(len(w.scored) for w in self.windows)


def evaluate(asked: Asked, progress: Progress) -> dict[str, Any]:
    """Every format on the text, as plain data. What is wrong with the request is told before a model is compiled."""
    subjects = _subjects(asked)
    text = prepare(asked)
    with tempfile.TemporaryDirectory(prefix="onelaunch-eval-") as folder:
        kept = ReferenceLogits(Path(folder)) if len(subjects) > 1 else None
        rows = []
        for subject in subjects:
            with _opened(subject, asked, Path(folder), progress) as (model, facts):
                score = score_windows(model, text.windows, kept, subject.name, progress)
            if score.kl is not None:
                progress(f"{subject.name}: perplexity {score.perplexity:.4f}, KL {score.kl:.5f}")
            rows.append({"format": subject.name, "quant": subject.quant, **facts, **dataclasses.asdict(score)})
    return {
        "model": asked.model.name,
        "reference": subjects[0].name if len(subjects) > 1 else None,
        "text": {"file": asked.text.name, "sha256": text.digest, "tokens": text.tokens},
        "rule": {"chunk": asked.chunk, "chunks": len(text.windows), "stride": asked.stride, "bos": text.bos >= 0,
                 "scored": text.scored},
        "formats": rows,
    }  # fmt: skip


def rank(asked: Asked, by: str, better: str, progress: Progress) -> list[Sensitivity]:
    """What quantising each group of matrices alone costs (sensitivity.py); of one chunk unless more are asked for."""
    if is_artifact(asked.model):
        raise UsageError("--sensitivity: expected a checkpoint, got an artifact", place=str(asked.model))
    if len(asked.quants) != 1 or asked.quants[0].endswith(POLICY):
        raise UsageError(
            f"--sensitivity: expected one --quant, the name of a format to try, got {', '.join(asked.quants) or 'none'}"
        )
    for name in (*asked.quants, better):
        expect_scheme(name)
    quant_policy(asked.quants[0], asked.calibrate)
    imported = import_checkpoint(open_checkpoint(asked.model))
    expect_unquantized(imported)
    text = prepare(dataclasses.replace(asked, chunks=asked.chunks or 1))
    if asked.calibrate is not None:
        progress("calibrate")
        imported = calibrate(imported, asked.quants[0], asked.calibrate, silent)
    return sensitivities(imported, quantized(imported.program, asked.quants[0]), text.windows, by, progress)


def _subjects(asked: Asked) -> list[Subject]:
    """What to score, in order; the first is the reference of the others."""
    for quant in asked.quants:
        expect_scheme(quant)
    first = [Subject(asked.against.name, asked.against)] if asked.against else []
    if is_artifact(asked.model):
        if asked.quants:
            raise UsageError(
                "--quant: expected a checkpoint to quantize, got an artifact", place=str(asked.model),
                hint="evaluate the checkpoint that it was compiled from",
            )  # fmt: skip
        return [*first, Subject(asked.model.name, asked.model)]
    needs = [q for q in asked.quants if _calibrated(q)]
    for quant in needs or asked.quants[:1] or [""]:
        quant_policy(quant, asked.calibrate)
    checkpoint = open_checkpoint(asked.model)
    if asked.quants:
        expect_unquantized(import_checkpoint(checkpoint))
    if asked.calibrate is not None:
        read_pieces(checkpoint, asked.calibrate)  # refused now, not when its turn comes
    return [*first, Subject(STORED, asked.model), *(Subject(Path(q).name, asked.model, q) for q in asked.quants)]


def _calibrated(quant: str) -> bool:
    """Whether a format needs a calibration text."""
    try:
        quant_policy(quant)
    except UsageError:
        return True
    return False


def expect_scheme(quant: str) -> None:
    """UsageError for what is no name of a scheme and no policy file."""
    if quant.endswith(POLICY) and not Path(quant).is_file():
        raise UsageError("--quant: expected a policy file, got a path that does not exist", place=quant)
    if not quant.endswith(POLICY) and quant not in SCHEMES:
        listed = ", ".join(SCHEMES)
        raise UsageError(f"--quant: expected some of {listed}, or a .toml file, got `{quant}`",
                         hint=nearest(quant, SCHEMES))  # fmt: skip


def expect_unquantized(imported: Imported) -> None:
    """UsageError where the checkpoint holds no matrix that could be quantised: every row would be the same."""
    formats = {s.format for s in imported.sources.values() if len(s.shape) > 1}
    if not formats & set(FLOATS):
        raise UsageError(
            f"--quant: expected matrices of {', '.join(FLOATS)} to quantize, got {', '.join(sorted(formats))}",
            place=str(imported.checkpoint.path),
            hint="rounding twice loses twice: give the checkpoint it was made from, "
            "or one written by `tests/bench/dequantise.py`",
        )


def prepare(asked: Asked) -> Prepared:
    """Read and cut the text. UsageError for every way in which it does not do."""
    text = read_text(asked.text, "--text")
    tokenizer, context = _tokenizer(asked.model)
    if asked.chunk > context:
        raise UsageError(f"--chunk: expected at most {context}, the model's context, got {asked.chunk}")
    tokens = tokenizer.encode(text)
    bos = tokenizer.bos if tokenizer.add_bos else -1
    found = windows(tokens, asked.chunk, asked.stride, bos)
    if asked.chunks:
        found = found[: asked.chunks]
    return Prepared(found, len(tokens), hashlib.sha256(text.encode()).hexdigest(), bos)


def _tokenizer(path: Path) -> tuple[Tokenizer, int]:
    """With the longest sequence of the model."""
    if not is_artifact(path):
        checkpoint = open_checkpoint(path)
        return checkpoint_tokenizer(checkpoint), checkpoint.hyper["context"]
    artifact = Artifact.open(path)
    tokenizer = read_tokenizer(artifact)
    if tokenizer is None:
        raise UsageError("eval: expected an artifact with a tokenizer, got none", place=str(path))
    return tokenizer, artifact.manifest.limits.context


@contextmanager
def _opened(
    subject: Subject, asked: Asked, folder: Path, progress: Progress
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """A subject loaded, and its sizes; compiled first if need be, and deleted afterwards."""
    path, made = subject.path, folder / "artifact"
    if not is_artifact(path):
        progress(f"{subject.name}: compile")
        limits = Limits(slots=1, context=asked.chunk, outputs=OUTPUTS)
        calibrate = asked.calibrate if _calibrated(subject.quant) else None
        workers = (asked.threads,) if asked.threads else ()
        compile_model(Request(path, made, limits=limits, workers=workers, quant=subject.quant, calibrate=calibrate))
        path = made
    artifact = Artifact.open(path)
    _expect_context(artifact, asked)
    try:
        with load(path, threads=asked.threads, device=asked.device, kv_tokens=max(64, asked.chunk)) as model:
            yield model, _facts(artifact)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _expect_context(artifact: Artifact, asked: Asked) -> None:
    context = artifact.manifest.limits.context
    if asked.chunk > context:
        raise UsageError(
            f"--chunk: expected at most {context}, the compiled context, got {asked.chunk}", place=str(artifact.path)
        )


def _facts(artifact: Artifact) -> dict[str, Any]:
    found = overview(artifact, 1.0)
    size = sum(p.stat().st_size for p in [artifact.path, *artifact.path.rglob("*")] if p.is_file())
    return {
        "bytes_per_weight": found["bits_per_weight"] / 8,
        "weights_bytes": found["weights_bytes"],
        "file_bytes": size,
        "weights_by_format": found["weights_by_format"],
    }
