"""The compiled kernel on a GPU: the checks of gpu_checks.py on tiny models, compiled for the device that is here.

Skipped without a device. What this needs of the driver is tested against a fake one (test_cuda_backend.py), which
runs the same checks on a toy model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gpu_checks
import pytest
import torch
from checkpoints import save_random
from compiled import ArtifactCache
from compiled_kernels import SIZES

LIMITS = {"rows": 16, "slots": 2, "context": 384, "outputs": 4, "kv_dtype": "f32"}
# Weights of 4 and 8 bits meet int8 activations on a processor and float16 ones on a GPU: tokens may differ at ties.
ANY_FORMAT = (
    gpu_checks.logits_are_close, gpu_checks.per_phase_is_mega, gpu_checks.two_runs_are_equal,
    gpu_checks.a_step_takes_its_time,
)  # fmt: skip
CASES = {
    "llama f32": ("llama", "", gpu_checks.CHECKS),
    "gemma3 f32": ("gemma3_text", "", gpu_checks.CHECKS),
    "qwen2 bf16": ("qwen2", "bf16", ANY_FORMAT),
    "qwen2 int8": ("qwen2", "int8", ANY_FORMAT),
    "qwen3 int4": ("qwen3", "int4", ANY_FORMAT),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="expected a CUDA device, got none: nothing runs on a GPU"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, compiled: ArtifactCache) -> Callable[[str, str], Path]:
    """The artifact of a tiny model for this device and this processor."""
    root = tmp_path_factory.mktemp("gpu")

    def artifact(family: str, quant: str) -> Path:
        if not (root / family).exists():
            save_random(root / family, family, **SIZES)
        target = "sm_{}{},cpu".format(*torch.cuda.get_device_capability())
        return compiled(root / family, target=target, quant=quant, limits=LIMITS)

    return artifact


@pytest.mark.parametrize(
    ("case", "check"),
    [(case, check) for case, (_, _, checks) in CASES.items() for check in checks],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_gpu(models: Callable[[str, str], Path], tmp_path: Path, case: str, check: Callable[..., None]) -> None:
    family, quant, _ = CASES[case]
    gpu_checks.run(check, models(family, quant), tmp_path)
