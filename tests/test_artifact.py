"""Opening artifacts: what is right loads, and any byte or field that is wrong is named."""

from __future__ import annotations

import json
import re
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

from onelaunch.ir.errors import LoadError, UsageError
from onelaunch.runtime import artifact as artifact_module
from onelaunch.runtime import host
from onelaunch.runtime.artifact import Artifact
from onelaunch.runtime.load import load
from onelaunch.runtime.manifest import SCHEMA
from onelaunch.runtime.memory import HUGE_PAGE, Buffer
from onelaunch.tests import toy


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = toy.compiled(tmp_path_factory.mktemp("toy"))
    return toy.write_artifact(tmp_path_factory.mktemp("artifact") / "toy", library)


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "toy"))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "cache"))
    host.kernel_folder.cache_clear()


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_folder_and_zip_give_the_same_verified_content(root: Path, tmp_path: Path, form: str) -> None:
    path = root if form == "folder" else toy.zipped(root, tmp_path / "toy.ola")
    artifact = Artifact.open(path)
    weights = artifact.verify()
    assert np.array_equal(weights.view, np.arange(9_000_000, dtype=np.uint32).astype(np.uint8))
    assert weights.view.ctypes.data % HUGE_PAGE == 0
    assert artifact.tables(2).shape == (2, 2, 3, 32)
    library = artifact.library(artifact.pick_target())
    assert library.read_bytes() == (root / "kernels/cpu-toy/step.so").read_bytes()
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(library.stat().st_mode) == 0o700


NAMES = [
    "manifest.json",
    "manifest.sha256",
    "weights/weights.safetensors",
    "tables/1.npy",
    "kernels/cpu-toy/step.so",
    "kernels/cpu-best/step.so",
    "ir/final.ir",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_byte_in_any_file_is_one_error_that_names_it(root: Path, name: str, where: float) -> None:
    data = bytearray((root / name).read_bytes())
    # The sidecar is `hash  name`: only its hash says anything.
    data[int(where * (64 if name.endswith("sha256") else len(data)))] ^= 1
    (root / name).write_bytes(data)
    with pytest.raises(LoadError, match=re.escape(name.replace("sha256", "json"))) as error:
        load(root)
    assert len(error.value.reasons) == 1


def test_a_flipped_byte_inside_a_zip_is_named(root: Path, tmp_path: Path) -> None:
    path = toy.zipped(root, tmp_path / "toy.ola")
    data = bytearray(path.read_bytes())
    data[data.index(b"graph\n")] ^= 4
    path.write_bytes(data)
    with pytest.raises(LoadError, match=r"ir/final\.ir: expected sha256"):
        load(path)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a\\b", "c:evil", "x//y", "./x"])
def test_names_that_leave_the_folder_are_refused(root: Path, tmp_path: Path, name: str) -> None:
    path = toy.zipped(root, tmp_path / "toy.ola")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"evil")
    with pytest.raises(LoadError, match="plain relative path"):
        Artifact.open(path)
    toy.seal(root, files={name: "0" * 64})
    with pytest.raises(LoadError, match="plain relative path"):
        Artifact.open(root)


def test_compressed_duplicate_and_broken_zips_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="stored member"):
        Artifact.open(toy.zipped(root, tmp_path / "deflated.ola", zipfile.ZIP_DEFLATED))
    path = toy.zipped(root, tmp_path / "twice.ola")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("ir/final.ir", b"other")
    with pytest.raises(LoadError, match="got two"):
        Artifact.open(path)
    (tmp_path / "broken.ola").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LoadError, match="expected a folder or a zip"):
        Artifact.open(tmp_path / "broken.ola")
    with pytest.raises(LoadError, match="got nothing there"):
        Artifact.open(tmp_path / "absent.ola")


def test_a_cut_file_a_missing_file_and_a_stranger_are_named(root: Path) -> None:
    weights = root / "weights/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(LoadError, match=r"weights.safetensors: expected sha256"):
        load(root)
    (root / "tokenizer/extra.py").write_text("x")
    weights.unlink()
    with pytest.raises(LoadError) as error:
        load(root)
    assert "weights/weights.safetensors: expected in the artifact" in error.value.reasons[0]
    assert "tokenizer/extra.py: expected a hash" in error.value.reasons[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 1}, f"expected `schema` {SCHEMA}, got 1"),
        ({"vocab": 300}, r"expected `stride` >= vocab 300, got 272"),
        ({"vocab": "300"}, "expected `vocab` to be int, got str"),
        ({"vocab": 261}, None),
        ({"caches": [{**vars(toy.groups()[0]), "sinks": 1}]}, "expected 0 to 64 sinks, and 0 without a window, got 1"),
        ({"caches": [{**vars(toy.groups()[1]), "sinks": 65}]}, "and 0 without a window, got 65"),
        ({"caches": [{**vars(toy.groups()[1]), "sinks": 4}]}, "expected `ring_pages` 4, got 3"),
        ({"limits": {**toy.LIMITS.as_dict(), "context": 600}}, "expected `ring_pages` 10, got 8"),
        ({"limits": {**toy.LIMITS.as_dict(), "slots": 9}}, r"expected outputs >= slots"),
        ({"limits": {**toy.LIMITS.as_dict(), "drafts": 9}}, "expected drafts 0 to 3, got 9"),
        ({"limits": {**toy.LIMITS.as_dict(), "drafts": 3}}, "limits: expected outputs >= 6, got 4"),
        ({"limits": {**toy.LIMITS.as_dict(), "drafts": 1, "outputs": 6}}, "expected field `row_draft`, got none"),
        ({"workspace_bytes": 100}, "expected to end within `workspace_bytes` 100"),
        ({"state_bytes": 64}, "expected its own bytes below 64"),
        ({"state": []}, "expected field `n_rows`, got none"),
        ({"targets": {}}, "at least one target"),
        ({"bytes": {}}, "weights_per_step"),
        ({"caches": []}, "expected 1 to 8 caches, got 0"),
        ({"certificates": {}}, "expected one for 2 threads, got none"),
        ({"certificates": {"2": {"tables": "f" * 64}}}, r"certify tables/2.npy .* got ffffffffffff"),
    ],
)
def test_a_wrong_field_is_named(root: Path, changes: dict[str, object], reason: str | None) -> None:
    toy.seal(root, **changes)
    if reason is None:  # the same number of words of seen bits: nothing to tell by but the model itself
        Artifact.open(root)
        return
    with pytest.raises(LoadError, match=reason):
        load(root, threads=2)


def test_a_table_must_have_its_shape_and_no_pickles(root: Path) -> None:
    for table, reason in (
        (np.zeros((2, 1, 3, 32), np.int32), r"expected int32\[2, 2, records, 32\], got int32\[2, 1, 3, 32\]"),
        (np.zeros((2, 2, 3, 32), np.float32), r"got float32"),
        (np.array([{}], object), "expected an array, got .*allow_pickle=False"),
    ):
        np.save(root / "tables/2.npy", table)
        toy.seal(root)
        with pytest.raises(LoadError, match=reason):
            load(root, threads=2)


def test_the_best_target_of_this_machine_is_chosen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(root)
    assert artifact.pick_target().name == "cpu-toy"
    monkeypatch.setattr(artifact_module.host, "isa", lambda: frozenset({"nosuchisa"}))
    assert artifact.pick_target().name == "cpu-best"
    monkeypatch.setattr(artifact_module.host, "isa", lambda: None)
    assert artifact.pick_target().name == "cpu-toy"
    with pytest.raises(LoadError, match="`cpu-best`: expected a processor with no_such_isa, got an unknown"):
        artifact.pick_target("cpu-best")
    with pytest.raises(
        UsageError, match=r"expected one of cpu-toy, cpu-best, got `cpu-tot`(.|\n)*did you mean `cpu-toy`"
    ):
        artifact.pick_target("cpu-tot")


def test_threads_follow_the_cores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(root)
    for cores, expected in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(artifact_module.host, "cores", lambda cores=cores: cores)
        assert artifact.pick_threads() == expected
    with pytest.raises(UsageError, match="expected one of 1, 2, got 3"):
        artifact.pick_threads(3)


def test_a_library_of_another_level_or_system_is_refused(root: Path) -> None:
    raw = json.loads((root / "manifest.json").read_text())
    raw["targets"]["cpu-toy"]["level"] = 1
    toy.seal(root, targets=raw["targets"])
    with pytest.raises(LoadError, match="expected `level` 1, got 0"):
        load(root)
    (root / "kernels/cpu-toy/step.so").write_bytes(b"not a library")
    toy.seal(root)
    with pytest.raises(LoadError, match="expected a step library for this system"):
        load(root)


def test_a_damaged_cached_library_is_replaced(root: Path) -> None:
    artifact = Artifact.open(root)
    path = artifact.library(artifact.pick_target())
    path.write_bytes(b"damaged")
    assert (
        artifact.library(artifact.pick_target()).read_bytes()
        == (root / "kernels/cpu-toy/step.so").read_bytes()
    )


def test_buffers_are_zero_aligned_and_given_back() -> None:
    buffer = Buffer(5 << 20)
    assert buffer.view.ctypes.data % HUGE_PAGE == 0
    assert not buffer.view.any()
    buffer.close()
    assert buffer.view.size == 0
