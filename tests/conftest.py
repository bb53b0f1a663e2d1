"""Fixtures shared by the tests of compiled models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from onelaunch.compiler import native
from onelaunch.runtime import host
from onelaunch.tests import small
from onelaunch.tests.compiled import ArtifactCache


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactCache]:
    """Compiles a checkpoint; see `ArtifactCache`."""
    cache = ArtifactCache(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "compile_library", cache.library)
        patch.setenv("ONELAUNCH_CACHE", str(tmp_path_factory.mktemp("kernels")))
        host.kernel_folder.cache_clear()
        yield cache
    host.kernel_folder.cache_clear()


@pytest.fixture(scope="session")
def gpu_artifact(compiled: ArtifactCache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny llama and its artifact for sm_90 and this processor; the one cubin that tests compile for it."""
    model = small.write_model(tmp_path_factory.mktemp("gpu") / "small")
    return model, compiled(model, target="sm_90,cpu", quant="int4", limits=small.GPU_LIMITS)
