"""Rounding by what a matrix reads: the algorithm on small matrices, and calibration of a small model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from onelaunch.compiler import driver
from onelaunch.compiler.check.reference_weights import ReferenceWeights
from onelaunch.compiler.check.verify import verify_artifact
from onelaunch.compiler.quality.calibrate import pieces
from onelaunch.compiler.quality.layerwise import LayerRun
from onelaunch.compiler.quality.perplexity import Tally
from onelaunch.compiler.quality.text_file import checkpoint_tokenizer
from onelaunch.ir.errors import CompileError, UsageError
from onelaunch.ir.formats import FORMATS, decode, quantize
from onelaunch.ir.gptq import gptq, inverse_factor
from onelaunch.ir.limits import Limits
from onelaunch.ir.quantizers import GRIDS
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.tests import small

pytestmark = pytest.mark.xdist_group("test_cli")  # the same artifact
torch.set_num_threads(1)  # tiny tensors: more threads only cost
each_grid = pytest.mark.parametrize("name", list(GRIDS))


def layer(n: int = 48, k: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A heavy-tailed matrix [n, k] and inputs [512, k] whose columns go together and differ in size."""
    random = np.random.default_rng(3)
    mix = np.eye(k) + random.standard_normal((k, k)) / np.sqrt(k)
    inputs = random.standard_normal((512, k)) @ mix * np.exp(0.7 * random.standard_normal(k))
    return random.standard_t(4, (n, k)).astype(np.float32), inputs.astype(np.float32)


@each_grid
def test_the_product_errs_less_than_with_the_nearest_weights(name: str) -> None:
    fmt, (matrix, inputs) = FORMATS[name], layer()

    def error(raw: np.ndarray) -> float:
        return float(np.square(inputs @ (decode(fmt, raw, 128) - matrix).T).sum())

    assert error(gptq(fmt, matrix, inputs.T @ inputs)) < 0.7 * error(quantize(fmt, matrix))


@each_grid
def test_inputs_that_do_not_go_together_leave_the_nearest_weights(name: str) -> None:
    fmt, matrix = FORMATS[name], layer()[0]
    found = decode(fmt, gptq(fmt, matrix, np.eye(128, dtype=np.float32)), 128)
    assert np.allclose(found, decode(fmt, quantize(fmt, matrix), 128), atol=1e-6)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    inputs = layer()[1].astype(np.float64)
    hessian = inputs.T @ inputs
    factor = inverse_factor(hessian).astype(np.float64)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(128)
    assert np.array_equal(factor, np.triu(factor))
    assert np.allclose(factor.T @ factor @ damped, np.eye(128), atol=1e-3)


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    fmt, (matrix, inputs) = FORMATS["q4_0"], layer()
    inputs[:, :32] = 0
    found = gptq(fmt, matrix, inputs.T @ inputs)
    assert np.isfinite(decode(fmt, found, 128)).all()
    nothing = gptq(fmt, matrix, np.zeros((128, 128), np.float32))
    assert np.square(decode(fmt, nothing, 128) - matrix).sum() < 0.05 * np.square(matrix).sum()
    error = np.abs(decode(fmt, found, 128)[:, :32] - matrix[:, :32])
    assert (error <= np.abs(matrix[:, :32]).max(axis=1, keepdims=True) / 6.9).all()  # half a step, peaks at 7 or more


def test_what_cannot_be_done_is_refused_by_name() -> None:
    matrix = layer()[0]
    with pytest.raises(CompileError, match="gptq: expected one of q4_0, mxfp4, nvfp4, got `q8_0`"):
        gptq(FORMATS["q8_0"], matrix, np.eye(128))
    with pytest.raises(CompileError, match="expected finite inputs"):
        gptq(FORMATS["q4_0"], matrix, np.full((128, 128), np.nan))


def words(seed: int, count: int) -> str:
    """Text of words that come again, the same words for every seed."""
    random = np.random.default_rng(0)
    known = ["".join(map(chr, random.integers(97, 123, n))) for n in random.integers(2, 9, 30)]
    return " ".join(known[int(30 * x**2)] for x in np.random.default_rng(seed).random(count))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibrate.txt"
    path.write_text(words(1, 180))
    return path


def reference_logits(weights: ReferenceWeights, tokens: list[int]) -> np.ndarray:
    run = LayerRun(weights.imported.program, tokens, range(len(tokens) - 1))
    x = run.enter(weights)
    for i in range(len(weights.imported.program.layers)):
        x = run.layer(i, x, weights)
    return run.logits(x, weights).numpy()


def test_a_calibrated_model_predicts_more_like_the_original_and_the_same_each_time(text: Path, tmp_path: Path) -> None:
    imported = import_checkpoint(open_checkpoint(small.model()))
    tokens = checkpoint_tokenizer(imported.checkpoint).encode(words(2, 60))
    expected = reference_logits(ReferenceWeights(imported, imported.program), tokens)
    policies = [tmp_path / f"{scheme}.toml" for scheme in ("int4", "gptq-int4")]
    for policy in policies:
        policy.write_text(f'default = "{policy.stem}"\n[tensors]\n"embed" = "keep"\n')
    made = [driver.calibrate(imported, str(policies[1]), text, driver.silent) for _ in range(2)]
    divergence = []
    for model, policy in ((imported, policies[0]), (made[0], policies[1])):
        tally = Tally()
        logits = reference_logits(ReferenceWeights(model, driver.quantized(imported.program, str(policy))), tokens)
        tally.add(logits, tokens[1:], expected)
        divergence.append(tally.score().kl)
    assert divergence[1] < 0.8 * divergence[0]
    chosen = [{k: s.rounded.rows for k, s in m.sources.items() if s.rounded} for m in made]
    assert len(chosen[0]) == 14  # seven of each layer; the head is the embedding
    assert all(np.array_equal(chosen[1][key], rows) for key, rows in chosen[0].items())


def test_a_policy_calibrates_what_it_names_and_no_more(text: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text('default = "int8"\n[tensors]\n"*.down" = "gptq-nvfp4"\n')
    imported = import_checkpoint(open_checkpoint(small.model()))
    made = driver.calibrate(imported, str(policy), text, driver.silent)
    rounded = {k: s.rounded.format for k, s in made.sources.items() if s.rounded}
    assert rounded == {"0.down": "nvfp4", "1.down": "nvfp4"}
    assert all(s.rounded is None for s in imported.sources.values())


def test_a_text_is_cut_into_at_most_sixteen_sequences() -> None:
    assert [len(p) for p in pieces(list(range(1300)), 4096, "t")] == [512, 512]
    assert len(pieces(list(range(99_999)), 4096, "t")) == 16
    assert [p[:2] for p in pieces(list(range(100, 1300)), 4096, "t", bos=1)] == [[1, 101], [1, 613]]
    assert len(pieces(list(range(130)), 64, "t")) == 2
    with pytest.raises(UsageError, match="expected at least 512 tokens, got 511"):
        pieces(list(range(511)), 4096, "t")


@pytest.mark.parametrize(
    ("quant", "calibrate", "reason"),
    [
        ("gptq-int4", None, "--quant gptq-int4: expected --calibrate FILE"),
        ("int4", "t.txt", "--calibrate: expected --quant gptq-.., got `int4`"),
        ("", "t.txt", "--calibrate: expected --quant gptq-.., got `none`"),
    ],
)
def test_calibration_and_schemes_go_together(quant: str, calibrate: str | None, reason: str, tmp_path: Path) -> None:
    request = driver.Request(tmp_path / "x.gguf", tmp_path / "a", quant=quant)
    request = dataclasses.replace(request, calibrate=Path(calibrate) if calibrate else None)
    with pytest.raises(UsageError, match=reason):
        driver.compile_model(request)


def test_verify_chooses_the_weights_again(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in small.changes().items():
        monkeypatch.setenv(name, value)
    limits = Limits(rows=16, slots=1, context=64, outputs=1)
    path, how = tmp_path / "a", {"tokens": 4, "threads": 1, "phases": False, "progress": lambda _: None}
    driver.compile_model(driver.Request(small.model(), path, "auto", limits, (1,), "gptq-int4", text))
    verdict = verify_artifact(path, small.model(), "the step", calibration=text, **how)
    assert verdict.passed, verdict.lines()
    other = tmp_path / "other.txt"
    other.write_text(words(7, 120))
    checks = verify_artifact(path, small.model(), "the step", calibration=other, **how).checks
    assert [c.name for c in checks if c.passed is False][:1] == ["weights"]
    with pytest.raises(UsageError, match="--calibrate: expected the text its weights were chosen by, got none"):
        verify_artifact(path, small.model(), "the step", **how)
    with pytest.raises(UsageError, match="--calibrate: expected none, got"):
        verify_artifact(small.artifact(), small.model(), "the step", calibration=text, **how)
