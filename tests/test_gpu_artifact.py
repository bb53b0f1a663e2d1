"""Artifacts with GPU targets: what is in them, that they run on the processor, and what is refused before packing."""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onelaunch.codegen.triton.build import Kernel
from onelaunch.compiler.driver import Request, compile_imported, compile_model
from onelaunch.compiler.gpu import compile as gpu_module
from onelaunch.compiler.gpu.compile import misfits, refuse_formats
from onelaunch.compiler.gpu.machines import machine_for
from onelaunch.compiler.gpu.process import compile_apart
from onelaunch.compiler.lowering import Dump
from onelaunch.compiler.target_list import parse_targets
from onelaunch.ir.errors import CompileError, HostError, LoadError
from onelaunch.ir.limits import Limits
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.runtime import Artifact, load
from onelaunch.tests import small, tiny
from onelaunch.tests.compiled import ArtifactCache

PROMPT = [5, 17, 200, 33, 8]
# A kernel as small as one can be, with the parameters of a step.
TEXT = """
import triton
import triton.language as tl


@triton.jit
def step_few(table, control, weights, workspace, state, kv0, stream, records, chunks, STAGES: tl.constexpr):
    tl.store(control, tl.load(table) + records)
"""


def test_the_artifact_holds_one_source_and_the_code_of_each_target(gpu_artifact: tuple[Path, Path]) -> None:
    artifact = Artifact.open(gpu_artifact[1])
    (target,) = artifact.manifest.cuda_targets
    assert (target.name, target.arch, target.workers) == ("sm_90", "sm_90a", (132,))
    ast.parse(artifact.read("kernels/triton/step.py"))
    raw = artifact.manifest.raw["targets"]["sm_90"]
    assert raw["machines"] == ["h100"]
    assert {"triton", "ptxas", "min_driver"} <= raw.keys()
    for entry, bucket in zip(target.entries, ("few", "many"), strict=True):
        assert artifact.read(entry.cubin)[:4] == b"\x7fELF"
        own = raw["entries"][bucket]
        ptx = artifact.read(own["ptx"]).decode()
        assert ".target sm_90a" in ptx
        assert re.findall(r"\.entry (\w+)\(", ptx) == [entry.name] == [f"step_{bucket}"]
        assert own["options"]["launch_cooperative_grid"] is True
        assert 0 < own["registers"] <= 255
        assert {"spills", "stack", "static_shared"} <= own.keys()
    # Both buckets' tables are certified: `tables` refuses others.
    assert artifact.tables(132, "sm_90").shape[:2] == (2, 132)
    assert list(artifact.manifest.certificates) == ["2", "sm_90-132"]
    proof = artifact.manifest.certificates["sm_90-132"]["schedules"]
    assert [proof[b]["workers"] for b in ("few", "many")] == [132, 132]


def test_it_runs_on_the_processor_from_the_same_weights(
    gpu_artifact: tuple[Path, Path], compiled: ArtifactCache
) -> None:
    model, both = gpu_artifact
    alone = compiled(model, quant="int4", limits=small.GPU_LIMITS)
    assert Artifact.open(alone).manifest.files["weights/weights.safetensors"] == (
        Artifact.open(both).manifest.files["weights/weights.safetensors"]
    )
    assert np.array_equal(Artifact.open(alone).tables(2), Artifact.open(both).tables(2))
    with load(alone) as one, load(both) as other:
        assert other.target == one.target
        expected = one.generate(PROMPT, max_new_tokens=12, stop_tokens=[]).tokens
        assert other.generate(PROMPT, max_new_tokens=12, stop_tokens=[]).tokens == expected


def test_machines_of_an_architecture_share_its_code(
    gpu_artifact: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[int, str]] = []
    monkeypatch.setattr(gpu_module, "compile_apart", lambda *job: fake_kernel(*job[3:5], compiled))
    request = Request(gpu_artifact[0], tmp_path / "a", "l4,rtx4090,sm_80", Limits(**small.GPU_LIMITS))
    seen: list[str] = []
    compile_model(request, progress=lambda name, seconds, detail: seen.append(name))
    artifact = Artifact.open(tmp_path / "a")
    assert sorted(compiled) == [(80, "few"), (80, "many"), (89, "few"), (89, "many")]
    assert [(t.name, t.workers) for t in artifact.manifest.cuda_targets] == [("sm_80", (108,)), ("sm_89", (58, 128))]
    assert artifact.tables(58, "sm_89").shape[1] == 58
    assert artifact.manifest.targets == ()
    assert artifact.manifest.threads == ()
    assert sorted(seen[-4:-2]) == ["sm_80", "sm_89"]


def fake_kernel(arch: int, bucket: str, compiled: list[tuple[int, str]] | None = None, **changes: Any) -> Kernel:
    if compiled is not None:
        compiled.append((arch, bucket))
    kv = (("kv0", "*bf16"),)
    pointers = [(name, "*i32") for name in ("table", "control", "weights", "workspace", "state")]
    numbers = (("stream", "*i64"), ("records", "i32"), ("chunks", "i32"))
    params = (*pointers, *kv, *numbers, ("global_scratch", "*i8"), ("profile_scratch", "*i8"))
    made = Kernel(
        f"sm_{arch}", f"step_{bucket}", "", b"\x7fELF", warps=8, shared=1000, registers=128, stack=0, spills=0,
        static_shared=0, params=params, versions={"triton": "3", "ptxas": "13.4"}, options={},
    )  # fmt: skip
    return replace(made, **changes)


def test_one_that_does_not_compile_is_named_and_nothing_is_read_or_left(
    gpu_artifact: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(text: str, limits: Limits, names: tuple[str, ...], arch: int, bucket: str, *how: Any) -> Kernel:
        if arch == 80 and bucket == "few":
            raise CompileError("sm_80: Triton could not compile the step: too sad")
        much = {"shared": 1 << 20, "registers": 200, "warps": 16}
        return fake_kernel(arch, bucket, **much if (arch, bucket) == (90, "many") else {})

    monkeypatch.setattr(gpu_module, "compile_apart", broken)
    imported = unreadable(gpu_artifact[0])
    request = Request(gpu_artifact[0], tmp_path / "a.ola", "sm_80,h100,cpu", Limits(**small.GPU_LIMITS))
    with pytest.raises(CompileError) as error:
        compile_imported(imported, request)
    assert sorted(error.value.reasons) == [
        "sm_80: Triton could not compile the step: too sad",
        "sm_90: step_many: expected at most 232448 bytes of shared memory per block on h100, got 1048576",
        "sm_90: step_many: expected at most 233472 bytes of shared memory per SM on h100, got 1048576",
        "sm_90: step_many: expected at most 65536 registers per block on h100, got 102400",
    ]
    assert list(tmp_path.iterdir()) == []


def unreadable(model: Path) -> Any:
    """A checkpoint none of whose tensors may be read."""

    def read(name: str) -> np.ndarray:
        raise AssertionError(f"tensor `{name}` was read")

    return import_checkpoint(replace(open_checkpoint(model, shapes_only=True), read=read))


def test_spills_are_reported_not_refused() -> None:
    assert list(misfits(fake_kernel(90, "step", spills=500, stack=64), machine_for("h100"))) == []


def test_a_format_without_a_reader_is_refused_by_name(
    gpu_artifact: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "READERS", ("f32", "q4_0"))
    program = tiny.tiny("llama", "q6_k").program
    gpus = parse_targets("sm_80,sm_90").gpus
    with pytest.raises(CompileError, match=r"sm_80, sm_90: expected weights in f32, .*, got `q6_k` in .*global\.q"):
        refuse_formats(program, gpus)
    refuse_formats(program, ())
    refuse_formats(tiny.tiny("llama", "q4_0").program, gpus)
    request = Request(gpu_artifact[0], tmp_path / "a.ola", "sm_90,cpu", Limits(**small.GPU_LIMITS), quant="int8")
    with pytest.raises(CompileError, match=r"sm_90: expected weights in f32, q4_0, got `q8_0`"):
        compile_imported(unreadable(gpu_artifact[0]), request)


def test_the_kernel_does_not_depend_on_the_process_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    first = compile_apart(TEXT, Limits(), ["kv0"], 90, "few", (3, 1024), 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert compile_apart(TEXT, Limits(), ["kv0"], 90, "few", (3, 1024), 8) == first
    assert first.arch == "sm_90a"
    assert first.cubin[:4] == b"\x7fELF"


def test_errors_of_the_other_process_come_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError, match="sm_80: Triton could not compile the step"):
        compile_apart(TEXT.replace("tl.load(table)", "tl.lode(table)"), Limits(), ["kv0"], 80, "few", (3, 1024), 8)
    with pytest.raises(HostError, match=r"sm_80: expected a kernel, got a compiler process that ended with 7"):
        compile_apart("import os\nos._exit(7)", Limits(), ["kv0"], 80, "few", (3, 1024), 8)


def test_a_dump_has_both_sources_and_a_schedule_of_another_machine_is_refused(
    gpu_artifact: tuple[Path, Path], tmp_path: Path
) -> None:
    limits = Limits(**small.GPU_LIMITS)
    dump = Dump(tmp_path / "dump", "codegen")
    request = Request(gpu_artifact[0], tmp_path / "a", "sm_90,cpu", limits, (2,))
    assert compile_model(request, dump) is None
    assert "@triton.jit" in (tmp_path / "dump/10-codegen.py").read_text()
    assert "ol_step" in (tmp_path / "dump/10-codegen.cpp").read_text()
    schedule = tmp_path / "dump/05-schedule.ir"
    again = Dump(stop_after="allocate")
    compile_model(replace(request, start_from=schedule), again)
    assert again.texts["08-allocate.ir"] == dump.texts["08-allocate.ir"]
    with pytest.raises(CompileError, match=r"--start-from: expected a schedule of 1, 2 workers, got 132"):
        compile_model(replace(request, start_from=schedule, target="cpu", workers=(1, 2)))


def test_a_configuration_alone_compiles_without_weights(
    gpu_artifact: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "bare"
    model.mkdir()
    shutil.copy(gpu_artifact[0] / "config.json", model)
    monkeypatch.setattr(gpu_module, "compile_apart", lambda *job: fake_kernel(*job[3:5]))
    request = Request(model, tmp_path / "a", "sm_90", Limits(**small.GPU_LIMITS))
    with pytest.raises(LoadError, match=r"expected \*\.safetensors, got none"):
        compile_model(request)
    for quant, expected in (("", "bf16"), ("int4", "q4_0")):
        compile_model(replace(request, pack=False, quant=quant))
        raw = json.loads((tmp_path / "a/manifest.json").read_text())
        assert raw["weights_packed"] is False
        assert {w["format"] for w in raw["weights"] if len(w["shape"]) > 1} == {expected}
        assert not (tmp_path / "a/weights").exists()


@pytest.mark.parametrize("bare", [False, True])
def test_no_tensor_is_read_without_weights_and_the_artifact_is_not_run(
    gpu_artifact: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare: bool
) -> None:
    """From a whole checkpoint as from a configuration alone."""
    model = gpu_artifact[0]
    if bare:
        model = tmp_path / "bare"
        model.mkdir()
        shutil.copy(gpu_artifact[0] / "config.json", model)
    monkeypatch.setattr(gpu_module, "compile_apart", lambda *job: fake_kernel(*job[3:5]))
    request = Request(model, tmp_path / "a", "sm_90,cpu", Limits(**small.GPU_LIMITS), (2,), "int4", pack=False)
    compile_imported(unreadable(model), request)
    artifact = Artifact.open(tmp_path / "a")
    assert artifact.manifest.target_names == (*(t.name for t in artifact.manifest.targets), "sm_90")
    for use in (lambda: load(tmp_path / "a"), artifact.verify):
        with pytest.raises(LoadError, match=re.escape("compiled with --no-weights")):
            use()
    # The same tables as with weights: only the file is missing.
    with_weights = Artifact.open(gpu_artifact[1])
    assert np.array_equal(artifact.tables(132, "sm_90"), with_weights.tables(132, "sm_90"))
