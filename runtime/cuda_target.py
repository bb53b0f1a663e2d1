"""A GPU target as the manifest describes it: which kernels, for which devices, how they are launched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

BUCKETS = ("few", "many")  # rows; in the order of task tables
CONTROL_EVENTS = 64  # words before the first event counter of a control buffer
OPTIONAL = {"global_scratch", "profile_scratch"}  # Triton adds them; we give them nothing
NUMBERS = {"records", "chunks"}  # of a worker in the table and in the weight stream; all others are pointers
PARAMS = {"table", "stream", "control", "weights", "workspace", "state", *NUMBERS, *OPTIONAL}


@dataclass(frozen=True)
class Entry:
    """One kernel: its name in its cubin, and `shared` bytes of dynamic shared memory of a block of `num_warps`."""

    name: str
    cubin: str
    num_warps: int
    shared: int

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Entry:
        return cls(str(raw["entry"]), str(raw["cubin"]), int(raw["num_warps"]), int(raw["shared"]))

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.num_warps


@dataclass(frozen=True)
class CudaTarget:
    """The compiled step for NVIDIA devices.

    `entries`: the kernels for few and for many rows; they may be one. `arch`: sm_90, or sm_90a for code of exactly
    that architecture. `params`: name and type ("*i32", "i32") of each kernel parameter, in order. `workers`: grid
    sizes with a task table. `control_words`: int32 words of the event counters and fault record. `min_driver`: the
    first release of NVIDIA's driver that takes the code, or "".
    """

    name: str
    arch: str
    entries: tuple[Entry, Entry]
    params: tuple[tuple[str, str], ...]
    workers: tuple[int, ...]
    control_words: int
    min_driver: str = ""

    @classmethod
    def parse(cls, name: str, raw: dict[str, Any]) -> CudaTarget:
        """The manifest's entry. Buckets differ in what `entries: {few: {..}, many: {..}}` says of each."""
        own = raw.get("entries", {})
        few, many = (Entry.parse({**raw, **own.get(bucket, {})}) for bucket in BUCKETS)
        return cls(
            name=name,
            arch=str(raw["arch"]),
            entries=(few, many),
            params=tuple((str(param), str(kind)) for param, kind in raw["params"]),
            workers=tuple(sorted({int(count) for count in raw["workers"]})),
            control_words=int(raw["control_words"]),
            min_driver=str(raw.get("min_driver") or ""),
        )

    @property
    def version(self) -> tuple[int, int, str]:
        """(9, 0, "a") of sm_90a."""
        match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", self.arch)
        return (int(match[1]), int(match[2]), match[3]) if match else (0, 0, "")

    def runs_on(self, major: int, minor: int) -> bool:
        """Machine code runs on its own major version from its minor one on; `a` code on that one device only."""
        wanted, least, kind = self.version
        return major == wanted and (minor == least if kind == "a" else minor >= least)

    def cubins(self) -> list[str]:
        return list(dict.fromkeys(entry.cubin for entry in self.entries))

    def tables(self) -> list[str]:
        """The files of task tables and of weight streams."""
        return [f"tables/{self.name}-{count}{kind}.npy" for count in self.workers for kind in ("", ".stream")]

    def reasons(self, caches: int) -> list[str]:
        """What is wrong with it, for a model with this many cache groups."""
        found = []
        if not self.version[0]:
            found.append(f"expected `arch` like sm_90 or sm_90a, got `{self.arch}`")
        if not all(1 <= entry.num_warps <= 32 and entry.shared >= 0 for entry in self.entries):
            found.append("expected 1 to 32 `num_warps` and `shared` >= 0")
        if not self.workers or self.workers[0] < 1:
            found.append("expected positive `workers`")
        if self.control_words < CONTROL_EVENTS:
            found.append(f"expected `control_words` >= {CONTROL_EVENTS}, got {self.control_words}")
        names = [param for param, _ in self.params]
        wanted = {*PARAMS, *(f"kv{g}" for g in range(caches))}
        if not wanted - OPTIONAL <= set(names) <= wanted or len(set(names)) != len(names):
            found.append(f"expected `params` {', '.join(sorted(wanted))}, got {', '.join(names)}")
        found += [
            f"param `{n}`: expected {'i32' if n in NUMBERS else 'a pointer'}, got `{kind}`"
            for n, kind in self.params
            if (kind != "i32" if n in NUMBERS else not kind.startswith("*"))
        ]
        return [f"target `{self.name}`: {reason}" for reason in found]
