"""`onelaunch eval`: the rule, its arithmetic against numpy, what the commands print, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from onelaunch.compiler import driver
from onelaunch.compiler.check.reference_weights import ReferenceWeights
from onelaunch.compiler.cli import main
from onelaunch.compiler.quality import evaluate, sensitivity
from onelaunch.compiler.quality.perplexity import Tally, windows
from onelaunch.ir.errors import HostError, UsageError
from onelaunch.ir.reference import ReferenceModel, RowBatch
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.passes.policy import parse_policy
from onelaunch.runtime import load
from onelaunch.tests import small

pytestmark = pytest.mark.xdist_group("test_cli")  # the same artifact
torch.set_num_threads(1)  # tiny tensors: more threads only cost
Main = Callable[..., tuple[int, str, str]]
TEXT = "The step is compiled ahead of time, and what it says is compared with what it would have said. " * 3


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in small.changes().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Main:
    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        return code, *capsys.readouterr()

    return call


def test_windows_are_those_of_llama_perplexity() -> None:
    found = windows(list(range(100, 135)), 8)
    assert [w.tokens[0] for w in found] == [100, 108, 116, 124]  # three tokens are left over
    assert all(w.scored == range(4, 7) and w.targets == w.tokens[5:] for w in found)
    begun = windows(list(range(100, 135)), 8, bos=1)
    assert [w.tokens[0] for w in begun] == [1] * 4
    assert [w.tokens[1:] for w in begun] == [w.tokens[1:] for w in found]


def test_with_a_stride_every_token_is_scored_once() -> None:
    found = windows(list(range(100, 129)), 8, 3)
    assert [t for w in found for t in w.targets] == list(range(101, 129))
    assert {len(w.targets) for w in found[1:]} == {3}


def random_logits(rows: int, seed: int) -> np.ndarray:
    return 4 * np.random.default_rng(seed).standard_normal((rows, 50)).astype(np.float32)


def test_scores_are_what_numpy_says() -> None:
    q, p = random_logits(150, 0), random_logits(150, 1)
    targets = np.random.default_rng(2).integers(0, 50, 150)
    tally = Tally()
    for start in (0, 20, 120):  # pieces do not matter
        end = {0: 20, 20: 120, 120: 150}[start]
        tally.add(q[start:end], targets[start:end].tolist(), p[start:end])
    found = tally.score()
    log_q, log_p = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (q.astype(float), p.astype(float)))
    losses = -log_q[np.arange(150), targets]
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    assert found.tokens == 150
    assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-9)
    assert found.error == pytest.approx(np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(150), rel=1e-9)
    assert found.kl == pytest.approx(divergence.mean(), rel=1e-9)
    assert found.kl_99 == pytest.approx(np.quantile(divergence, 0.99), rel=1e-9)
    assert found.same_top == pytest.approx((q.argmax(axis=1) == p.argmax(axis=1)).mean())


def test_a_model_does_not_diverge_from_itself() -> None:
    q, tally = random_logits(70, 0), Tally()
    q[:, 7] = -np.inf  # a token that cannot be
    tally.add(q, [1] * 70, q)
    assert (tally.score().kl, tally.score().kl_99, tally.score().same_top) == (0.0, 0.0, 1.0)


def test_an_artifact_is_scored_as_its_steps_say(text: Path) -> None:
    """Whole prompts and few outputs at a time, against one row a step and numpy."""
    asked = evaluate.Asked(small.artifact(), text, chunk=60, against=small.artifact(), threads=2)
    found = evaluate.evaluate(asked, lambda _: None)
    losses = []
    with load(small.artifact(), threads=2) as model:
        tokens = model.tokenizer.encode(TEXT)
        for start in range(0, len(tokens) - 59, 60):
            model.reset()
            for i in range(59):
                row = model.step([tokens[start + i]], positions=[i])[0].astype(np.float64)
                if i >= 30:
                    losses.append(np.log(np.exp(row).sum()) - row[tokens[start + i + 1]])
    assert found["rule"] == {"chunk": 60, "chunks": 4, "stride": 0, "bos": False, "scored": 116}
    for row in found["formats"]:
        assert row["tokens"] == len(losses) == 116
        assert row["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
        assert (row["kl"], row["same_top"]) == (0.0, 1.0)


def test_a_checkpoint_is_compared_in_the_formats_that_are_asked_for(run: Main, text: Path) -> None:
    long = text.with_name("long.txt")
    long.write_text(TEXT * 2)
    code, out, err = run("eval", small.model(), "--text", text, "--chunk", 128, "--threads", 1, "--json",
                         "--quant", "gptq-int4", "--calibrate", long)  # fmt: skip
    assert code == 0, err
    stored, quantized = json.loads(out)["formats"]
    assert stored["kl"] == 0.0
    assert 1e-4 < quantized["kl"] < 0.1
    assert quantized["weights_by_format"].keys() == {"q4_0", "f32"}
    assert quantized["bytes_per_weight"] < 0.2 * stored["bytes_per_weight"]
    assert quantized["weights_bytes"] < quantized["file_bytes"]


def test_a_matrix_costs_what_the_reference_executor_says() -> None:
    imported = import_checkpoint(open_checkpoint(small.model()))
    program = driver.quantized(imported.program, "int4")
    tokens = np.random.default_rng(0).integers(0, 256, 24).tolist()
    rows = sensitivity.sensitivities(imported, program, windows(tokens, 24), "tensor", lambda _: None)
    assert len(rows) == 15
    assert [r.kl for r in rows] == sorted((r.kl for r in rows), reverse=True)
    stored, rounded = ReferenceWeights(imported, imported.program), ReferenceWeights(imported, program)
    for key in ("1.v", "embed"):
        logits = []
        for weights in (stored, {**stored, key: rounded[key]}):
            model = ReferenceModel(imported.program, weights, positions=24)
            step = RowBatch.of([(t, 0, i) for i, t in enumerate(tokens)], range(12, 23))
            logits.append(model.step(step).logits.numpy())
        tally = Tally()
        tally.add(logits[1], tokens[13:], logits[0])
        assert next(r.kl for r in rows if r.pattern == key) == pytest.approx(tally.score().kl, rel=1e-3)


def test_the_ranking_is_written_as_a_policy(run: Main, text: Path) -> None:
    policy = text.with_name("p.toml")
    words = ["--text", text, "--chunk", 32, "--quant", "int4", "--sensitivity", "--by", "name", "--json"]
    code, out, err = run("eval", small.model(), *words, "--policy", policy)
    assert code == 0, err
    rows = json.loads(out)
    assert {r["pattern"] for r in rows} == {"embed", *(f"*.{n}" for n in ("q", "k", "v", "o", "gate", "up", "down"))}
    assert all(r["matrices"] == (1 if r["pattern"] == "embed" else 2) for r in rows)
    found = parse_policy(driver.read_toml(policy, "a policy file"), str(policy))
    assert found.default == "int4"
    listed = list(found.patterns)
    assert listed == [r["pattern"] for r in rows][: len(listed)], "the costliest first"
    assert set(found.patterns.values()) == {"int8"}
    assert 0.5 <= sum(r["kl"] for r in rows[: len(listed)]) / sum(r["kl"] for r in rows) < 1
    assert {r["bytes_saved"] for r in rows} != {0}


MODEL, ARTIFACT = "MODEL", "ARTIFACT"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["MODEL"], 2, "missing option"),
        (["MODEL", "--text", "nowhere.txt"], 2, "--text: expected a text file: No such file"),
        (["MODEL", "--text", "EMPTY"], 2, "--text: expected text, got an empty file"),
        (["MODEL", "--text", "LATIN"], 2, "--text: expected UTF-8 text, got byte 0xe9 at 3"),
        (["MODEL", "--text", "TEXT"], 2, "--text: expected at least 512 tokens, one chunk, got 285"),
        (["MODEL", "--text", "TEXT", "--chunk", "1K"], 2, "expected at most 512, the model's context, got 1024"),
        (["MODEL", "--text", "TEXT", "--chunk", "2"], 2, "--chunk: expected at least 4 tokens, got 2"),
        (["MODEL", "--text", "TEXT", "--chunk", "64", "--stride", "64"], 2, "--stride: expected 1 to 63"),
        (["MODEL", "--text", "TEXT", "--quant", "int4,nvpf4"], 2, "did you mean `nvfp4`?"),
        (["MODEL", "--text", "TEXT", "--quant", "none.toml"], 2, "expected a policy file, got a path that does not"),
        (["MODEL", "--text", "TEXT", "--quant", "gptq-int4"], 2, "--quant gptq-int4: expected --calibrate FILE"),
        (["MODEL", "--text", "TEXT", "--calibrate", "TEXT"], 2, "--calibrate: expected --quant gptq-.., got `none`"),
        (["MODEL", "--text", "TEXT", "--chunk", "32", "--quant", "gptq-int4", "--calibrate", "TEXT"], 2,
         "--calibrate: expected at least 512 tokens, got 285"),
        (["ARTIFACT", "--text", "TEXT", "--quant", "int4"], 2, "expected a checkpoint to quantize, got an artifact"),
        (["MODEL", "--text", "TEXT", "--sensitivity"], 2, "--sensitivity: expected one --quant"),
        (["MODEL", "--text", "TEXT", "--by", "layer"], 2, "--by: expected --sensitivity with it"),
        (["ARTIFACT", "--text", "TEXT", "--sensitivity"], 2, "--sensitivity: expected a checkpoint, got an artifact"),
        (["nowhere.gguf", "--text", "TEXT"], 3, "path that does not exist"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_error(run: Main, text: Path, words: list[str], code: int, said: str) -> None:
    empty, latin = text.with_name("empty.txt"), text.with_name("latin.txt")
    empty.write_text(" \n")
    latin.write_bytes("café".encode("latin-1"))
    places = {"MODEL": small.model(), "ARTIFACT": small.artifact(), "TEXT": text, "EMPTY": empty, "LATIN": latin}
    got, out, err = run("eval", *(places.get(w, w) for w in words))
    assert (got, out) == (code, "")
    assert said in " ".join(err.split())
    assert err.count("error:") == 1
    assert "Traceback" not in err


def test_a_checkpoint_that_is_quantized_already_is_not_quantized_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = import_checkpoint(open_checkpoint(small.model()))
    sources = {k: dataclasses.replace(s, format="q4_1") for k, s in imported.sources.items()}
    with pytest.raises(UsageError, match="expected matrices of f32, f16, bf16 to quantize, got q4_1"):
        evaluate.expect_unquantized(dataclasses.replace(imported, sources=sources))


def test_a_disk_too_small_for_the_reference_is_told_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onelaunch.compiler.quality import scoring

    monkeypatch.setattr(scoring.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(HostError, match=r"expected 0\.4 GB for the reference's logits, got 0\.0 GB free"):
        scoring.ReferenceLogits(tmp_path).make(1000, 100_000)
    assert not list(tmp_path.iterdir())
