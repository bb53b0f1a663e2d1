"""What --target means: processors, architectures, machines, and machines of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from onelaunch.compiler.build import host_level
from onelaunch.compiler.driver import Request, request_targets
from onelaunch.compiler.gpu.machines import TARGETS
from onelaunch.compiler.target_list import parse_targets
from onelaunch.ir.errors import UsageError


@pytest.mark.parametrize(
    ("text", "levels", "gpus"),
    [
        ("auto", [host_level().name], []),
        ("cpu-avx2, cpu-portable", ["cpu-avx2", "cpu-portable"], []),
        ("h100", [], [("sm_90", (132,))]),
        ("sm_120,sm_80,cpu-portable", ["cpu-portable"], [("sm_80", (108,)), ("sm_120", (170,))]),
        ("l4,rtx4090", [], [("sm_89", (58, 128))]),
        ("RTX 4090,sm_89,sm_90a,h200", [], [("sm_89", (128,)), ("sm_90", (132,))]),
    ],
)
def test_names_are_grouped_by_architecture(text: str, levels: list[str], gpus: list[tuple[str, object]]) -> None:
    found = parse_targets(text)
    assert [level.name for level in found.levels] == levels
    assert [(gpu.arch, gpu.workers) for gpu in found.gpus] == gpus


def test_a_machine_of_ones_own_is_a_target(tmp_path: Path) -> None:
    text = (TARGETS / "h100.toml").read_text().replace('"h100"', '"my-card"')
    (tmp_path / "my.toml").write_text(text.replace("sms = { value = 132", "sms = { value = 9"))
    (gpu,) = parse_targets("h100,my-card", [tmp_path / "my.toml"]).gpus
    assert gpu.workers == (9, 132)
    with pytest.raises(UsageError, match="got `my-card`"):
        parse_targets("my-card")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("h10", "expected auto, cpu, cpu-avx512, .*, h100, .*got `h10`(.|\\n)*did you mean `h100`"),
        ("sm_90,", "got ``"),
        ("sm_91", "--target: expected one of sm_80, .*, got `sm_91`"),
    ],
)
def test_a_name_that_is_none_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_targets(text)


def test_threads_need_a_processor() -> None:
    request = Request(Path("m"), Path("m.ola"), "sm_90", workers=(2,))
    with pytest.raises(UsageError, match="--threads: expected a processor among the targets"):
        request_targets(request)
