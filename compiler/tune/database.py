"""What tuning found, as JSON that people can read and merge: one entry per program, target and machine.

    {"schema": 1, "entries": {"KEY": {"model": "qwen3-0.6b", "target": "cpu-avx512", "choices": {"panel": 6}, ..}}}

Entries are looked up in this order: what this process found just now, the user's file, the file that ships with the
package; else the defaults stand. An entry holds only where its environment is what it was found in: the processor or
machine, its cores, and the compilers a model read. Writing merges under a lock and replaces the file at once.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...ir.errors import HostError, OnelaunchError
from ...ir.tuning import Tuning

SCHEMA = 1
BUNDLED = Path(__file__).with_name("bundled.json")
LIVE: dict[str, Entry] = {}
HOW = ("measured", "modelled")


@dataclass(frozen=True)
class Entry:
    """What was chosen for one program and target. Microseconds are of the objective, the default's and the choice's.

    program: its key, of ir text and target. workload: what was timed or modelled. per_test: name to (default, chosen).
    """

    model: str
    program: str
    target: str
    choices: dict[str, int]
    how: str
    default_us: float
    us: float
    workload: list[str]
    candidates: int
    environment: dict[str, Any]
    floor_us: float = 0.0
    per_test: dict[str, list[float]] = field(default_factory=dict)

    @property
    def tuning(self) -> Tuning:
        return Tuning.of(self.choices)

    @property
    def key(self) -> str:
        return f"{self.program}-{self.target}-{self.environment.get('machine', '')}"


@dataclass(frozen=True)
class Found:
    """An entry and where it is from: live, user, bundled or fallback; `passed_by`: entries that did not hold."""

    entry: Entry | None
    source: str
    passed_by: tuple[str, ...] = ()


def user_file() -> Path:
    """$ONELAUNCH_TUNING, else a file in the cache folder."""
    named = os.environ.get("ONELAUNCH_TUNING")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("ONELAUNCH_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "onelaunch" / "tuning.json"


def read(path: Path) -> dict[str, Entry]:
    """The entries of a file by key; none if it does not exist. HostError if it is no database."""
    try:
        raw = json.loads(path.read_text())
        if raw["schema"] != SCHEMA:
            raise ValueError(f"expected `schema` {SCHEMA}, got {raw['schema']}")
        return {key: _entry(value) for key, value in raw["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OnelaunchError) as error:
        raise HostError(
            f"expected a tuning database, got: {str(error).splitlines()[0]}",
            place=str(path),
            hint="move it away: `onelaunch autotune` makes a new one; `--tune none` compiles without",
        ) from None


def _entry(value: Mapping[str, Any]) -> Entry:
    entry = Entry(**value)
    if entry.how not in HOW:
        raise ValueError(f"expected `how` {' or '.join(HOW)}, got `{entry.how}`")
    Tuning.of(entry.choices)
    return entry


def write(entry: Entry, path: Path | None = None) -> Path:
    """Merge one entry into a file (the user's), whoever else writes into it meanwhile."""
    path = user_file() if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        entries = read(path) | {entry.key: entry}
        document = {"schema": SCHEMA, "entries": {k: asdict(e) for k, e in sorted(entries.items())}}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.replace(file.name, path)
    LIVE[entry.key] = entry
    return path


def find(program: str, target: str, environment: Mapping[str, Any]) -> Found:
    """The entry of a program and target that holds in an environment, by precedence."""
    passed_by: list[str] = []
    for source, entries in (("live", LIVE), ("user", read(user_file())), ("bundled", read(BUNDLED))):
        for entry in entries.values():
            if (entry.program, entry.target) != (program, target):
                continue
            wrong = _mismatch(entry.environment, environment)
            if not wrong:
                return Found(entry, source, tuple(passed_by))
            passed_by.append(f"{source}: {wrong}")
    return Found(None, "fallback", tuple(dict.fromkeys(passed_by)))


def _mismatch(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first field that differs, in words."""
    return next((f"found with {k} {was.get(k)}, here it is {v}" for k, v in now.items() if was.get(k) != v), "")
