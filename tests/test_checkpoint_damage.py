"""Damaged checkpoints of both kinds: always one LoadError that says what is wrong, never anything else."""

import json
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
from checkpoints import patch_entry, save_gguf, save_hf

from onelaunch.ir.errors import LoadError
from onelaunch.models.open import open_checkpoint


def break_index(directory: Path, **changes):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def test_damaged_shards_are_named(tmp_path):
    save_hf(tmp_path, shard="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    break_index(tmp_path, phantom=shards[0].name)
    with pytest.raises(LoadError, match="`phantom`: not in shard"):
        open_checkpoint(tmp_path)
    break_index(tmp_path, phantom="../secret.safetensors")
    with pytest.raises(LoadError, match="plain file names"):
        open_checkpoint(tmp_path)
    break_index(tmp_path, phantom=shards[0].name)
    for shard in shards[:2]:
        shard.unlink()
    with pytest.raises(LoadError) as caught:
        open_checkpoint(tmp_path)
    assert [f"missing shard `{s.name}`" for s in shards[:2]] == list(caught.value.reasons)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_hf(tmp_path, shard="40KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(LoadError, match="is in `"):
        open_checkpoint(tmp_path)


def write_safetensors(path: Path, header: object, data: bytes = b"", raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BAD_SAFETENSORS = {
    "overlaps": ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, None),
    "belong to nothing": ({"a": entry(0, 8), "b": entry(12, 20)}, b"x" * 20, None),
    "truncated": ({"a": entry(0, 8)}, b"x" * 4, None),
    "belongs to no tensor": ({"a": entry(0, 8)}, b"x" * 12, None),
    "known dtype, got `F33`": ({"a": entry(0, 8, dtype="F33")}, b"x" * 8, None),
    "expected 12 bytes": ({"a": entry(0, 8, (3,))}, b"x" * 8, None),
    "expected a shape": ({"a": entry(0, 8, (-2,))}, b"x" * 8, None),
    "begin, end": ({"a": entry(8, 0)}, b"x" * 8, None),
    "dtype, shape and data_offsets": ({"a": 3}, b"", None),
    "JSON object, got list": ([], b"", None),
    "expected JSON": (None, b"", b"{broken"),
    "nesting": (None, b"", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "the name `a` twice": (None, b"x" * 8, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}'),
}


@pytest.mark.parametrize("reason", BAD_SAFETENSORS)
def test_damaged_safetensors_say_what_is_wrong(tmp_path, reason):
    save_hf(tmp_path)
    header, data, raw = BAD_SAFETENSORS[reason]
    write_safetensors(tmp_path / "model.safetensors", header, data, raw)
    with pytest.raises(LoadError, match=reason):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**6])
def test_absurd_safetensors_header_lengths_are_refused(tmp_path, length):
    save_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(LoadError, match="header inside the file"):
        open_checkpoint(tmp_path)


BAD_ENTRY = {
    "unknown ggml type 99": {"type": 99},
    "unknown ggml type 31": {"type": 31},  # Q4_0_4_4, gone from the format
    "multiple of 256 elements, got 250": {"k": 250},
    "a shape with elements": {"n": 0},
    "truncated or damaged": {"n": 2**40},
    r"a shape with elements, got \[4611686018427387904": {"n": 2**62},
    "1 to 4 dimensions, got 5": {"rank": 5},
    "aligned to 32, got 33": {"offset": 33},
    "overlaps `token_embd.weight`": {"offset": 0},
}


@pytest.mark.parametrize("reason", BAD_ENTRY)
def test_damaged_tensor_records_say_what_is_wrong(tmp_path, reason):
    path = save_gguf(tmp_path / "m.gguf")
    path.write_bytes(patch_entry(path.read_bytes(), b"blk.0.attn_q.weight", **BAD_ENTRY[reason]))
    with pytest.raises(LoadError, match=reason):
        open_checkpoint(path)


def test_duplicate_gguf_names_are_refused(tmp_path):
    path = save_gguf(tmp_path / "m.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(LoadError, match="appears twice"):
        open_checkpoint(path)
    raw = save_gguf(path, mystery_a=1, mystery_b=1).read_bytes()
    path.write_bytes(raw.replace(b"mystery_b", b"mystery_a"))
    with pytest.raises(LoadError, match=r"`llama\.mystery_a` twice"):
        open_checkpoint(path)


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000])
def test_other_gguf_versions_are_refused(tmp_path, version):
    path = save_gguf(tmp_path / "m.gguf")
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, 4, version)
    path.write_bytes(raw)
    with pytest.raises(LoadError, match="version 2 or 3"):
        open_checkpoint(path)


def damage(raw: bytes, rng: random.Random) -> bytes:
    """One to four injuries of the kinds that disks, downloads and attackers make."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(data), 1200)) if rng.random() < 0.9 else rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            del data[at or 1 :]
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at : at + 8] = rng.choice(
                [b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0"]
            )
        elif kind == 3:
            data[at : at + rng.randrange(1, 20)] = b""
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            other = rng.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
        if not data:
            data += b"\0"
    return bytes(data)


def survives(path: Path) -> bool:
    """Open a damaged file and use all of it; True when it was sound enough, False when it was refused."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            if not any(f"`{name}`" in p for p in checkpoint.problems):
                assert checkpoint.read(name).size
        if checkpoint.tokenizer:
            checkpoint.tokenizer()
    except LoadError:
        return False
    return True


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "config"])
def test_three_hundred_damaged_files_are_refused_or_read(tmp_path, kind):
    if kind == "gguf":
        path = target = save_gguf(tmp_path / "m.gguf")
    else:
        save_hf(tmp_path, num_hidden_layers=1)
        path, target = (
            tmp_path,
            tmp_path / {"safetensors": "model.safetensors", "config": "config.json"}[kind],
        )
    raw, rng, began = target.read_bytes(), random.Random(7), time.monotonic()
    outcomes = []
    for _ in range(300):
        target.unlink()  # an older mapping keeps its own file
        target.write_bytes(damage(raw, rng))
        outcomes.append(survives(path))
    assert outcomes.count(False) > 100
    assert time.monotonic() - began < 20
