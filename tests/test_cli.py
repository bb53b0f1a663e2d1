"""The commands as a user meets them: exit codes, error texts, what is on stdout, and that dumps compile on."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onelaunch.compiler import doctor, ondemand
from onelaunch.compiler.cli import main
from onelaunch.ir.text import parse_program, show
from onelaunch.tests import small

EXAMPLES = Path(__file__).parent.parent / "examples"
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in small.changes().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Main:
    """main() in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        return code, *capsys.readouterr()

    return call


def test_help_is_quick_and_needs_no_heavy_library() -> None:
    program = "import sys; from onelaunch.compiler.cli import main; main(['--help']); print(sorted(sys.modules))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=small.environment())
    assert "Check and measure" in done.stdout, done.stderr
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in ("'numpy'", "'torch'", "'triton'", "'transformers'") if name in loaded]
    assert time.perf_counter() - start < 5  # half a second, on a machine that does nothing else


@pytest.mark.parametrize("name", ["compile", "run", "chat", "inspect", "verify", "eval", "bench", "doctor"])
def test_every_command_has_help_without_periods(run: Main, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "--json" in out
    library = ["Show", "this", "message", "and", r"exit\."]  # not our words; the table may wrap them anywhere
    out = re.sub(r"[\s│]+".join(library), "", out)
    own = out.splitlines()
    assert not [line for line in own if line.rstrip(" │").endswith(".") and ".." not in line]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["frobnicate"], 2, "no such command"),
        (["compile"], 2, "missing argument"),
        (["compile", "x.gguf", "--frob"], 2, "no such option"),
        (["compile", "x.gguf", "--context", "4Q"], 2, "expected a number like 4096, 4K or 1M, got `4Q`"),
        (["compile", "x.gguf", "--rows", "0"], 2, "expected at least 1"),
        (["compile", "x.gguf", "--threads", "0,2"], 2, "expected 1 to 256"),
        (["compile", "x.gguf", "--quant", "int5"], 2, "fp8, gptq-int4, gptq-nvfp4, gptq-mxfp4, got `int5`"),
        (["compile", "x.gguf", "--slots", "4", "--outputs", "2"], 2, "expected outputs >= slots (4), got 2"),
        (["compile", "x.gguf", "--speculate", "ngram:8"], 2, "limits: expected drafts 0 to 7, got 8"),
        (["compile", "x.gguf", "--speculate", "ngram:4", "--outputs", "8"], 2, "expected outputs >= 10, got 8"),
        (["compile", "x.gguf"], 3, "path that does not exist"),
        (["compile", "smollm2-135m-instrukt"], 3, "did you mean `smollm2-135m-instruct`?"),
        (["compile", "MODEL", "--stop-after", "fuze"], 2, "did you mean `fuse`?"),
        (["compile", "MODEL", "--target", "cpu-avx3"], 2, "--target: expected auto"),
        (["compile", "MODEL", "--context", "1K"], 3, "expected at most 512, the model's own, got 1024"),
        (["compile", "MODEL", "--sinks", "4"], 2, "--sinks: expected a layer with a window, got `llama`"),
        (["compile", "MODEL", "--window", "8", "--sinks", "65"], 2, "--sinks: expected 0 to 64 tokens"),
        (["compile", "MODEL", "--window", "0"], 2, "expected at least 1, got `0`"),
        (["compile", "MODEL", "--start-from", "nowhere.ir"], 2, "expected a file written by --dump"),
        (["compile", "MODEL", "-o", "FOLDER"], 2, "expected a new path or an artifact to replace"),
        (["run", "x.ola", "-p", "hi", "--temperature", "hot"], 2, "invalid value for '--temperature'"),
        (["inspect", "MODEL"], 2, "expected an artifact, got a model that is not compiled"),
        (["inspect", "DAMAGED"], 3, "expected a folder or a zip file"),
        (["bench", "ARTIFACT", "--depth", "9K"], 2, "bench: expected steps and rows"),
        (["bench", "ARTIFACT", "--segments", "per-phase"], 2, "expected `mega` on a processor, got `per-phase`"),
        (["run", "ARTIFACT", "-p", "a", "--segments", "micro"], 2, "expected mega or per-phase, got `micro`"),
        (["run", "ARTIFACT", "-p", "hi", "--speculate", "ngrm"], 2, "did you mean `ngram`?"),
        (["run", "ARTIFACT", "-p", "hi", "--speculate", "ngram:6"], 2, "at most ngram:4, what was compiled"),
        (["run", "ARTIFACT", "-p", "hi", "--threads", "3"], 2, "expected one of 1, 2, got 3"),
        (["run", "ARTIFACT", "-p", "hi", "--top-p", "0"], 2, "top_p"),
        (["verify", "ARTIFACT", "OTHER"], 3, "expected the model `small` was compiled from"),
    ],
)
def test_wrong_input_is_told_and_has_its_exit_code(
    run: Main, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "thesis.txt").write_text("years of work")
    (tmp_path / "DAMAGED.ola").write_bytes(b"PK nothing")
    places = {"FOLDER": tmp_path / "FOLDER", "DAMAGED": tmp_path / "DAMAGED.ola"}
    makers = {"MODEL": small.model, "ARTIFACT": small.artifact, "OTHER": lambda: _other_shape(tmp_path / "other")}
    full = [makers[w]() if w in makers else places.get(w, w) for w in words]
    got, out, err = run(*full)
    assert (got, out) == (code, ""), err
    assert said in err
    assert err.startswith(("error: ", "[", "pp", "tg", "weights"))
    assert "Traceback" not in err
    assert (tmp_path / "FOLDER" / "thesis.txt").exists()


def _other_shape(folder: Path) -> Path:
    small.write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    return folder


def test_a_bug_of_ours_is_one_line_and_a_file(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("the moon is wrong")

    monkeypatch.setattr(doctor, "examine", broken)
    code, out, err = run("doctor")
    assert (code, out, len(err.splitlines())) == (70, "", 1)
    assert "internal error: RuntimeError: the moon is wrong; this is a bug" in err
    written = Path(err.split()[-1])
    assert "raise RuntimeError" in written.read_text()
    written.unlink()


def test_an_interrupt_ends_with_130(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert run("doctor")[0] == 130


def test_a_closed_pipe_is_no_error() -> None:
    words = [sys.executable, "-m", "onelaunch", "inspect", str(small.artifact()), "--source"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=small.environment()) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 141)


def test_a_machine_without_a_compiler_is_exit_5(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 5
    assert not found["ok"]
    assert [f["name"] for f in found["findings"] if f["status"] == "missing"] == ["c++ compiler"]
    code, _, err = run("compile", small.model(), "-o", small.place() / "never.ola", "--threads", "1")
    assert code == 5
    assert "expected a C++ compiler" in err
    assert not (small.place() / "never.ola").exists()


def test_stop_after_prints_text_that_parses(run: Main) -> None:
    code, out, err = run("compile", small.model(), "--stop-after", "fuse")
    assert code == 0
    assert "[ 4/4] fuse" in err
    assert show(parse_program(out)) == out
    document = json.loads(run("compile", small.model(), "--stop-after", "fuse", "--json")[1])
    assert document["text"] == out


@pytest.mark.parametrize("name", ["02-quantize.ir", "03-fuse.ir", "04-tile.ir", "05-schedule.ir", "07-sync.ir"])
def test_a_dump_compiles_on_to_the_same_schedule(run: Main, tmp_path: Path, name: str) -> None:
    options = ["--threads", "2", "--stop-after", "allocate"]
    expected = run("compile", small.model(), "--dump", tmp_path, *options)[1]
    code, out, err = run("compile", small.model(), "--start-from", tmp_path / name, *options)
    assert code == 0, err
    assert out == expected


def test_an_edited_dump_is_compiled_and_verify_notices(run: Main, tmp_path: Path) -> None:
    run("compile", small.model(), "--dump", tmp_path, "--stop-after", "fuse", "--quant", "int8")
    fused = tmp_path / "03-fuse.ir"
    fused.write_text(fused.read_text().replace("= silu(gate)", "= gelu_tanh(gate)"))
    edited = tmp_path / "edited"
    code, _, err = run("compile", small.model(), "--start-from", fused, "--window", "8")
    assert (code, "--window: expected what the dump has, got 8" in err) == (2, True)
    code, _, err = run("compile", small.model(), "--start-from", fused, "-o", edited, "--threads", "1")
    assert code == 0, err
    code, out, _ = run("verify", edited, small.model(), "--tokens", "4", "--json")
    checks = {c["name"]: c["passed"] for c in json.loads(out)["checks"]}
    # The edit is faithfully compiled (its phases are right); it is another model.
    assert code == 4
    assert checks["weights"]
    assert checks["phases"]
    assert not checks["logits"]


def test_a_wrong_edit_is_shown_at_its_line(run: Main, tmp_path: Path) -> None:
    run("compile", small.model(), "--dump", tmp_path, "--stop-after", "fuse")
    fused = tmp_path / "03-fuse.ir"
    fused.write_text(fused.read_text().replace("silu(gate)", "sillu(gate)"))
    code, _, err = run("compile", small.model(), "--start-from", fused)
    assert code == 3
    assert "--> " in err
    assert "03-fuse.ir:" in err
    assert "did you mean `silu`?" in err


def test_run_prints_text_or_json(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--raw", "--max-new-tokens", "8", "--temperature", "1", "--seed", "5"]
    code, text, err = run("run", small.artifact(), "-p", "Hello", "--stats", *options)
    assert code == 0
    assert "prompt 5 tokens" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    document = json.loads(run("run", small.artifact(), "-p", "-", "--json", *options)[1])
    assert document["text"] + "\n" == text
    assert document["prompt_tokens"] == 5
    assert len(document["tokens"]) <= 8


def test_a_template_is_used_unless_raw(run: Main) -> None:
    def prompt_tokens(*more: str) -> Any:
        return json.loads(run("run", small.artifact(), "-p", "Hi", "--max-new-tokens", "1", "--json", *more)[1])[
            "prompt_tokens"
        ]

    assert prompt_tokens("--raw") == 2
    assert prompt_tokens() == prompt_tokens("--chat") == len("user:Hiassistant:") + 3


def test_a_model_is_compiled_once_and_kept(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", small.model(), "-p", "Hi", "--max-new-tokens", "4", "--json"]
    code, first, err = run(*words)
    assert code == 0
    assert "codegen" in err
    code, second, err = run(*words)
    assert code == 0
    assert err == ""
    assert json.loads(first)["tokens"] == json.loads(second)["tokens"]
    # Damage in the cache is ours to repair.
    kept = next(p for p in ondemand.cache_folder().glob("small-*") if p.is_dir())
    good = shutil.copytree(kept, small.place() / "good")
    monkeypatch.setattr(ondemand, "_compile", lambda model, output, *more: good.rename(output))
    for table in (kept / "tables").iterdir():
        table.write_bytes(b"damage")
    code, third, _ = run(*words)
    assert code == 0
    assert not good.exists()
    assert json.loads(third)["tokens"] == json.loads(first)["tokens"]


def test_chat_keeps_the_conversation(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n/what\n/reset\nc\n/exit\nnever\n"))
    code, out, err = run("chat", small.artifact(), "--max-new-tokens", "2", "--json")
    turns = [json.loads(part + "}") for part in out.replace("\n}\n", "\n\x00").split("\x00") if part.strip()]
    lengths = [t["prompt_tokens"] for t in turns]
    assert code == 0
    assert len(turns) == 3
    assert lengths[1] > lengths[0] == lengths[2]
    assert "expected /reset or /exit, got `/what`" in err
    assert err.count("> ") == 6


def test_verify_passes_and_other_weights_fail(run: Main, tmp_path: Path) -> None:
    code, out, err = run("verify", small.artifact(), small.model(), "--tokens", "6")
    assert (code, out[-7:]) == (0, "passed\n"), out + err
    other = small.write_model(tmp_path / "other", seed=1)
    code, out, _ = run("verify", small.artifact(), other, "--tokens", "6", "--json")
    checks = {c["name"]: c["passed"] for c in json.loads(out)["checks"]}
    assert code == 4
    assert not checks["weights"]
    assert not checks["logits"]
    assert not checks["phases"]


def test_bench_measures_against_the_read_bandwidth(run: Main) -> None:
    words = ["bench", small.artifact(), "--prompt-tokens", "32", "--tokens", "8", "--rounds", "2", "--threads", "1,2"]
    rows = json.loads(run(*words, "--json")[1])
    assert [(r["test"], r["threads"]) for r in rows] == [("pp32", 1), ("tg8 @ d0", 1), ("pp32", 2), ("tg8 @ d0", 2)]
    for r in rows:
        assert r["slowest"] <= r["tokens_per_second"] <= r["fastest"]
        assert r["read_gbps"] > 0
    code, out, _ = run(*words)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 0
    assert len(table) == 6
    assert len({line.count("|") for line in table}) == 1


def _example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, env=small.environment(), timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_example_tiny_model() -> None:
    _example("tiny_model.py")


@pytest.mark.weights
@pytest.mark.parametrize("name", ["generate.py", "edit_ir.py"])
def test_examples_with_weights(name: str) -> None:
    _example(name)
