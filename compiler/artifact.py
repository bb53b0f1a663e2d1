"""Write an artifact: manifest, tables, kernels, packed weights, IR texts, tokenizer; a folder or one .ola zip."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..ir.errors import HostError, UsageError
from ..ir.graph import Program
from ..ir.limits import Limits, kv_tile_bytes, state_bytes, state_fields
from ..ir.ops import ExpertLinear
from ..ir.schedule import BUCKETS, Schedule, packed_name, padded, part_experts, parts
from ..ir.table import CacheGroup, cache_groups
from ..runtime.manifest import SCHEMA
from .weights import PackedWeight


class ArtifactFolder:
    """A folder under construction beside the output; `commit` moves it into place at once."""

    def __init__(self, output: Path) -> None:
        if output.is_dir() and any(output.iterdir()) and not (output / "manifest.json").is_file():
            raise UsageError(
                f"output `{output}`: expected a new path or an artifact to replace, got a folder of other files",
                hint="give a path of its own, for example model.ola",
            )
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        self.hashes: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Where to write one file; call `add` when it is there."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, name: str, digest: str = "") -> None:
        data = self.folder / name
        self.hashes[name] = digest or hashlib.sha256(data.read_bytes()).hexdigest()

    def text(self, name: str, text: str) -> None:
        self.path(name).write_text(text)
        self.add(name)

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and move everything to the output path."""
        data = (json.dumps({**manifest, "files": self.hashes}, indent=1) + "\n").encode()
        self.path("manifest.json").write_bytes(data)
        self.path("manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")
        try:
            if self.output.suffix == ".ola":
                self._zip()
            else:
                if self.output.is_dir():
                    shutil.rmtree(self.output)
                os.chmod(self.folder, 0o755)
                self.folder.rename(self.output)
        except OSError as error:
            raise HostError(f"cannot write `{self.output}`: {error.strerror}") from None
        finally:
            self.discard()

    def _zip(self) -> None:
        temporary = self.folder.with_suffix(".zip")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(self.folder).as_posix())
        temporary.replace(self.output)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def cache_entry(group: CacheGroup, limits: Limits, own_layers: int) -> dict[str, int]:
    """One page pool of the manifest; a tile is 64 tokens of one kv head, K then V, head_dim padded to 16."""
    kind = group.type
    return {
        "kv_heads": kind.kv_heads,
        "head_dim": kind.head_dim,
        "window": kind.window,
        "sinks": kind.sinks,
        "layers": len(group.layers),
        "draft_layers": sum(layer >= own_layers for layer in group.layers),
        "ring_pages": limits.ring_pages(kind.window, kind.sinks),
        "tile_bytes": kv_tile_bytes(kind.head_dim, limits),
    }


def step_bytes(program: Program, weights: list[PackedWeight]) -> dict[str, float]:
    """Bytes a one-row step reads: every weight once, but one row of an embedding that is not the head, and of experts
    as many as a row has. A draft model's are read besides, by each of its passes."""
    found: dict[str, float] = {"weights": sum(w.size for w in weights)}
    for name, model in zip(("weights_per_step", "weights_per_guess"), program.models, strict=False):
        mine = [w for w in weights if _is_read_by(program, model, w.key)]
        embedded = {v.name[2:] for v in model.entry.weights if len(v.tensor.shape) == 2}
        head = {v.name[2:] for v in model.exit.weights}
        only_embedded = sum(w.size for w in mine if w.key in embedded - head)
        idle = sum(w.size - active_bytes(program, w.key, w.size) for w in mine if w.experts > 1)
        found[name] = sum(w.size for w in mine) - only_embedded - idle
    return found


def _is_read_by(program: Program, model: Program, key: str) -> bool:
    """Whether a packed weight is a model's, of a program and its drafter."""
    layer, dot, _ = key.partition(".")
    if dot:
        return (int(layer) < len(program.layers)) == (model is program)
    return f"w.{key}" in {w.name for graph in (model.entry, model.exit) for w in graph.weights}


def active_bytes(program: Program, key: str, size: int) -> int:
    """Of the `size` bytes of a packed weight, those that a row's experts are; all of a weight that is not theirs."""
    layer, _, name = key.rpartition(".")
    graph = program.kind(program.all_layers[int(layer)]) if layer else program.exit
    for phase in graph.phases:
        for part in parts(phase) if phase.anchor_kind == "experts" else ():
            if packed_name(part) == name and isinstance(part[0], ExpertLinear):
                return size * part[0].k // part_experts(part)
    return size


def manifest(
    program: Program,
    limits: Limits,
    schedules: dict[int, dict[str, Schedule]],
    weights: list[PackedWeight],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Everything a loader needs besides file hashes."""
    groups = cache_groups(program)
    logits = program.logits
    vocab = logits.tensor.width
    one = next(iter(schedules.values()))[BUCKETS[0]]
    fields = state_fields(limits, vocab, len(groups), program.routing)
    return {
        "schema": SCHEMA,
        "onelaunch": __version__,
        "family": program.name,
        "limits": limits.as_dict(),
        "vocab": vocab,
        "state": [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape), "offset": f.offset} for f in fields],
        "state_bytes": state_bytes(fields),
        "caches": [cache_entry(g, limits, len(program.layers)) for g in groups],
        "workspace_bytes": max(s.workspace_bytes for b in schedules.values() for s in b.values()),
        "logits": {"offset": one.buffer("exit", logits.name).offset, "stride": padded(vocab)},
        "bytes": step_bytes(program, weights),
        "weights": [
            {"name": w.key, "format": w.type.dtype, "shape": list(w.type.shape), "bytes": w.size,
             "matrices": list(w.weights)}
            for w in weights
        ],
        **more,
    }  # fmt: skip


def stack_tables(tables: dict[str, np.ndarray]) -> np.ndarray:
    """The buckets' tables as one array [bucket, worker, record, word], short lists padded with ends."""
    longest = max(t.shape[1] for t in tables.values())
    first = next(iter(tables.values()))
    out = np.zeros((len(tables), first.shape[0], longest, first.shape[2]), np.int32)
    out[..., 0] = -1
    for i, bucket in enumerate(BUCKETS):
        out[i, :, : tables[bucket].shape[1]] = tables[bucket]
    return out
