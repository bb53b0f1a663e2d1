"""A toy model behind the runtime's interfaces: in numpy as a Backend, and as an artifact around toy_step.cpp.

The next token is a checksum of the tokens a row sees through its page table, plus whatever of the sampling
settings is switched on. Two tokens are special: the last one gives not-a-number logits, the one before it
a fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onelaunch.ir.limits import STOP_TOKENS, Limits, state_bytes, state_fields
from onelaunch.ir.table import FIELDS
from onelaunch.ir.types import seen
from onelaunch.runtime.backend import StepFault
from onelaunch.runtime.manifest import SCHEMA, CacheGroup
from onelaunch.runtime.state import State

VOCAB = 260  # 256 bytes, the end token, a spare one, and the two special ones
END, FAULT, NAN = 256, VOCAB - 2, VOCAB - 1
STRIDE = 272
LIMITS = Limits(rows=16, slots=3, context=512, outputs=4, few_rows=4)
SOURCE = Path(__file__).with_name("toy_step.cpp")


def groups(limits: Limits = LIMITS, sinks: int = 0) -> tuple[CacheGroup, ...]:
    """One group that keeps everything and one with a window of 70 tokens, and its sinks."""
    return (
        CacheGroup(2, 16, 0, 2, limits.ring_pages(0), 256),
        CacheGroup(1, 16, 70, 3, limits.ring_pages(70, sinks), 320, sinks=sinks),
    )


class ToyBackend:
    """The step contract in numpy. `steps` counts them; `rows` remembers how many rows each had."""

    observer = None

    def __init__(self, limits: Limits, caches: Sequence[CacheGroup], pages: Sequence[int]) -> None:
        fields = state_fields(limits, VOCAB, len(caches))
        self.state = State(np.zeros(state_bytes(fields), np.uint8), fields)
        self._limits, self._groups = limits, caches
        self.kv = [
            np.zeros((g.layers * g.kv_heads, n, 64), np.int32) for g, n in zip(caches, pages, strict=True)
        ]
        self._logits = np.zeros((limits.outputs, VOCAB), np.float32)
        self.rows: list[int] = []

    def step(self) -> None:
        s, limits = self.state, self._limits
        n, outputs = int(s.n_rows[0]), int(s.n_outputs[0])
        assert 0 < n <= limits.rows
        assert outputs <= limits.outputs
        self.rows.append(n)
        if FAULT in s.row_token[:n]:
            s.fault[:6] = 1, 0, 5, 3, 2, 4
            raise StepFault.read(s.fault)
        for r in range(n):
            slot, p = s.row_slot[r], s.row_position[r]
            for g, kv in enumerate(self.kv):
                kv[:, s.pages[g, slot, p // 64], p % 64] = s.row_token[r]
        for j in range(outputs):
            token = s.output_token[j] = self._choose(int(s.output_row[j]))
            self._logits[j] = np.nan if token < 0 else -((np.arange(VOCAB) - token) % VOCAB)
        self._commit(n, outputs)

    def _choose(self, r: int) -> int:
        s = self.state
        slot, p = int(s.row_slot[r]), int(s.row_position[r])
        if s.row_token[r] == NAN:
            return -1
        total = 0
        for g, group in enumerate(self._groups):
            sinks, first = seen(p, group.window, group.sinks)
            at = np.r_[0:sinks, first : p + 1]
            stored = self.kv[g][-1, s.pages[g, slot, at // 64], at % 64].astype(np.int64)
            total += int(((stored + 1) * (at % 7 + 1)).sum())
        x = total * 7 + p
        if s.slot_temperature[slot] > 0:
            x += int(s.slot_seed[slot]) % 1000 * 13 + int(s.slot_stream[slot]) * 29
        if s.slot_penalty[slot] != 1:
            x += 3 * sum(int(word).bit_count() for word in s.slot_seen[slot])
        return x % (VOCAB - 2)

    def _commit(self, n: int, outputs: int) -> None:
        s = self.state
        for r in range(n):
            self._see(int(s.row_slot[r]), int(s.row_token[r]))
        rows = [(int(s.row_slot[r]), int(s.row_position[r])) for r in s.output_row[:outputs]]
        following = []
        for j, (slot, p) in enumerate(rows):
            token = int(s.output_token[j])
            s.slot_tokens[slot, s.slot_count[slot] % self._limits.context] = token
            s.slot_count[slot] += 1
            self._see(slot, token)
            full = p + 2 > s.slot_limit[slot]
            finished = 3 if token < 0 else 1 if token in s.slot_stop[slot] else 2 if full else 0
            s.slot_finished[slot] = finished
            if not finished:
                following.append((token, slot, p + 1))
        for i, (token, slot, p) in enumerate(following):
            s.row_token[i], s.row_slot[i], s.row_position[i] = token, slot, p
            s.row_output[i] = s.output_row[i] = i
        s.n_rows[0] = s.n_outputs[0] = len(following)

    def _see(self, slot: int, token: int) -> None:
        if token >= 0:
            self.state.slot_seen[slot, token // 32] |= np.uint32(1 << token % 32)

    def run(self, steps: int) -> int:
        for done in range(steps):
            if not self.state.n_rows[0]:
                return done
            self.step()
        return steps

    def logits(self, outputs: int) -> NDArray[np.float32]:
        return self._logits[:outputs]

    def zero_pages(self, group: int, pages: NDArray[np.int32]) -> None:
        self.kv[group][:, pages] = 0

    def read_gbps(self) -> float:
        return 1.0

    def close(self) -> None:
        pass


def answer(
    prompt: Sequence[int],
    count: int,
    stop: Sequence[int] = (),
    *,
    seed: int | None = None,
    stream: int = 0,
    penalty: float = 1.0,
    sinks: int = 0,
) -> list[int]:
    """What the toy model says, computed from the definition, without pages, slots or steps."""
    tokens, said = list(prompt), set(prompt)
    while len(tokens) < len(prompt) + count:
        p = len(tokens) - 1
        parts = [seen(p, g.window, g.sinks) for g in groups(sinks=sinks)]
        x = 7 * sum((tokens[q] + 1) * (q % 7 + 1) for s, at in parts for q in (*range(s), *range(at, p + 1))) + p
        x += 0 if seed is None else seed % 1000 * 13 + stream * 29
        x += 3 * len(said) if penalty != 1 else 0
        tokens.append(x % (VOCAB - 2))
        said.add(tokens[-1])
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def layout_header(limits: Limits) -> str:
    """layout.h of toy_step.cpp."""
    fields = state_fields(limits, VOCAB, len(groups(limits)))
    numbers = {
        "ROWS": limits.rows, "SLOTS": limits.slots, "CONTEXT": limits.context, "OUTPUTS": limits.outputs,
        "PAGES": limits.pages, "GROUPS": len(groups(limits)), "VOCAB": VOCAB, "SEEN": -(-VOCAB // 32),
        "STOPS": STOP_TOKENS, "STRIDE": STRIDE, "LOGITS": 64, **{f"WORD_{name}": i for i, name in enumerate(FIELDS)},
        **{f"AT_{f.name}": f.offset for f in fields},
    }  # fmt: skip
    arrays = {
        "WINDOW": [g.window for g in groups(limits)],
        "COPIES": [g.layers * g.kv_heads for g in groups(limits)],
        "TILE_BYTES": [g.tile_bytes for g in groups(limits)],
    }
    lines = [f"constexpr int {name} = {value};" for name, value in numbers.items()]
    lines += [f"constexpr int {name}[] = {{{', '.join(map(str, v))}}};" for name, v in arrays.items()]
    return "\n".join(lines) + "\n"


@cache
def compiled(folder: Path) -> Path:
    """toy_step.cpp as a shared library, built once."""
    (folder / "layout.h").write_text(layout_header(LIMITS))
    out = folder / "step.so"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or "c++"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{folder}", str(SOURCE), "-o", str(out)]
    subprocess.run(command, check=True)
    return out


def manifest(files: dict[str, str], limits: Limits = LIMITS) -> dict[str, Any]:
    fields = state_fields(limits, VOCAB, len(groups(limits)))
    return {
        "schema": SCHEMA, "onelaunch": "0.0", "name": "toy", "family": "toy", "source": {}, "hyper": {},
        "limits": limits.as_dict(), "numerics": "exact", "vocab": VOCAB,
        "state": [{**vars(f), "shape": list(f.shape)} for f in fields],
        "state_bytes": state_bytes(fields), "caches": [dict(vars(g)) for g in groups(limits)],
        "workspace_bytes": 64 + 4 * STRIDE * limits.outputs, "logits": {"offset": 64, "stride": STRIDE},
        "targets": {
            "cpu-toy": {"library": "kernels/cpu-toy/step.so", "level": 0, "isa": []},
            "cpu-best": {"library": "kernels/cpu-best/step.so", "level": 9, "isa": ["no_such_isa"]},
        },
        "certificates": {n: {"tables": files[f"tables/{n}.npy"]} for n in ("1", "2")},
        "bytes": {"weights_per_step": 1000}, "files": files,
    }  # fmt: skip


def write_artifact(root: Path, library: Path) -> Path:
    """A whole artifact folder."""
    for name in ("tables", "weights", "kernels/cpu-toy", "kernels/cpu-best", "ir", "tokenizer"):
        (root / name).mkdir(parents=True)
    for threads in (1, 2):
        np.save(root / f"tables/{threads}.npy", np.zeros((2, threads, 3, 32), np.int32))
    header = json.dumps({"w": {"dtype": "U8", "shape": [9_000_000], "data_offsets": [0, 9_000_000]}}).encode()
    data = np.arange(9_000_000, dtype=np.uint32).astype(np.uint8).tobytes()
    (root / "weights/weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    shutil.copy(library, root / "kernels/cpu-toy/step.so")
    shutil.copy(library, root / "kernels/cpu-best/step.so")
    (root / "ir/final.ir").write_text("graph\n")
    write_tokenizer(root / "tokenizer")
    seal(root)
    return root


def seal(root: Path, **changes: Any) -> None:
    """Write manifest.json for the files there, and its hash."""
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith("manifest.")]
    files = {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    text = json.dumps({**manifest(files), **changes}, indent=1)
    (root / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (root / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def write_tokenizer(folder: Path) -> None:
    """Byte-level: token = byte; a chat template that wraps the message in angle brackets."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    from onelaunch.runtime.tokenizer import BYTE_OF

    model = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.add_special_tokens([f"<special{i}>" for i in range(256, VOCAB)])
    model.save(str(folder / "tokenizer.json"))
    settings = {
        "bos": -1, "pad": -1, "eos": [END], "add_bos": False, "decoder": "bytes", "strip_space": False,
        "chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}", "names": {},
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))


def zipped(root: Path, out: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(out, "w", method) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root).as_posix())
    return out
