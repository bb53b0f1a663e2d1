"""The test's end of fake_cuda.cpp, and toy artifacts with a CUDA target."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onelaunch.ir.segments import BODY, SIGNAL, TARGETS, WAITS
from onelaunch.runtime import cuda_driver
from onelaunch.tests import toy

PARAMS = ["table", "control", "weights", "workspace", "state", "kv0", "kv1", "stream", "records", "chunks"]
PARAMS += ["global_scratch", "profile_scratch"]
SM90 = {
    "kind": "cuda", "arch": "sm_90", "cubin": "kernels/sm_90/step.cubin", "entry": "step", "num_warps": 8,
    "shared": 100_000, "params": [[p, "i32" if p in ("records", "chunks") else "*i32"] for p in PARAMS],
    "workers": [8, 66, 132], "control_words": 64 + 32 * 5, "min_driver": "580",
}  # fmt: skip


class Fake:
    """The fake driver's side channel: settings, the log of calls, what is alive."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_take.restype = ctypes.c_char_p
        self._library.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_int64)
        self.live, self.reset = self._library.fake_live, self._library.fake_reset

    def set(self, **values: int) -> None:
        for name, value in values.items():
            self._library.fake_set(name.replace("fail_", "fail ").encode(), value)

    def log(self) -> list[str]:
        """The calls since it was last asked."""
        return self._library.fake_take(0).decode().splitlines()

    def violations(self) -> list[str]:
        return self._library.fake_take(1).decode().splitlines()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(cuda_driver, "RELEASE", tmp_path / "release")
    fake = Fake()
    fake.reset()
    yield fake
    assert fake.violations() == []
    assert fake.live() == 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An artifact for sm_90 alone. The last body of a table says its bucket and worker count."""
    return write(tmp_path / "toy")


def table(workers: int) -> np.ndarray:
    """Both buckets: two records of every worker, each of which all of the next wait for; worker 0 then commits."""
    words = np.zeros((2, workers, 4, 32), np.int32)
    words[:, :, :, [BODY, *WAITS, SIGNAL]] = -1
    words[:, :, :2, BODY] = words[:, :, :2, SIGNAL] = 0, 1
    words[:, 0, 2, BODY] = 1000 + workers, 2000 + workers
    words[:, :, 1, WAITS[0]], words[:, 0, 2, WAITS[0]] = 0, 1
    words[:, :, 1, TARGETS[0]] = words[:, 0, 2, TARGETS[0]] = workers
    return words


def write(root: Path, cpu: bool = False, cubin: str = "", **changes: Any) -> Path:
    target = {**SM90, **changes}
    for name in ("tables", "weights", "kernels/sm_90", "tokenizer"):
        (root / name).mkdir(parents=True)
    toy.write_tokenizer(root / "tokenizer")
    header = json.dumps({"w": {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(range(250)) * 4
    (root / "weights/weights.safetensors").write_bytes(data)
    for entry in target.get("entries", {"both": {}}).values():
        kernel = {**target, **entry}
        text = cubin or f"{target['arch']} entry={kernel['entry']} params={','.join(PARAMS)}"
        (root / kernel["cubin"]).write_bytes(text.encode() + b"\0")
    names = [f"{target['arch']}-{count}" for count in target["workers"]] + (["1"] if cpu else [])
    for name in names:
        workers = int(name.split("-")[-1])
        np.save(root / f"tables/{name}.npy", table(workers))
        np.save(root / f"tables/{name}.stream.npy", np.zeros((workers, 16), np.int64))
    targets: dict[str, Any] = {target["arch"]: target}
    if cpu:
        (root / "kernels/cpu-toy").mkdir()
        (root / "kernels/cpu-toy/step.so").write_bytes(Path(os.environ["TOY_STEP"]).read_bytes())
        targets["cpu-toy"] = {"library": "kernels/cpu-toy/step.so", "level": 0, "isa": []}
    seal(root, targets, names)
    return root


def seal(root: Path, targets: dict[str, Any], names: list[str]) -> None:
    proofs = {n: {"tables": hashlib.sha256((root / f"tables/{n}.npy").read_bytes()).hexdigest()} for n in names}
    files = {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }
    manifest = toy.manifest({"tables/1.npy": "", "tables/2.npy": ""})
    (root / "manifest.json").write_text(
        json.dumps({**manifest, "targets": targets, "certificates": proofs, "files": files})
    )


def called(log: list[str]) -> list[str]:
    return [line.split()[0] for line in log]
