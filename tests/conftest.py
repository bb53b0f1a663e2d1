"""Fixtures shared by the tests of compiled models, and how tests are dealt to processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from onelaunch.compiler import native
from onelaunch.runtime import host
from onelaunch.tests import small
from onelaunch.tests.compiled import ArtifactCache

# Models are tiny and tests run in several processes: more threads of a library only cost. Commands inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n N --dist loadgroup`: a file stays in one process, but for tests that name their group.

    Those compile for minutes: they start first, so that no process is left with one of them at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactCache]:
    """Compiles a checkpoint; see `ArtifactCache`. The processes of a run share the kernels that models share."""
    cache = ArtifactCache(tmp_path_factory.mktemp("compiled"))
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "compile_library", cache.library)
        patch.setenv("ONELAUNCH_CACHE", str(shared / "cache"))
        host.kernel_folder.cache_clear()
        yield cache
    host.kernel_folder.cache_clear()


@pytest.fixture(scope="session")
def gpu_artifact(compiled: ArtifactCache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny llama and its artifact for sm_90 and this processor; the one cubin that tests compile for it."""
    model = small.write_model(tmp_path_factory.mktemp("gpu") / "small")
    return model, compiled(model, target="sm_90,cpu", quant="int4", limits=small.GPU_LIMITS)
