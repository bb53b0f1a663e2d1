"""Which device, target and worker count the CUDA backend picks, and how it says no.

Run by test_cuda_backend.py in a process of its own that finds the fake driver of fake_cuda.cpp as libcuda.so.1. This
tests the checks before a launch; nothing here ran on a GPU, and no device code was executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onelaunch.compiler.doctor import examine_artifact, examine_gpus
from onelaunch.ir.errors import HostError, LoadError, UsageError
from onelaunch.runtime import cuda_driver, load
from onelaunch.runtime.cuda import probe
from onelaunch.tests.cuda_fake import PARAMS, SM90, Fake, called, fake, root, write
from onelaunch.tests.toy import answer

__all__ = ["fake", "root"]  # fixtures


@pytest.mark.parametrize(
    ("sms", "per_sm", "asked", "expected"),
    [(132, 1, None, 132), (131, 1, None, 66), (66, 2, None, 132), (8, 1, None, 8), (132, 2, None, 132), (132, 1, 8, 8)],
)
def test_the_most_workers_that_are_resident_together_are_chosen(
    fake: Fake, root: Path, sms: int, per_sm: int, asked: int | None, expected: int
) -> None:
    fake.set(sms=sms, per_sm=per_sm)
    with load(root, threads=asked) as model:
        assert model.threads == expected


@pytest.mark.parametrize(
    ("settings", "asked", "kind", "reason"),
    [
        ({"sms": 7}, None, HostError, r"expected 8 thread blocks at once, got 7 .1 on each of 7 SMs"),
        ({"sms": 66}, 132, HostError, r"expected 132 thread blocks at once, got 66"),
        ({"per_sm": 0}, None, HostError, r"got 0(.|\n)*more registers or shared memory"),
        ({}, 5, UsageError, "expected one of 8, 66, 132, got 5"),
        ({"shared": 65536}, None, HostError, "expected 100000 bytes of shared memory per block, got 65536"),
        ({"threads": 128}, None, HostError, "blocks of at most 128 threads, got 256"),
        ({"cooperative": 0}, None, HostError, "cooperative launches"),
        ({"memory": 10_000}, None, HostError, r"expected 0.00 GiB on Fake GPU .*got 0.00 GiB free of 0.00"),
        ({"largest": 5000}, None, HostError, "GiB for `weights`, got none of .* GiB free"),
        ({"fail_cuModuleLoadData": 209}, None, HostError, "NO_BINARY_FOR_GPU from a driver for CUDA 13.0 on sm_90"),
        ({"fail_cuModuleLoadData": 200}, None, HostError, r"INVALID_IMAGE(.|\n)*580 is needed"),
        ({"fail_cuMemHostRegister": 2}, None, HostError, "cuMemHostRegister failed with CUDA_ERROR_OUT_OF_MEMORY"),
        ({"fail_cuLaunchKernelEx": 720}, None, HostError, "COOPERATIVE_LAUNCH_TOO_LARGE"),
        ({"fail_cuGraphInstantiate": 999}, None, HostError, "cuGraphInstantiate failed with CUDA_ERROR_UNKNOWN"),
        ({"fail_cuDevicePrimaryCtxRetain": 46}, None, HostError, "DEVICE_UNAVAILABLE(.|\n)*another process"),
    ],
)  # fmt: skip
def test_what_a_device_lacks_is_named_and_nothing_is_left_behind(
    fake: Fake, root: Path, settings: dict[str, int], asked: int | None, kind: type[Exception], reason: str
) -> None:
    fake.set(**settings)
    with pytest.raises(kind, match=reason):
        load(root, threads=asked)
    assert fake.live() == 0


@pytest.mark.parametrize(
    ("arch", "device", "runs"),
    [
        ("sm_90", (9, 0), True), ("sm_80", (8, 6), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True), ("sm_120a", (12, 1), False), ("sm_120", (12, 1), True), ("sm_100", (10, 3), True),
        ("sm_100a", (10, 3), False), ("sm_90", (8, 6), False),
    ],
)  # fmt: skip
def test_machine_code_runs_within_its_major_version(
    fake: Fake, tmp_path: Path, arch: str, device: tuple[int, int], runs: bool
) -> None:
    fake.set(major=device[0], minor=device[1])
    root = write(tmp_path / arch, arch=arch)
    if runs:
        load(root).close()
        return
    with pytest.raises(LoadError, match=rf"expected a device that runs {arch} code, got sm_\d+ \(Fake GPU\)") as error:
        load(root)
    assert error.value.exit_code == 3


def test_an_artifact_for_both_runs_where_it_can(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path / "both", cpu=True)
    for settings, asked, expected in (
        ({}, None, "sm_90"),
        ({}, "cpu-toy", "cpu-toy"),
        ({"major": 8}, None, "cpu-toy"),
        ({"major": 9, "sms": 7}, None, "cpu-toy"),  # the smallest table is for 8 workers
        ({"sms": 132, "devices": 0}, None, "cpu-toy"),
    ):
        fake.set(**settings)
        with load(root, target=asked) as model:
            assert model.target == expected
            assert model.generate([3, 1], max_new_tokens=20).tokens == answer([3, 1], 20)
    with pytest.raises(HostError, match="CUDA_ERROR_NO_DEVICE") as error:
        load(root, target="sm_90")
    assert error.value.exit_code == 5
    with pytest.raises(UsageError, match="expected one of cpu-toy, sm_90, got `sm_91`"):
        load(root, target="sm_91")


def test_the_device_option_decides(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path / "both", cpu=True)
    for device, expected in (("auto", "sm_90"), ("cuda", "sm_90"), ("cpu", "cpu-toy")):
        with load(root, device=device) as model:
            assert model.target == expected
    fake.set(sms=7)
    with pytest.raises(HostError, match="expected 8 thread blocks at once, got 7"):
        load(root, device="cuda")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "used here"),
        ({"major": 8, "minor": 6}, "not used: target `sm_90`: expected a device that runs sm_90 code, got sm_86"),
        ({"sms": 7}, "not used: target `sm_90`: expected 8 thread blocks at once, got 7 (1 on each of 7 SMs"),
        ({"devices": 0}, "not used: cuda: cuInit failed with CUDA_ERROR_NO_DEVICE"),
        ({"shared": 65536}, "not used: target `sm_90`: expected 100000 bytes of shared memory per block"),
    ],
)
def test_doctor_explains_a_device(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], said: str
) -> None:
    root = write(tmp_path / "both", cpu=True)
    fake.set(**settings)
    found = {f.name: f.value for f in examine_artifact(root)}
    assert found["target sm_90"].startswith(said)
    assert found["target cpu-toy"] == ("used here" if settings else "runs here, but `sm_90` is used")
    devices = [f.value for f in examine_gpus()]
    assert any("Fake GPU: sm_" in value for value in devices) or settings == {"devices": 0}


def test_an_old_driver_is_refused_by_its_release(fake: Fake, root: Path) -> None:
    cuda_driver.RELEASE.write_text("575.57.08\n")
    with pytest.raises(HostError, match=r"expected NVIDIA driver 580 or newer, got 575.57.08 \(CUDA 13.0\)"):
        load(root)
    cuda_driver.RELEASE.write_text("580.65.06\n")
    load(root).close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cubin_params": PARAMS[:-1]}, r"expected `params` of \[8, .*, 8\] bytes"),
        ({"entry": "other"}, "expected a kernel `other`, got none"),
        ({"params": SM90["params"][:-3]}, "expected `params` chunks, control, .*, got table"),
        ({"params": [*SM90["params"], ["x", "*i32"]]}, "expected `params` chunks, control"),
        ({"params": [[p, "*i32"] for p in PARAMS]}, "param `records`: expected i32, got `\\*i32`"),
        ({"arch_field": "compute_90"}, "expected `arch` like sm_90"),
        ({"workers": []}, "positive `workers`"),
        ({"control_words": 3}, "expected `control_words` >= 64, got 3"),
        ({"num_warps": 64}, "1 to 32 `num_warps`"),
        ({"entries": {"few": {}, "many": {"shared": -1}}}, "`shared` >= 0"),
        ({"entries": {"few": {}, "many": {"entry": 7, "cubin": "a.cubin", "num_warps": "x"}}}, "has the wrong type"),
    ],
)
def test_a_target_that_does_not_fit_its_kernel_is_refused(
    fake: Fake, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    listed = changes.pop("cubin_params", PARAMS)
    arch = changes.pop("arch_field", "sm_90")
    root = write(tmp_path / "wrong", cubin=f"sm_90 entry=step params={','.join(listed)}", **changes)
    if arch != "sm_90":
        raw = json.loads((root / "manifest.json").read_text())
        raw["targets"]["sm_90"]["arch"] = arch
        (root / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(LoadError, match=reason):
        load(root)


def test_a_damaged_cubin_or_an_uncertified_table_is_not_run(fake: Fake, root: Path) -> None:
    raw = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**raw, "certificates": {}}))
    with pytest.raises(LoadError, match="expected one for `sm_90-132`, got none"):
        load(root)
    (root / SM90["cubin"]).write_bytes(b"sm_90 entry=evil\0")
    with pytest.raises(LoadError, match=r"step\.cubin: expected sha256"):
        load(root)
    assert "cuGraphLaunch" not in called(fake.log())


def test_bandwidth_counts_read_and_written_bytes_of_copies(fake: Fake, root: Path) -> None:
    total = 4_000_000
    with load(root) as model:
        live = fake.live()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("onelaunch.runtime.cuda.PROBE_TOTAL", total)
            assert model.read_gbps() == pytest.approx(2 * total / 2e-3 * 1e-9)  # the fake's clock: 2 ms
        assert fake.live() == live


def test_probe_tells_driver_and_devices(fake: Fake) -> None:
    cuda_driver.RELEASE.write_text("580.65.06\n")
    found = probe()
    assert (found["driver"], found["release"]) == ("13.0", "580.65.06")
    assert found["devices"] == [
        {"ordinal": 0, "name": "Fake GPU", "major": 9, "minor": 0, "sms": 132, "memory": 80 << 30, "shared": 232448,
         "cooperative": True, "arch": "sm_90"}
    ]  # fmt: skip
    fake.set(devices=0)
    found = probe()
    assert found["devices"] == []
    assert "CUDA_ERROR_NO_DEVICE" in found["error"]
