"""GGUF v2 and v3 files, read by our own guarded parser.

Source: ggml's `docs/gguf.md` and gguf.cpp. Every length in the file is untrusted: it is compared with the
bytes that are left before anything is read or allocated, and a loop consumes bytes on every turn, so a
damaged file costs at most one pass over itself. Structure first (`read_header`), then all tensor checks at
once.

What a key means is in gguf_hyper.py, the tokenizer in gguf_tokenizer.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..ir.errors import LoadError
from .checkpoint import FORMATS, Checkpoint, TensorInfo
from .gguf_hyper import gguf_hyper
from .gguf_scales import with_scales
from .gguf_tokenizer import convert_tokenizer

TYPES: dict[int, tuple[str, int, int]] = {
    # ggml type id: (name, elements per block, bytes per block)
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 40), 10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292), 16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8),
    28: ("f64", 1, 8), 29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18),
}  # fmt: skip
DENSE = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9
MAX_NAME = 65535  # bytes of a key or a tensor name; ggml allows less for tensors
MAX_STRINGS = 1 << 23  # elements of a string array; the largest vocabularies are near 2**18
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor's record in the header, `offset` in bytes from the start of the data section."""

    name: str
    type_id: int
    dims: tuple[int, ...]  # innermost first
    offset: int

    @property
    def size(self) -> int:
        _, block, bytes_per_block = TYPES[self.type_id]
        return math.prod(self.dims) // block * bytes_per_block


@dataclass(frozen=True)
class Header:
    keys: dict[str, Any]  # number, bool, str, list[bytes] (strings) or np.ndarray (numbers)
    entries: tuple[Entry, ...]
    data_start: int


class Cursor:
    """Reads forward through a byte array and never past its end."""

    def __init__(self, data: np.ndarray, place: str) -> None:
        self.data: memoryview = data.data
        self.place = place
        self.at = 0

    def fail(self, reason: str, hint: str = "") -> LoadError:
        return LoadError(f"{reason} (at byte {self.at} of the header)", place=self.place, hint=hint)

    def take(self, count: int, what: str) -> memoryview:
        left = len(self.data) - self.at
        if count > left:
            raise self.fail(
                f"expected {count} bytes of {what}, got {left} before the end of the file",
                hint="the file is truncated or damaged: fetch it again",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def raw(self, what: str) -> bytes:
        return bytes(self.take(self.u64(what), what))

    def name(self, what: str) -> str:
        length = self.u64(what)
        if not 0 < length <= MAX_NAME:
            raise self.fail(f"expected a {what} of 1 to {MAX_NAME} bytes, got {length}")
        return self.text(bytes(self.take(length, what)), what)

    def text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"expected UTF-8 in a {what}, got {raw[:32]!r}") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(self.raw(f"the value of `{key}`"), f"value of `{key}`")
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.fail(f"key `{key}`: expected a value type of 0 to 12, got {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize, f"the value of `{key}`"), dtype)[0].item()

    def array(self, key: str) -> list[bytes] | np.ndarray:
        kind, count = self.u32(f"the element type of `{key}`"), self.u64(f"the length of `{key}`")
        if kind == STRING:
            if count > min(MAX_STRINGS, (len(self.data) - self.at) // 8):
                raise self.fail(
                    f"key `{key}`: expected a string array that fits the file, got {count} elements"
                )
            return [self.raw(f"an element of `{key}`") for _ in range(count)]
        if kind not in SCALARS:
            raise self.fail(f"key `{key}`: expected an array of numbers or strings, got element type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, f"the array `{key}`"), dtype)


def read_header(data: np.ndarray, place: str) -> Header:
    """The whole header of a GGUF file (`data`: uint8, all of it). Structural damage is a LoadError."""
    cursor = Cursor(data, place)
    tensors, pairs = _read_preamble(cursor)
    keys: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.name("key")
        if key in keys:
            raise cursor.fail(f"expected each key once, got `{key}` twice")
        keys[key] = cursor.value(cursor.u32(f"the type of `{key}`"), key)
    entries = tuple(_read_entry(cursor) for _ in range(tensors))
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"`general.alignment`: expected a power of two, got `{alignment}`")
    return Header(keys, entries, -(-cursor.at // alignment) * alignment)


def _read_preamble(cursor: Cursor) -> tuple[int, int]:
    if bytes(cursor.take(4, "the magic")) != b"GGUF":
        raise cursor.fail("expected the magic `GGUF`, got something else")
    version = cursor.u32("the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"{swapped} in big-endian order" if swapped in (2, 3) else str(version)
        raise cursor.fail(f"expected GGUF version 2 or 3, little endian, got {what}")
    tensors, pairs = cursor.u64("the tensor count"), cursor.u64("the key count")
    left = len(cursor.data) - cursor.at
    if tensors > left // 24 or pairs > left // 12:  # the least a record can take
        raise cursor.fail(f"expected counts that fit the file, got {tensors} tensors and {pairs} keys")
    return tensors, pairs


def _read_entry(cursor: Cursor) -> Entry:
    name = cursor.name("tensor name")
    rank = cursor.u32(f"the rank of `{name}`")
    if not 1 <= rank <= MAX_DIMS:
        raise cursor.fail(f"tensor `{name}`: expected 1 to {MAX_DIMS} dimensions, got {rank}")
    dims = tuple(cursor.u64(f"the shape of `{name}`") for _ in range(rank))
    return Entry(name, cursor.u32(f"the type of `{name}`"), dims, cursor.u64(f"the offset of `{name}`"))


def tensor_problems(header: Header, file_size: int) -> list[str]:
    """Every reason why the tensor records cannot be trusted; empty when they can."""
    alignment = header.keys.get("general.alignment", 32)
    available = max(0, file_size - header.data_start)
    reasons, sound, seen = [], [], set()
    for entry in header.entries:
        wrong = _entry_problem(entry, alignment, available)
        if entry.name in seen:
            wrong = "appears twice"
        seen.add(entry.name)
        if wrong:
            reasons.append(f"tensor `{entry.name}`: {wrong}")
        else:
            sound.append(entry)
    sound.sort(key=lambda e: e.offset)
    for first, second in itertools.pairwise(sound):
        if first.offset + first.size > second.offset:
            reasons.append(f"tensor `{second.name}`: overlaps `{first.name}`")
    return reasons


def _entry_problem(entry: Entry, alignment: int, available: int) -> str:
    if entry.type_id not in TYPES:
        return f"unknown ggml type {entry.type_id}"
    kind, block, _ = TYPES[entry.type_id]
    if 0 in entry.dims or math.prod(entry.dims) >= 1 << 62:
        return f"expected a shape with elements, got {list(reversed(entry.dims))}"
    if entry.dims[0] % block:
        return f"format `{kind}`: expected rows of a multiple of {block} elements, got {entry.dims[0]}"
    if entry.offset % alignment:
        return f"expected an offset aligned to {alignment}, got {entry.offset}"
    if entry.offset + entry.size > available:
        end = entry.offset + entry.size
        return f"expected {end} bytes of tensor data, got {available}: the file is truncated or damaged"
    return ""


def open_gguf(path: Path, ignore: frozenset[str] = frozenset()) -> Checkpoint:
    """Open one GGUF file. `ignore`: keys to pass over although we do not know them."""
    if path.stat().st_size < 24:
        raise LoadError(
            f"expected a GGUF header of 24 bytes or more, got {path.stat().st_size}", place=str(path)
        )
    data = np.memmap(path, dtype=np.uint8, mode="r")
    header = read_header(data, str(path))
    parts = header.keys.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise LoadError(
            f"`split.count`: expected a whole model in one file, got one part of `{parts}`",
            place=str(path),
            hint="join the parts with `llama-gguf-split --merge`",
        )
    reasons = tensor_problems(header, len(data))
    if reasons:
        raise LoadError(reasons, place=str(path))
    entries = {e.name: e for e in header.entries}
    tensors = {n: TensorInfo(n, TYPES[e.type_id][0], tuple(reversed(e.dims))) for n, e in entries.items()}

    def read(name: str) -> np.ndarray:
        if name not in entries:
            raise LoadError(f"no tensor `{name}` in the checkpoint", place=str(path))
        return _map_tensor(data, header.data_start, entries[name], str(path))

    tensors, reading, ignored, misfits = with_scales(tensors, read)
    if misfits:
        raise LoadError(misfits, place=str(path))
    family, hyper = gguf_hyper(header.keys, tensors, read, str(path), ignore)
    tokenizer = (
        (lambda: convert_tokenizer(header.keys, str(path))) if "tokenizer.ggml.model" in header.keys else None
    )
    problems = tuple(
        f"tensor `{t.name}`: format `{t.format}` is not supported"
        for t in tensors.values()
        if t.format not in FORMATS
    )
    return Checkpoint(path, "gguf", family, hyper, tensors, reading, tokenizer, problems, (path,), ignored)


def _map_tensor(data: np.ndarray, start: int, entry: Entry, place: str) -> np.ndarray:
    kind, block, bytes_per_block = TYPES[entry.type_id]
    if kind not in FORMATS:
        raise LoadError(f"tensor `{entry.name}`: format `{kind}` is not supported", place=place)
    raw = data[start + entry.offset : start + entry.offset + entry.size]
    shape = tuple(reversed(entry.dims))
    if kind in DENSE:
        return raw.view(DENSE[kind]).reshape(shape)
    return raw.reshape(*shape[:-1], shape[-1] // block * bytes_per_block)
