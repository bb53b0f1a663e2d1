"""GPU machines as data: what the cost model, the tuner and the resource checks know about a target.

A machine is one TOML file in `targets/`; its figures are tables that say where the number comes from:

    name = "h100"
    title = "NVIDIA H100 80GB SXM5"
    arch = "sm_90"
    sms = { value = 132, confidence = "vendor", source = "NVIDIA H100 whitepaper" }

Figures that all machines of an architecture share are in `targets/arches.toml`; a machine may state its own. To
add a machine: one file, here, in a folder of $ONELAUNCH_TARGETS, or named on the command line. No code changes.

CPU levels are not here: what matters about a processor (cores, bandwidth) is measured on the host that runs, and
what the compiler needs to know about a level is in `build.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...ir.errors import CompileError, nearest
from ...ir.formats import FORMATS
from ..toml_file import read_toml

TARGETS = Path(__file__).parent.parent / "targets"
ARCHES = "arches.toml"
EXTRA = "ONELAUNCH_TARGETS"  # folders or files, separated as in $PATH
ISSUE_LANES = 128  # thread-instructions an SM issues per clock: 4 schedulers x 32 lanes, sm_80 to sm_121
CONFIDENCE = ("vendor", "derived", "measured", "assumed")
WORDS = ("name", "title", "arch")
ENTRY_KEYS = {"value", "confidence", "source"}

Data = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What a number may be; the range is wide, it catches a wrong unit."""

    kind: type[int] | type[float]
    least: float
    most: float

    def expected(self) -> str:
        article = "an integer" if self.kind is int else "a number"
        return f"{article} from {self.least:.10g} to {self.most:.10g}"

    def accepts(self, value: object) -> bool:
        allowed = (int,) if self.kind is int else (int, float)
        return type(value) in allowed and self.least <= value <= self.most  # type: ignore[operator]


@dataclass(frozen=True)
class Evidence:
    """Where a figure comes from; confidence is one of CONFIDENCE."""

    confidence: str
    source: str


def _figure(kind: type[int] | type[float], least: float, most: float, optional: bool = False) -> Any:
    metadata = {"figure": Figure(kind, least, most)}
    return field(metadata=metadata, default=None) if optional else field(metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU. Units are in the names: gb = 1e9 bytes, bytes, mhz, us, tflops = 1e12 operations per second.

    Tensor rates are dense, accumulating in float32 (int8: in int32); None: the hardware has no such path. The
    clock is the boost clock, so issue budgets are upper bounds; bandwidth is the printed one, so floors are lower
    bounds. launch: a graph replay to the first instruction; boundary: between two kernels of a graph; join: the
    last signal to the last waiter going on. read_fraction: what reading gets of the bandwidth; sm_share: even shares
    that one SM can draw alone; l2_bytes_per_clock: of one SM. `evidence` has one entry per figure present.
    """

    name: str
    title: str
    arch: str  # sm_90, without a suffix
    sms: int = _figure(int, 1, 1024)
    memory_gb: float = _figure(float, 1, 10_000)
    bandwidth_gb_s: float = _figure(float, 20, 100_000)
    l2_bytes: int = _figure(int, 1 << 18, 1 << 32)
    shared_bytes_per_sm: int = _figure(int, 1 << 14, 1 << 20)
    shared_bytes_per_block: int = _figure(int, 1 << 14, 1 << 20)
    registers_per_sm: int = _figure(int, 1 << 14, 1 << 20)
    threads_per_sm: int = _figure(int, 512, 8192)
    blocks_per_sm: int = _figure(int, 1, 256)
    boost_mhz: int = _figure(int, 200, 10_000)
    fp32_tflops: float = _figure(float, 0.1, 10_000)
    bf16_tflops: float = _figure(float, 0.1, 100_000)
    fp8_tflops: float | None = _figure(float, 0.1, 1_000_000, optional=True)
    int8_tops: float | None = _figure(float, 0.1, 1_000_000, optional=True)
    fp4_tflops: float | None = _figure(float, 0.1, 1_000_000, optional=True)
    launch_us: float = _figure(float, 0.01, 1000)
    boundary_us: float = _figure(float, 0.01, 1000)
    join_us: float = _figure(float, 0.01, 1000)
    read_fraction: float = _figure(float, 0.3, 1.0)
    sm_share: float = _figure(float, 1.0, 32.0)
    l2_bytes_per_clock: float = _figure(float, 8, 1024)
    l2_latency_us: float = _figure(float, 0.02, 10)
    memory_latency_us: float = _figure(float, 0.05, 10)
    evidence: Mapping[str, Evidence] = field(repr=False, hash=False)
    path: Path = field(repr=False, compare=False)

    def issue_budget(self, bits_per_weight: float) -> float:
        """Thread-instructions per weight at which issue takes as long as reading, for `packed_bits`; aim at half."""
        per_second = self.sms * ISSUE_LANES * self.boost_mhz * 1e6
        return per_second / (self.bandwidth_gb_s * 1e9 / (bits_per_weight / 8))

    def ahead_bytes(self, part: int) -> int:
        """Bytes that all workers together ask L2 for ahead of a join, one of `part` parts: what is in use needs the
        others."""
        return self.l2_bytes // part

    def floor_us(self, size: float) -> float:
        """Microseconds in which `size` bytes can be read from memory at best."""
        return size / (self.bandwidth_gb_s * 1e3)


FIGURES: dict[str, Figure] = {f.name: f.metadata["figure"] for f in fields(Machine) if "figure" in f.metadata}
REQUIRED = tuple(f.name for f in fields(Machine) if "figure" in f.metadata and f.default is not None)


def machines(files: Sequence[Path | str] = ()) -> dict[str, Machine]:
    """All machines by name: ours, those of $ONELAUNCH_TARGETS, and `files` (TOML files or folders of them).

    CompileError: a file that is not a machine, or a name that two files claim.
    """
    extra = [Path(p) for p in os.environ.get(EXTRA, "").split(os.pathsep) if p]
    found, taken = dict(_own()), {_plain(name): machine for name, machine in _own().items()}
    for path in [p for place in (*extra, *map(Path, files)) for p in _expand(place)]:
        machine = read_machine(path)
        other = taken.setdefault(_plain(machine.name), machine)
        if other.path.resolve() != path.resolve():
            raise CompileError(
                f"`name`: expected a name of its own, got `{machine.name}`: {other.path} has `{other.name}`",
                place=str(path),
                hint="rename the machine: a file adds one, it does not replace one",
            )
        found[machine.name] = machine
    return found


def machine_for(wanted: str, known: Mapping[str, Machine] | None = None) -> Machine:
    """The machine of a name (`rtx4090`, `RTX 4090`) or of an architecture (`sm_90`, `sm_90a`).

    An architecture stands for its reference machine in arches.toml, else for the only machine that has it.
    """
    known = machines() if known is None else known
    arch = re.fullmatch(r"(sm_\d+)[af]?", wanted.strip().lower())
    if arch is None:
        plain = {_plain(name): machine for name, machine in known.items()}
        if _plain(wanted) in plain:
            return plain[_plain(wanted)]
        hint = nearest(_plain(wanted), plain) or f"${EXTRA} names folders with machines of your own"
        raise CompileError(f"target: expected one of {', '.join(known)}, got `{wanted}`", hint=hint)
    having = [m for m in known.values() if m.arch == arch[1]]
    reference = _arches()[arch[1]]["reference"] if arch[1] in _arches() else None
    chosen = [m for m in having if m.name == reference] or having
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        names = ", ".join(m.name for m in chosen)
        raise CompileError(f"target: expected one machine, got `{wanted}`, which is {names}", hint="name one")
    arches = ", ".join(dict.fromkeys(m.arch for m in known.values()))
    raise CompileError(f"target: expected one of {arches}, got `{wanted}`", hint="name a machine instead")


def read_machine(path: Path) -> Machine:
    """The machine in one TOML file; CompileError gives every reason at once, each with its key."""
    data = read_toml(path, "a machine file")
    words = {key: data.pop(key) for key in WORDS if key in data}
    arch = words.get("arch")
    shared = _arches().get(arch, {}) if isinstance(arch, str) else {}
    own = [*_word_problems(words), *_problems(data)]
    merged = {**_arches()["all"], **{k: v for k, v in shared.items() if k != "reference"}, **data}
    missing = [f"`{key}`: expected a figure, got none" for key in REQUIRED if key not in merged]
    if missing and isinstance(arch, str) and not shared:
        missing.append(f"`arch`: `{arch}` has no entry in {ARCHES}, so this file must give all its limits")
    if own or missing:
        raise CompileError(own + missing, place=str(path), hint=_hint(data))
    values = {key: merged[key]["value"] for key in FIGURES if key in merged}
    if values["shared_bytes_per_block"] > values["shared_bytes_per_sm"]:
        most, got = values["shared_bytes_per_sm"], values["shared_bytes_per_block"]
        raise CompileError(
            f"`shared_bytes_per_block`: expected at most `shared_bytes_per_sm` = {most}, got {got}", place=str(path)
        )
    evidence = {key: Evidence(merged[key]["confidence"], merged[key]["source"]) for key in values}
    return Machine(**words, **values, evidence=MappingProxyType(evidence), path=path)


def table(known: Mapping[str, Machine] | None = None) -> list[Data]:
    """One row per machine for `onelaunch targets`; plain data.

    issue_4bit, issue_8bit: thread-instructions per weight of q4_0 and q8_0. ms_per_gb: floor of reading 1e9 bytes.
    assumed: the figures that nobody printed or measured.
    """
    return [
        {
            "name": m.name,
            "title": m.title,
            "arch": m.arch,
            "sms": m.sms,
            "boost_mhz": m.boost_mhz,
            "memory_gb": m.memory_gb,
            "bandwidth_gb_s": m.bandwidth_gb_s,
            "l2_mib": m.l2_bytes / 2**20,
            "shared_kib_per_block": m.shared_bytes_per_block / 2**10,
            "bf16_tflops": m.bf16_tflops,
            "fp8_tflops": m.fp8_tflops,
            "int8_tops": m.int8_tops,
            "fp4_tflops": m.fp4_tflops,
            "issue_4bit": m.issue_budget(FORMATS["q4_0"].packed_bits),
            "issue_8bit": m.issue_budget(FORMATS["q8_0"].packed_bits),
            "ms_per_gb": m.floor_us(1e9) / 1e3,
            "assumed": [key for key, e in m.evidence.items() if e.confidence == "assumed"],
        }
        for m in (machines() if known is None else known).values()
    ]


def details(machine: Machine) -> list[Data]:
    """One row per figure of a machine: figure, value, confidence, source."""
    return [
        {"figure": key, "value": getattr(machine, key), "confidence": e.confidence, "source": e.source}
        for key, e in machine.evidence.items()
    ]


@cache
def _own() -> Mapping[str, Machine]:
    found = [read_machine(path) for path in sorted(TARGETS.glob("*.toml")) if path.name != ARCHES]
    found.sort(key=lambda m: (int(m.arch.removeprefix("sm_")), m.bandwidth_gb_s))
    return MappingProxyType({m.name: m for m in found})


@cache
def _arches() -> Mapping[str, Data]:
    return MappingProxyType(read_toml(TARGETS / ARCHES, "the architectures"))


def _expand(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    if found := sorted(place.glob("*.toml")):
        return found
    raise CompileError("expected a folder with .toml files, got none", place=str(place), hint=f"see ${EXTRA}")


def _word_problems(words: Data) -> list[str]:
    patterns = {
        "name": (r"[a-z0-9][a-z0-9_-]{0,31}", "a name of a-z, 0-9, - and _"),
        "title": (r"[^\n]{1,80}", "a line of text"),
        "arch": (r"sm_\d{2,3}", "an architecture such as `sm_90`"),
    }
    found = []
    for key, (pattern, expected) in patterns.items():
        value = words.get(key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            found.append(f"`{key}`: expected {expected}, got {f'`{value}`' if key in words else 'none'}")
    if isinstance(words.get("name"), str) and words["name"].startswith("sm_"):
        found.append(f"`name`: expected something else than an architecture, got `{words['name']}`")
    return found


def _problems(data: Data) -> list[str]:
    """What is wrong with the figures that a file states."""
    found = []
    for key, entry in data.items():
        figure = FIGURES.get(key)
        if figure is None:
            found.append(f"`{key}`: expected a known key, got an unknown one")
        elif not isinstance(entry, dict):
            found.append(f"`{key}`: expected {{ value, confidence, source }}, got `{entry}`")
        else:
            found += [f"`{key}.{k}`: expected a known key, got an unknown one" for k in entry.keys() - ENTRY_KEYS]
            if not figure.accepts(entry.get("value")):
                found.append(f"`{key}.value`: expected {figure.expected()}, got {_got(entry, 'value')}")
            if entry.get("confidence") not in CONFIDENCE:
                got = _got(entry, "confidence")
                found.append(f"`{key}.confidence`: expected one of {', '.join(CONFIDENCE)}, got {got}")
            source = entry.get("source")
            if not isinstance(source, str) or not source.strip():
                found.append(f"`{key}.source`: expected where the figure comes from, got {_got(entry, 'source')}")
    return found


def _got(entry: Data, key: str) -> str:
    return f"`{entry[key]}`" if key in entry else "none"


def _hint(data: Data) -> str:
    unknown = [key for key in data if key not in FIGURES]
    return nearest(unknown[0], [*FIGURES, *WORDS]) if unknown else f"{TARGETS / 'h100.toml'} is a complete example"


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
