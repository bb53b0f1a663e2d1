"""Machines: the files we ship are complete and plausible; a user's file works or ends in one clear error."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from onelaunch.compiler.gpu import machines as registry
from onelaunch.compiler.gpu.machines import (
    ARCHES,
    CONFIDENCE,
    EXTRA,
    FIGURES,
    REQUIRED,
    TARGETS,
    Machine,
    details,
    machine_for,
    machines,
    read_machine,
    table,
)
from onelaunch.ir.errors import CompileError
from onelaunch.ir.formats import FORMATS

WANTED = {
    "a100": "sm_80", "a10": "sm_86", "rtx3090": "sm_86", "l4": "sm_89", "l40s": "sm_89", "rtx4090": "sm_89",
    "h100": "sm_90", "h200": "sm_90", "b200": "sm_100", "rtx5090": "sm_120", "gb10": "sm_121",
}  # fmt: skip
FP32_LANES = {"sm_80": 64}  # per SM; 128 from sm_86 on
FILES = sorted(TARGETS.glob("*.toml"))


@pytest.fixture(autouse=True)
def no_folders_of_the_host(monkeypatch):
    monkeypatch.delenv(EXTRA, raising=False)


def entry(value: object, source: str = "a test") -> str:
    return f'{{ value = {value}, confidence = "measured", source = "{source}" }}'


def text(**changes: str | None) -> str:
    """A complete user file of an sm_89 card; a change replaces, adds or (None) drops the line of its key."""
    lines: dict[str, str | None] = {
        "name": '"rtx4080"', "title": '"GeForce RTX 4080"', "arch": '"sm_89"', "sms": entry(76),
        "memory_gb": entry(16), "bandwidth_gb_s": entry(716.8), "l2_bytes": entry(67108864), "boost_mhz": entry(2505),
        "fp32_tflops": entry(48.7), "bf16_tflops": entry(97.5),
    }  # fmt: skip
    return "".join(f"{key} = {value}\n" for key, value in {**lines, **changes}.items() if value is not None)


@pytest.fixture
def user_file(tmp_path):
    def write(content: str | bytes, name: str = "mine.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def failure(path: Path) -> CompileError:
    with pytest.raises(CompileError) as caught:
        machines([path])
    assert str(path) in str(caught.value)
    return caught.value


# Our files


def test_the_machines_we_promise_are_there():
    assert {name: m.arch for name, m in machines().items()} == WANTED


def test_a_file_has_the_name_of_its_machine():
    assert all(m.path.stem == name for name, m in machines().items())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_figure_says_where_it_comes_from(path):
    data = tomllib.loads(path.read_text())
    tables = data.values() if path.name == ARCHES else [data]
    for figures in tables:
        for key, value in figures.items():
            if isinstance(value, dict):
                assert key in FIGURES
                assert value["confidence"] in CONFIDENCE
                assert len(value["source"]) > 12, key
                assert path.name == ARCHES or value["confidence"] != "vendor" or "NVIDIA" in value["source"], key


def test_costs_nobody_measured_are_marked_as_assumed():
    for m in machines().values():
        for key in ("launch_us", "boundary_us", "join_us"):
            assert m.evidence[key].confidence in ("assumed", "measured")


@pytest.mark.parametrize("name", WANTED)
def test_float32_rate_agrees_with_lanes_and_clock(name):
    m = machines()[name]
    computed = 2 * FP32_LANES.get(m.arch, 128) * m.sms * m.boost_mhz * 1e-6
    assert m.fp32_tflops == pytest.approx(computed, rel=0.05)


@pytest.mark.parametrize("name", WANTED)
def test_tensor_rates_are_dense_and_in_order(name):
    m = machines()[name]
    per_clock = m.bf16_tflops * 1e6 / (m.sms * m.boost_mhz)  # operations per SM and clock: a power of two, nearly
    whole = {"sm_80": 2048, "sm_86": 1024, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 512, "sm_121": 1024}
    expected = whole[m.arch] / (2 if name in ("rtx3090", "rtx4090") else 1)
    assert per_clock == pytest.approx(expected, rel=0.1)
    rates = [r for r in (m.bf16_tflops, m.fp8_tflops, m.fp4_tflops) if r is not None]
    assert all(1.9 < b / a < 4.1 for a, b in pairwise(rates))
    assert m.int8_tops is not None
    assert 1.9 < m.int8_tops / m.bf16_tflops < 4.1


@pytest.mark.parametrize("name", WANTED)
def test_a_machine_has_the_low_precision_paths_of_its_architecture(name):
    m = machines()[name]
    number = int(m.arch.removeprefix("sm_"))
    assert (m.fp8_tflops is not None) == (number >= 89)
    assert (m.fp4_tflops is not None) == (number >= 100)


@pytest.mark.parametrize("name", WANTED)
def test_limits_of_an_sm_are_plausible(name):
    m = machines()[name]
    assert m.shared_bytes_per_sm - m.shared_bytes_per_block == 1024  # what the driver keeps per block
    assert m.registers_per_sm == 65536
    assert m.threads_per_sm in (1536, 2048)
    assert m.threads_per_sm % m.blocks_per_sm == 0
    assert m.l2_bytes % 2**20 == 0
    assert 4 < m.memory_gb * 1e3 / m.bandwidth_gb_s < 600  # ms to read all of it


def test_every_architecture_has_a_reference_machine_of_its_own():
    arches = tomllib.loads((TARGETS / ARCHES).read_text())
    assert set(arches) == {"all", *WANTED.values()}
    for arch, shared in arches.items():
        assert arch == "all" or WANTED[shared["reference"]] == arch


def test_required_figures_are_all_but_the_optional_rates():
    assert set(FIGURES) - set(REQUIRED) == {"fp8_tflops", "int8_tops", "fp4_tflops"}


def test_a_machine_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        machines()["h100"].sms = 1


# What is computed from them


def test_issue_budget_is_lanes_times_clock_over_weights_read():
    h100 = dataclasses.replace(machines()["h100"], boost_mhz=1750)
    assert h100.issue_budget(4.5) == pytest.approx(132 * 128 * 1.75e9 / (3.35e12 / (4.5 / 8)))
    assert h100.issue_budget(4.5) == pytest.approx(5.0, abs=0.05)  # NVFP4
    assert h100.issue_budget(8) == pytest.approx(9, abs=0.2)  # FP8


def test_floor_is_bytes_over_bandwidth():
    assert machines()["h200"].floor_us(4.8e9) == pytest.approx(1000)


def test_table_has_a_plain_row_per_machine():
    rows = table()
    assert [r["name"] for r in rows] == list(machines())
    assert json.loads(json.dumps(rows)) == rows
    h100 = next(r for r in rows if r["name"] == "h100")
    assert h100["issue_4bit"] == machines()["h100"].issue_budget(FORMATS["q4_0"].packed_bits)
    assert h100["assumed"] == [
        "launch_us", "boundary_us", "join_us", "read_fraction", "sm_share", "l2_bytes_per_clock", "l2_latency_us",
        "memory_latency_us",
    ]  # fmt: skip


def test_details_give_every_figure_with_its_source():
    rows = details(machines()["a100"])
    assert [r["figure"] for r in rows] == [f for f in FIGURES if f not in ("fp8_tflops", "fp4_tflops")]
    assert all(r["source"] and r["confidence"] in CONFIDENCE for r in rows)


# Names


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("h100", "h100"), ("H100", "h100"), ("RTX 4090", "rtx4090"), ("rtx-5090", "rtx5090"), ("sm_90", "h100"),
     ("sm_90a", "h100"), ("sm_100a", "b200"), ("sm_120f", "rtx5090"), ("SM_86", "rtx3090"), ("sm_121", "gb10")],
)  # fmt: skip
def test_a_machine_is_found_by_name_or_architecture(wanted, name):
    assert machine_for(wanted).name == name


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(CompileError) as caught:
        machine_for("h10O")
    assert caught.value.reasons[0].startswith("target: expected one of a100, ")
    assert "did you mean `h100`?" in caught.value.hint or "did you mean `h200`?" in caught.value.hint


def test_an_unknown_architecture_is_refused():
    with pytest.raises(CompileError, match=r"expected one of sm_80, sm_86, .*got `sm_75`"):
        machine_for("sm_75")


# User files


def test_a_user_file_adds_a_machine_and_takes_limits_from_its_architecture(user_file):
    found = machines([user_file(text())])
    assert set(found) == {*WANTED, "rtx4080"}
    mine = found["rtx4080"]
    assert (mine.sms, mine.shared_bytes_per_block, mine.blocks_per_sm) == (76, 101376, 24)
    assert mine.evidence["sms"].confidence == "measured"
    assert mine.fp8_tflops is None
    assert machine_for("RTX 4080", found) is mine
    assert machine_for("sm_89", found).name == "rtx4090"


def test_a_user_file_may_state_costs_of_its_own(user_file):
    mine = read_machine(user_file(text(join_us=entry(1.2))))
    assert (mine.join_us, mine.evidence["join_us"].confidence) == (1.2, "measured")


def test_folders_of_the_environment_are_searched(user_file, monkeypatch, tmp_path):
    user_file(text())
    other = tmp_path / "more"
    other.mkdir()
    (other / "b.toml").write_text(text(name='"second"'))
    monkeypatch.setenv(EXTRA, os.pathsep.join([str(tmp_path), str(other)]))
    assert {"rtx4080", "second"} <= set(machines())


def test_the_same_file_named_twice_is_one_machine(user_file, monkeypatch, tmp_path):
    path = user_file(text())
    monkeypatch.setenv(EXTRA, str(tmp_path))
    assert "rtx4080" in machines([path])


def test_an_architecture_of_the_users_own_needs_all_limits(user_file):
    limits = {
        "shared_bytes_per_sm": entry(233472), "shared_bytes_per_block": entry(232448), "threads_per_sm": entry(2048),
        "blocks_per_sm": entry(32),
    }  # fmt: skip
    error = failure(user_file(text(arch='"sm_103"')))
    assert [r.split(":")[0] for r in error.reasons] == [*(f"`{key}`" for key in limits), "`arch`"]
    found = machines([user_file(text(arch='"sm_103"', **limits))])
    assert machine_for("sm_103a", found).name == "rtx4080"
    second = user_file(text(name='"other"', arch='"sm_103"', **limits), "second.toml")
    with pytest.raises(CompileError, match="expected one machine, got `sm_103`, which is rtx4080, other"):
        machine_for("sm_103", machines([user_file(text(arch='"sm_103"', **limits)), second]))


WRONG = [
    ({"sm_count": entry(3)}, "`sm_count`: expected a known key, got an unknown one"),
    ({"sms": None}, "`sms`: expected a figure, got none"),
    ({"sms": "76"}, "`sms`: expected { value, confidence, source }, got `76`"),
    ({"sms": entry("76.0")}, "`sms.value`: expected an integer from 1 to 1024, got `76.0`"),
    ({"sms": entry("true")}, "`sms.value`: expected an integer from 1 to 1024, got `True`"),
    ({"sms": entry('"76"')}, "`sms.value`: expected an integer from 1 to 1024, got `76`"),
    ({"bandwidth_gb_s": entry(0.7168)}, "`bandwidth_gb_s.value`: expected a number from 20 to 100000, got `0.7168`"),
    ({"bandwidth_gb_s": entry("nan")}, "`bandwidth_gb_s.value`: expected a number from 20 to 100000, got `nan`"),
    ({"boost_mhz": entry(2505000000)}, "`boost_mhz.value`: expected an integer from 200 to 10000, got `2505000000`"),
    ({"l2_bytes": entry(64)}, "`l2_bytes.value`: expected an integer from 262144 to 4294967296, got `64`"),
    ({"sms": entry(76, source=" ")}, "`sms.source`: expected where the figure comes from, got ` `"),
    ({"sms": '{ value = 76, source = "x" }'},
     "`sms.confidence`: expected one of vendor, derived, measured, assumed, got none"),
    ({"sms": '{ value = 76, confidence = "sure", source = "x" }'},
     "`sms.confidence`: expected one of vendor, derived, measured, assumed, got `sure`"),
    ({"sms": '{ value = 76, confidence = "vendor", source = "x", unit = "SM" }'},
     "`sms.unit`: expected a known key, got an unknown one"),
    ({"name": None}, "`name`: expected a name of a-z, 0-9, - and _, got none"),
    ({"name": '"RTX 4080"'}, "`name`: expected a name of a-z, 0-9, - and _, got `RTX 4080`"),
    ({"name": '"sm_89"'}, "`name`: expected something else than an architecture, got `sm_89`"),
    ({"title": "4"}, "`title`: expected a line of text, got `4`"),
    ({"arch": '"ada"'}, "`arch`: expected an architecture such as `sm_90`, got `ada`"),
    ({"arch": "89"}, "`arch`: expected an architecture such as `sm_90`, got `89`"),
    ({"shared_bytes_per_block": entry(102401)},
     "`shared_bytes_per_block`: expected at most `shared_bytes_per_sm` = 102400, got 102401"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), WRONG, ids=[reason[:48] for _, reason in WRONG])
def test_a_wrong_user_file_is_one_error_that_names_the_key(user_file, changes, reason):
    assert failure(user_file(text(**changes))).reasons[0] == reason


def test_a_misspelt_key_is_answered_with_the_nearest(user_file):
    assert failure(user_file(text(boost_mzh=entry(2505), boost_mhz=None))).hint == "did you mean `boost_mhz`?"


def test_all_reasons_come_at_once(user_file):
    error = failure(user_file(text(name=None, sms="1", memory_gb=None, colour='"red"')))
    assert [r.split(":")[0] for r in error.reasons] == ["`name`", "`sms`", "`colour`", "`memory_gb`"]


@pytest.mark.parametrize("name", ["h100", "rtx-4090"])
def test_a_name_that_is_taken_is_refused(user_file, name):
    error = failure(user_file(text(name=f'"{name}"')))
    assert error.reasons[0].startswith(f"`name`: expected a name of its own, got `{name}`: ")
    assert f"{name.replace('-', '')}.toml" in error.reasons[0]


def test_two_user_files_cannot_share_a_name(user_file):
    first, second = user_file(text()), user_file(text(), "second.toml")
    with pytest.raises(CompileError, match="expected a name of its own, got `rtx4080`") as caught:
        machines([first, second])
    assert caught.value.place == str(second)


DAMAGED = [
    ("name = \n", "expected TOML, got: invalid value", ":1:8"),
    ("a = 1\nb = {\n", "expected TOML, got: ", ""),
    (text() + "sms = 3\n", "expected TOML, got: cannot overwrite a value", ":11:8"),
    (b"name = \"\xff\"\n", "expected UTF-8, got 0xff at byte 8", ""),
    (b"#" * (2 << 20), "expected a machine file of at most 1048576 bytes, got 2097152", ""),
    ("a = " + "[" * 100_000, "expected TOML, got an absurd nesting depth", ""),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason", "where"), DAMAGED, ids=[reason[-20:] for _, reason, _ in DAMAGED])
def test_a_damaged_file_is_one_error_with_its_place(user_file, content, reason, where):
    path = user_file(content)
    error = failure(path)
    assert len(error.reasons) == 1
    assert error.reasons[0].startswith(reason)
    assert f" --> {path}{where}" in error.show()


def test_a_missing_file_and_an_empty_folder_are_errors(tmp_path):
    assert "no such file" in failure(tmp_path / "none.toml").reasons[0]
    assert failure(tmp_path).reasons == ("expected a folder with .toml files, got none",)


def test_the_dataclass_says_what_a_file_may_say():
    plain = {f.name for f in dataclasses.fields(Machine)} - set(FIGURES)
    assert plain == {*registry.WORDS, "evidence", "path"}


def test_the_command_lists_machines_and_sources(capsys):
    from onelaunch.compiler.cli import main

    assert main(["targets"]) == 0
    assert "sm_90" in capsys.readouterr().out
    assert main(["targets", "h100", "--json"]) == 0
    assert all({"figure", "value", "confidence", "source"} == set(row) for row in json.loads(capsys.readouterr().out))
    assert main(["targets", "h1000"]) == 3
