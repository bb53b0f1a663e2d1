"""The CUDA backend without a GPU: its protocol against a fake driver, and machines that have no driver.

Each test of cuda_protocol.py, cuda_picking.py and cuda_prefix.py is one case here. They run together in a process of
their own, because the driver library is found by name, once per process: LD_LIBRARY_PATH leads to the fake one there.
Nothing in this file runs on a GPU.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from onelaunch.compiler.doctor import examine_artifact
from onelaunch.ir.errors import HostError, LoadError, UsageError
from onelaunch.runtime import cuda_driver, host, load
from onelaunch.runtime.cuda import probe
from onelaunch.tests import cuda_fake, toy

TESTS = Path(__file__).parent
INNER = [TESTS / name for name in ("cuda_protocol.py", "cuda_picking.py", "cuda_prefix.py")]
SOURCE = TESTS / "fake_cuda.cpp"
NAMES = [getattr(node, "name", "") for file in INNER for node in ast.parse(file.read_text()).body]
CASES = [name for name in NAMES if name.startswith("test_")]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.compiled(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def outcomes(step: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What went wrong in each test of the protocol; nothing if it passed."""
    pytest.importorskip("cuda.bindings.driver")
    folder = tmp_path_factory.mktemp("fake")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or "c++"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{step.parent}"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(folder / "libcuda.so.1")], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "TOY_STEP": str(step)}
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", *map(str, INNER), f"--junitxml={report}", "--rootdir", str(TESTS.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        wrong = [str(part.text) for part in case if part.tag in ("failure", "error", "skipped")]
        found.setdefault(case.get("name", "").partition("[")[0], []).extend(wrong)
    found[""] = [done.stdout + done.stderr]
    return found


@pytest.mark.parametrize("name", CASES)
def test_protocol(outcomes: dict[str, list[str]], name: str) -> None:
    assert name in outcomes, outcomes[""][0]
    assert not outcomes[name], "\n".join(outcomes[name])


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine where neither the driver nor its Python package is."""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(cuda_driver, "_driver_present", lambda: False)
    monkeypatch.setattr(cuda_driver, "RELEASE", tmp_path / "release")
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "cache"))
    host.kernel_folder.cache_clear()
    yield
    host.kernel_folder.cache_clear()


def test_without_a_driver_a_cuda_artifact_is_one_clear_error(no_driver: None, tmp_path: Path) -> None:
    root = cuda_fake.write(tmp_path / "toy")
    command = "`onelaunch compile MODEL --target sm_90,cpu` makes one that runs on the processor as well"
    for device in ("auto", "cuda"):
        with pytest.raises(HostError, match=r"this machine, got sm_90 only\nerror: .* driver .*, got none\n") as error:
            load(root, device=device)
        assert error.value.exit_code == 5
        assert error.value.hint.endswith(command)
    with pytest.raises(LoadError, match="expected one for a processor, got sm_90"):
        load(root, device="cpu")
    assert probe()["error"].startswith("cuda: expected NVIDIA's driver")


def test_the_package_without_a_driver_says_the_same() -> None:
    pytest.importorskip("cuda.bindings.driver")
    if cuda_driver._driver_present():
        pytest.skip("this machine has a CUDA driver")
    with pytest.raises(cuda_driver.NoDevice, match=r"expected NVIDIA's driver .*, got none"):
        cuda_driver.Driver()


def test_without_a_driver_the_processor_is_used(
    no_driver: None, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_STEP", str(step))
    with load(cuda_fake.write(tmp_path / "toy", cpu=True)) as model:
        assert model.target == "cpu-toy"
        assert model.generate([1, 2], max_new_tokens=5).tokens == toy.answer([1, 2], 5)
    with pytest.raises(HostError, match="expected NVIDIA's driver"):  # a processor cannot stand in for this one
        load(tmp_path / "toy", segments="per-phase")
    with pytest.raises(UsageError, match="segments: expected `mega` on a processor, got `per-phase`"):
        load(tmp_path / "toy", target="cpu-toy", segments="per-phase")


def test_a_demanded_device_is_never_replaced_by_the_processor(
    no_driver: None, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_STEP", str(step))
    root = cuda_fake.write(tmp_path / "toy", cpu=True)
    with pytest.raises(HostError, match=r"error: cuda: expected NVIDIA's driver .*, got none\n"):
        load(root, device="cuda")
    with pytest.raises(UsageError, match="expected the one target `sm_90` is for, got `cpu`"):
        load(root, device="cpu", target="sm_90")
    with pytest.raises(UsageError, match=r"expected one of auto, cpu, cuda, got `gpu`"):
        load(root, device="gpu")
    load(root, device="cpu").close()
    raw = json.loads((root / "manifest.json").read_text())
    raw["targets"].pop("sm_90")
    (root / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=r"NVIDIA device, got cpu-toy(.|\n)*compile MODEL --target cpu-toy,sm_90"):
        load(root, device="cuda")


def test_doctor_says_why_a_target_is_not_used(
    no_driver: None, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_STEP", str(step))
    found = {f.name: f for f in examine_artifact(cuda_fake.write(tmp_path / "both", cpu=True))}
    assert (found["target cpu-toy"].status, found["target cpu-toy"].value) == ("ok", "used here")
    assert found["target sm_90"].status == "note"
    assert found["target sm_90"].value == "not used: cuda: expected NVIDIA's driver (libcuda.so.1), got none"
    alone = {f.name: f for f in examine_artifact(cuda_fake.write(tmp_path / "alone"))}
    assert alone["target sm_90"].status == "missing"
    monkeypatch.setattr(cuda_driver, "_driver_present", lambda: True)
    found = {f.name: f for f in examine_artifact(tmp_path / "both")}
    assert found["target sm_90"].value == "not used: cuda: expected the package `cuda-bindings`, got none"


def test_a_driver_without_the_package_is_never_passed_over(
    no_driver: None, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "_driver_present", lambda: True)
    monkeypatch.setenv("TOY_STEP", str(step))
    root = cuda_fake.write(tmp_path / "toy", cpu=True)
    with pytest.raises(HostError, match="expected the package `cuda-bindings`, got none"):
        load(root)
    load(root, target="cpu-toy").close()


def test_the_runtime_does_not_import_cuda_by_itself() -> None:
    code = "import sys, onelaunch.runtime.load; print([m for m in sys.modules if m.startswith('cuda')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
