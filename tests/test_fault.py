"""A schedule whose signal never comes must end as an error that names the wait, not as a hang."""

import numpy as np
import pytest
from checkpoints import save_random

from onelaunch.compiler.build import LEVELS, compile_library
from onelaunch.ir.table import FIELDS
from onelaunch.runtime import Artifact, StepFault
from onelaunch.runtime.cache import page_counts
from onelaunch.runtime.cpu import CpuBackend
from onelaunch.runtime.memory import Memory

SIGNAL = FIELDS.index("signal")


def _checkpoint(folder):
    save_random(folder, "llama", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def impatient(compiled, tmp_path_factory):
    """An artifact and its step library built with a deadline of a fifth of a second."""
    folder = tmp_path_factory.mktemp("impatient")
    artifact = Artifact.open(compiled(_checkpoint(folder / "model"), limits={"context": 256}))
    target = artifact.pick_target()
    library, kernels = folder / "step.so", artifact.path / f"kernels/{target.name}"
    step = folder / "step.cpp"
    step.write_text("#define OL_WAIT_SECONDS 0.2\n" + (kernels / "step.cpp").read_text())
    others = [path for path in kernels.glob("*.cpp") if path.name != step.name]
    compile_library([step, *others], library, LEVELS[target.name])
    return artifact, target, library


def run(impatient, change):
    artifact, target, library = impatient
    manifest = artifact.manifest
    tables = artifact.tables(2).copy()
    change(tables)
    memory = Memory.allocate(manifest, tables, artifact.verify(), page_counts(manifest.caches, manifest.limits, None))
    backend = CpuBackend(library, target, manifest, memory)
    state = backend.state
    state.n_rows[0] = 1
    try:
        backend.step()
    finally:
        backend.close()


def test_an_intact_table_runs(impatient):
    run(impatient, lambda tables: None)


@pytest.mark.parametrize("worker", [0, 1])
def test_a_dropped_signal_is_a_fault_that_names_worker_record_and_event(impatient, worker):
    def drop_first_signal(tables):
        words = tables[0, worker, :, SIGNAL]
        words[np.argmax(words >= 0)] = -1

    with pytest.raises(StepFault, match=r"stopped at record \d+: expected 2 signals of event 0, got 1"):
        run(impatient, drop_first_signal)
