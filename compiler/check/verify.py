"""Compare an artifact with what its checkpoint means.

The reference is `ir/reference.py` in float32 over the checkpoint's weights, decoded from the formats the artifact
holds them in. Four checks, each with limits that are stated here and printed:

    weights  every packed byte is what packing the checkpoint gives
    phases   each phase of each layer, given the inputs the compiled step gave it (compiler/check/phases.py)
    logits   of the prompt's last token and of every generated one: their error, by cosine and relative root mean
             square, may not exceed what rounding activations by design costs (a second reference says how much)
    tokens   greedy ones equal the reference's wherever its two best logits are further apart than that rounding
             can bring together

The compiled step runs token by token, through its prompt bucket and then its decode bucket; the reference
reads the same tokens at once, so an early difference cannot hide behind a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.errors import LoadError, UsageError
from ...ir.graph import Program
from ...ir.reference import ReferenceModel, RowBatch
from ...ir.text import show
from ...models.drafter import with_drafter
from ...models.importer import Imported, import_checkpoint
from ...models.open import open_checkpoint
from ...passes.quantize import CALIBRATED
from ...runtime import Artifact, Model, load
from ..quality.calibrate import calibrated, read_pieces
from ..reports.artifact import fused_program, ir_text
from ..weights import pack_one, packed_weights, weight_plan
from .reference_weights import ReferenceWeights
from .rounding import has_bf16_dot, rounded_program

COSINE = 0.98  # least cosine of any row of logits
EXCESS = 1.5  # times the error of rounding by design that the mean error may reach
FLOOR = {"bf16": 0.02, "f32": 2e-3}  # relative error allowed on top: attention rounds to the cache's type
LEAD = 6  # errors (of one logit) that two logits may be apart and still change places: four sigmas of a difference

Progress = Callable[[str], None]


@dataclass
class Check:
    """One sentence of the verdict; `rows` is what it rests on. passed None: not done, `detail` says why."""

    name: str
    passed: bool | None
    detail: str
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Verdict:
    """All checks; passed if none failed."""

    artifact: str
    model: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def lines(self) -> list[str]:
        words = {True: "ok", False: "FAILED", None: "not done"}
        found = [f"{words[c.passed]:8s}  {c.name:8s}  {c.detail}" for c in self.checks]
        return [*found, "passed" if self.passed else "verification failed"]


def verify_artifact(
    path: Path,
    model: Path,
    prompt: str,
    tokens: int,
    threads: int | None,
    phases: bool,
    progress: Progress,
    draft: Path | None = None,
    calibration: Path | None = None,
) -> Verdict:
    """Run every check. LoadError if the two are not the same model at all.

    calibration: the text that weights were chosen by, if any were: they are chosen again.
    """
    artifact = Artifact.open(path)
    program = fused_program(artifact)
    imported = _calibrated(artifact, program, import_checkpoint(open_checkpoint(model)), calibration, progress)
    if (draft is None) != (program.drafter is None):
        wanted, got = ("none", str(draft)) if program.drafter is None else ("the model that drafts in it", "none")
        raise UsageError(f"--draft: expected {wanted}, got {got}", place=str(path))
    if draft is not None:
        imported = with_drafter(imported, import_checkpoint(open_checkpoint(draft)), program.passes)
    if ir_text(artifact, "import")[1] != show(imported.program):
        raise LoadError(
            f"verify: expected the model `{artifact.manifest.name}` was compiled from, got another one",
            place=str(model),
        )
    weights = ReferenceWeights(imported, program)
    progress("weights")
    checks = [_check_weights(artifact, program, imported)]
    design = rounded_program(imported.program, weights.formats, has_bf16_dot(artifact.pick_target()))
    with load(path, threads=threads, kv_tokens=max(64, artifact.manifest.limits.context)) as loaded:
        ids = _prompt(loaded, prompt, tokens)
        progress(f"{len(ids)} prompt tokens, {tokens} generated ones")
        checks += _check_tokens(loaded, (imported.program, design), weights, ids, tokens)
    if phases:
        from .phases import check_phases

        progress("phases")
        checks.append(check_phases(artifact, program, weights, ids))
    return Verdict(str(path), str(model), checks)


def _calibrated(
    artifact: Artifact, program: Program, imported: Imported, text: Path | None, progress: Progress
) -> Imported:
    """The checkpoint with the weights that the artifact's calibration text chooses."""
    keys = frozenset(artifact.manifest.raw.get("calibrated", ()))
    if bool(keys) != (text is not None):
        wanted, got = ("the text its weights were chosen by", "none") if keys else ("none", str(text))
        raise UsageError(f"--calibrate: expected {wanted}, got {got}", place=str(artifact.path))
    if text is None:
        return imported
    progress("calibration")
    texts = read_pieces(imported.checkpoint, text)
    return calibrated(imported, program, lambda key: CALIBRATED if key in keys else "", texts, lambda *_: None)


def _prompt(model: Model, text: str, tokens: int) -> list[int]:
    tokenizer, vocab, context = model.tokenizer, model.vocab, model.limits.context
    ids = tokenizer.encode(text) if tokenizer else [(7 * i + 3) % vocab for i in range(12)]
    if not ids:
        raise UsageError("--prompt: expected at least one token, got none")
    if len(ids) + tokens > context:
        raise UsageError(f"--tokens: expected prompt and tokens to fit {context} positions, got {len(ids)} + {tokens}")
    return ids


def _check_weights(artifact: Artifact, program: Program, imported: Imported) -> Check:
    weights = packed_weights(program)
    plan, data = weight_plan(weights), artifact.verify()
    wrong = []
    for w in weights:
        start = plan.offsets[w.key]
        if not np.array_equal(data.view[start : start + w.size], pack_one(w, imported)):
            wrong.append(w.key)
    data.close()
    if wrong:
        listed = ", ".join(wrong[:5]) + (" .." if len(wrong) > 5 else "")
        return Check("weights", False, f"{len(wrong)} of {len(weights)} tensors differ from the checkpoint: {listed}")
    return Check("weights", True, f"{len(weights)} tensors are the checkpoint's, byte for byte")


def _check_tokens(
    model: Model, programs: tuple[Program, Program], weights: ReferenceWeights, prompt: list[int], tokens: int
) -> list[Check]:
    """Greedy decoding by the compiled step, against two references on the same tokens: exact, rounded by design."""
    logits = [_read(model, prompt)]
    chosen = [int(logits[0].argmax())]
    for i in range(tokens - 1):
        logits.append(model.step([chosen[-1]], positions=[len(prompt) + i])[0])
        chosen.append(int(logits[-1].argmax()))
    model.reset()
    generated = model.generate(prompt, max_new_tokens=tokens, stop_tokens=())
    kv = model.limits.kv_dtype
    expected, by_design = (
        _reference_logits(program, weights, prompt + chosen[:-1], tokens, kv == "bf16") for program in programs
    )
    cost = float(np.mean([compare_logits(a, b)["relative_rmse"] for a, b in zip(by_design, expected, strict=True)]))
    limit = EXCESS * cost + FLOOR[kv]
    rows = [compare_logits(a, b) for a, b in zip(logits, expected, strict=True)]
    sampled = _kernel_verdict(generated.tokens, chosen)
    return [_logits_verdict(rows, limit), _tokens_verdict(rows, LEAD * limit), sampled]


def _read(model: Model, prompt: list[int]) -> np.ndarray:
    """Logits of the prompt's last token."""
    size = model.limits.rows
    for start in range(0, len(prompt), size):
        part = prompt[start : start + size]
        found = model.step(part, positions=range(start, start + len(part)))
    return found[0]


@torch.no_grad()
def _reference_logits(
    program: Program, weights: ReferenceWeights, tokens: list[int], count: int, bf16_cache: bool
) -> np.ndarray:
    """Logits [count, vocab] of the last `count` tokens, all positions in one step."""
    reference = ReferenceModel(program, weights, slots=1, positions=len(tokens), bf16_cache=bf16_cache)
    rows = RowBatch.of([(t, 0, i) for i, t in enumerate(tokens)], range(len(tokens) - count, len(tokens)))
    return reference.step(rows).logits.numpy()


def compare_logits(got: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """One row: how close but for a constant, which tokens, and the reference's lead in standard deviations.

    A constant added to all logits changes no probability, and rounding moves it the most.
    """
    spread = float(expected.std()) or 1.0
    best, second = np.partition(expected, -2)[-2:][::-1] if len(expected) > 1 else (expected[0], -np.inf)
    return {
        **closeness(got - got.mean(), expected - expected.mean()),
        "token": int(got.argmax()),
        "reference_token": int(expected.argmax()),
        "margin": float(best - second) / spread,
    }


def closeness(got: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Cosine, and the error's norm relative to the expected one's; not-a-number counts as infinitely far."""
    a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return {"cosine": 0.0, "relative_rmse": float("inf")}
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    error, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return {
        "cosine": float(a @ b) / norms if norms else float(error == 0),
        "relative_rmse": error / size if size else (0.0 if error == 0 else float("inf")),
    }


def _logits_verdict(rows: list[dict[str, Any]], limit: float) -> Check:
    cosine, errors = min(r["cosine"] for r in rows), [r["relative_rmse"] for r in rows]
    passed = cosine >= COSINE and float(np.mean(errors)) <= limit
    detail = (
        f"mean relative error {np.mean(errors):.4f} (at most {limit:.4f}, from the rounding of activations), "
        f"worst {max(errors):.4f}; worst cosine {cosine:.5f} (at least {COSINE}); {len(rows)} steps"
    )
    return Check("logits", passed, detail, rows)


def _tokens_verdict(rows: list[dict[str, Any]], lead: float) -> Check:
    other = [i for i, r in enumerate(rows) if r["token"] != r["reference_token"]]
    wrong = [i for i in other if rows[i]["margin"] > lead]
    detail = f"{len(rows) - len(other)} of {len(rows)} equal the reference's"
    if other:
        most = max(rows[i]["margin"] for i in other)
        detail += f"; where not, its lead was {most:.3f} deviations of the logits (at most {lead:.3f})"
    if wrong:
        r = rows[wrong[0]]
        detail += f"; step {wrong[0]}: expected token {r['reference_token']}, got {r['token']}"
    return Check("tokens", not wrong, detail)


def _kernel_verdict(generated: list[int], chosen: list[int]) -> Check:
    if generated == chosen:
        return Check("sampling", True, f"the step samples and commits the same {len(chosen)} tokens by itself")
    at = next((i for i, (a, b) in enumerate(zip(generated, chosen, strict=False)) if a != b), len(generated))
    return Check("sampling", False, f"generate differs from step by step at token {at}")
