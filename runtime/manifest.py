"""manifest.json as typed data. Everything the loader relies on is checked here, all reasons at once."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ..ir.errors import LoadError, OnelaunchError
from ..ir.limits import PAGE_TOKENS, Field, Limits, state_fields
from .cuda_target import CudaTarget

SCHEMA = 4
MAX_GROUPS = 8  # cache groups an `OlMemory` has room for
WEIGHTS = "weights/weights.safetensors"
SHAPE: dict[str, type] = {
    **dict.fromkeys(("name", "family"), str),
    **dict.fromkeys(("vocab", "state_bytes", "workspace_bytes"), int),
    **dict.fromkeys(("state", "caches"), list),
    **dict.fromkeys(("limits", "logits", "targets", "certificates", "bytes", "files"), dict),
}


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share one page pool, `draft_layers` of them a draft model's. `ring_pages`: pages of a slot at full
    length; window 0: none. `sinks`: first positions that the window does not leave."""

    kv_heads: int
    head_dim: int
    window: int
    layers: int
    ring_pages: int
    tile_bytes: int
    draft_layers: int = 0
    sinks: int = 0

    def token_bytes(self) -> float:
        """Bytes of K and V of one token, over the layers that a step without guesses reads."""
        return (self.layers - self.draft_layers) * self.kv_heads * self.tile_bytes / 64

    @property
    def pinned(self) -> int:
        """First pages of a slot that are not of its ring: the one of its sinks."""
        return int(self.sinks > 0)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: its tiles of every layer and kv head."""
        return self.layers * self.kv_heads * self.tile_bytes


@dataclass(frozen=True)
class Target:
    """One compiled step library and the instruction sets it uses."""

    name: str
    library: str
    level: int
    isa: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What an artifact says about itself. `raw` is the whole document, `traffic` its `bytes` field.

    `targets` are for processors, `cuda_targets` for NVIDIA devices.
    `logits_offset` is in bytes of the workspace, `logits_stride` in floats. `weights_packed`: False when it was
    compiled to look at, without weights; such an artifact cannot be loaded.
    """

    name: str
    family: str
    limits: Limits
    vocab: int
    fields: tuple[Field, ...]
    state_bytes: int
    caches: tuple[CacheGroup, ...]
    workspace_bytes: int
    logits_offset: int
    logits_stride: int
    targets: tuple[Target, ...]
    certificates: dict[str, Any]
    traffic: dict[str, Any]
    files: dict[str, str]
    raw: dict[str, Any]
    cuda_targets: tuple[CudaTarget, ...] = ()
    weights_packed: bool = True

    @property
    def target_names(self) -> tuple[str, ...]:
        return (*(t.name for t in self.targets), *(t.name for t in self.cuda_targets))

    @property
    def threads(self) -> tuple[int, ...]:
        """Worker counts of a processor with a task table, ascending."""
        found = (re.fullmatch(r"tables/([1-9]\d{0,4})\.npy", name) for name in self.files)
        return tuple(sorted(int(m[1]) for m in found if m))

    @property
    def tuned_threads(self) -> int:
        """The worker count that tuning chose for a processor; 0: none did."""
        tuned = self.raw.get("tuned", {})
        found = (tuned.get(t.name, {}).get("applied", {}).get("threads", 0) for t in self.targets)
        return next((n for n in found if isinstance(n, int) and n), 0)

    @classmethod
    def parse(cls, data: bytes, place: str) -> Manifest:
        """Read and check; LoadError names every field that is not as expected."""
        try:
            raw = json.loads(data)
        except ValueError as error:
            raise LoadError(f"manifest.json: expected JSON, got {error}", place=place) from error
        if not isinstance(raw, dict):
            raise LoadError("manifest.json: expected an object", place=place)
        if raw.get("schema") != SCHEMA:
            made = raw.get("onelaunch", "unknown")
            raise LoadError(
                f"manifest.json: expected `schema` {SCHEMA}, got {raw.get('schema')}",
                place=place,
                hint=f"it was made by onelaunch {made}: compile the model again, or use that version",
            )
        reasons = list(_shape_reasons(raw))
        if not reasons:
            try:
                manifest = cls._build(raw)
                reasons += _consistency(manifest)
            except OnelaunchError as error:
                reasons += error.reasons
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reasons.append(f"a nested field is missing or has the wrong type: {error!r}")
        if reasons:
            raise LoadError([f"manifest.json: {reason}" for reason in reasons], place=place)
        return manifest

    @classmethod
    def _build(cls, raw: dict[str, Any]) -> Manifest:
        fields = [Field(f["name"], f["dtype"], tuple(f["shape"]), int(f["offset"])) for f in raw["state"]]
        names = CacheGroup.__dataclass_fields__
        kinds = {name: t.get("kind", "cpu") for name, t in raw["targets"].items()}
        return cls(
            name=raw["name"],
            family=raw["family"],
            limits=Limits(**raw["limits"]),
            vocab=raw["vocab"],
            fields=tuple(fields),
            state_bytes=raw["state_bytes"],
            caches=tuple(CacheGroup(**{name: int(group[name]) for name in names}) for group in raw["caches"]),
            workspace_bytes=raw["workspace_bytes"],
            logits_offset=int(raw["logits"]["offset"]),
            logits_stride=int(raw["logits"]["stride"]),
            targets=tuple(
                Target(name, str(t["library"]), int(t["level"]), tuple(map(str, t["isa"])))
                for name, t in raw["targets"].items()
                if kinds[name] != "cuda"
            ),
            certificates=raw["certificates"],
            traffic=raw["bytes"],
            files=raw["files"],
            raw=raw,
            cuda_targets=tuple(
                CudaTarget.parse(name, t) for name, t in raw["targets"].items() if kinds[name] == "cuda"
            ),
            weights_packed=raw.get("weights_packed", True) is not False,
        )


def _shape_reasons(raw: dict[str, Any]) -> list[str]:
    reasons = []
    for name, kind in SHAPE.items():
        if name not in raw:
            reasons.append(f"expected field `{name}`, got none")
        elif not isinstance(raw[name], kind) or isinstance(raw[name], bool):
            reasons.append(f"expected `{name}` to be {kind.__name__}, got {type(raw[name]).__name__}")
    return reasons


def _consistency(m: Manifest) -> list[str]:
    """Numbers that would make a step touch memory that is not its own, and names that are not plain paths."""
    reasons = [
        f"file `{name}`: expected a sha256, got `{h}`" for name, h in m.files.items() if not _is_hash(h)
    ]
    reasons += [f"file `{name}`: expected a plain relative path" for name in m.files if not is_plain(name)]
    needed = [WEIGHTS] if m.weights_packed else []
    needed += [target.library for target in m.targets]
    for gpu in m.cuda_targets:
        needed += [*gpu.cubins(), *gpu.tables()]
        reasons += gpu.reasons(len(m.caches))
    reasons += [f"expected `files` to list `{name}`, got no entry" for name in needed if name not in m.files]
    if not m.threads and m.targets:
        reasons.append("expected `files` to list tables/<threads>.npy, got none")
    if not isinstance(m.traffic.get("weights_per_step"), int | float):
        reasons.append(
            f"bytes: expected a number `weights_per_step`, got {m.traffic.get('weights_per_step')}"
        )
    if not m.targets and not m.cuda_targets:
        reasons.append("expected at least one target, got none")
    if not 1 <= len(m.caches) <= MAX_GROUPS:
        return [*reasons, f"expected 1 to {MAX_GROUPS} caches, got {len(m.caches)}"]
    for g, group in enumerate(m.caches):
        if not 0 <= group.sinks <= (PAGE_TOKENS if group.window else 0):
            reasons.append(f"cache {g}: expected 0 to {PAGE_TOKENS} sinks, and 0 without a window, got {group.sinks}")
        if group.ring_pages != m.limits.ring_pages(group.window, group.sinks):
            expected = m.limits.ring_pages(group.window, group.sinks)
            reasons.append(f"cache {g}: expected `ring_pages` {expected}, got {group.ring_pages}")
        if min(group.kv_heads, group.layers, group.tile_bytes) < 1 or group.tile_bytes % 64 or group.draft_layers < 0:
            reasons.append(f"cache {g}: expected positive sizes and tiles of a multiple of 64 bytes")
    if m.logits_stride < m.vocab:
        reasons.append(f"logits: expected `stride` >= vocab {m.vocab}, got {m.logits_stride}")
    end = m.logits_offset + 4 * m.logits_stride * m.limits.outputs
    if m.logits_offset < 0 or m.logits_offset % 4 or end > m.workspace_bytes:
        reasons.append(f"logits: expected to end within `workspace_bytes` {m.workspace_bytes}, got {end}")
    return reasons + _layout_reasons(m)


def _layout_reasons(m: Manifest) -> list[str]:
    """The stored state layout must hold the fields this version knows; offsets are free but disjoint."""
    got = {field.name: field for field in m.fields}
    reasons = []
    for want in state_fields(m.limits, m.vocab, len(m.caches)):
        have = got.get(want.name)
        if have is None:
            reasons.append(f"state: expected field `{want.name}`, got none")
        elif (have.dtype, have.shape) != (want.dtype, want.shape):
            expected = f"{want.dtype}{list(want.shape)}"
            reasons.append(f"state `{want.name}`: expected {expected}, got {have.dtype}{list(have.shape)}")
    if reasons:
        return reasons
    end = 0
    for field in sorted(m.fields, key=lambda f: f.offset):
        if field.offset < end or field.offset % 8 or field.offset + field.nbytes > m.state_bytes:
            got_end = f"bytes {field.offset} to {field.offset + field.nbytes}"
            reasons.append(
                f"state `{field.name}`: expected its own bytes below {m.state_bytes}, got {got_end}"
            )
        end = field.offset + field.nbytes
    return reasons


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_plain(name: str) -> bool:
    """A relative path that stays inside its folder on every system."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\:\x00]", name)
