"""Prefix reuse through the CUDA backend, with the toy model as kernel: see cuda_protocol.py, which says how it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from onelaunch.ir.errors import VerifyError
from onelaunch.runtime import load
from onelaunch.tests.cuda_fake import Fake, fake, root
from onelaunch.tests.toy import NAN, answer

__all__ = ["fake", "root"]  # fixtures

STEM = [i % 250 for i in range(200)]


def test_shared_pages_on_a_device_say_what_each_prompt_says_alone(fake: Fake, root: Path) -> None:
    """Bursts move rings on: the device must have the new page table before it writes."""
    with load(root, kv_tokens=512) as model:
        for _ in range(2):
            prompts = [[*STEM, i] for i in range(4)]
            results = model.generate(prompts, max_new_tokens=120, stop_tokens=[])
            for prompt, result in zip(prompts, results, strict=True):
                assert result.tokens == answer(prompt, 120)
        assert [result.reused_tokens for result in results[1:]] == [192] * 3


def test_pages_that_a_device_clears_are_not_those_others_read(fake: Fake, root: Path) -> None:
    with load(root) as model:
        other = model.stream([*STEM, 1], max_new_tokens=60, stop_tokens=[])
        next(other)
        fake.log()
        with pytest.raises(VerifyError, match="not-a-number"):
            model.generate([*STEM, NAN], max_new_tokens=5)
        cleared = [line for line in fake.log() if line.startswith("cuMemsetD2D8Async")]
        assert len(cleared) == 2  # of four pages a group, three are the other's too
        assert list(other)
        assert other.result.tokens == answer([*STEM, 1], 60)
        again = model.generate([*STEM, 2], max_new_tokens=30, stop_tokens=[])
        assert again.tokens == answer([*STEM, 2], 30)
