"""Opening an artifact: every byte is verified before any of it is used, and what differs is named.

    artifact = Artifact.open("model.ola")
    target, threads = artifact.pick_target(), artifact.pick_threads()
    weights = artifact.verify()              # hashes everything; the weights land in huge pages
    library = artifact.library(target)

Nothing in an artifact is pickled, and nothing in it runs except the step library.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import LoadError, UsageError, nearest
from . import host
from .container import CHUNK, Member, members
from .cuda_target import CudaTarget
from .manifest import WEIGHTS, Manifest, Target
from .memory import Buffer

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # optional: the manifest's own hash, in the form `sha256sum` writes
RECORD = 32  # int32 words of one task record
MAX_HEADER = 100 << 20  # bytes of a safetensors header, the limit of its own library


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk, its manifest read and checked, its files not yet verified."""

    path: Path
    manifest: Manifest
    members: dict[str, Member]

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the manifest of a folder or an .ola file and check it against the files there."""
        path = Path(path)
        found = members(path)
        if MANIFEST not in found:
            raise LoadError(
                f"{MANIFEST}: expected in an artifact, got none",
                place=str(path),
                hint="this may be a model that is not compiled yet: `onelaunch compile` makes an artifact",
            )
        data = found[MANIFEST].read()
        if SEAL in found:
            _check_hash(MANIFEST, hashlib.sha256(data).hexdigest(), _sealed(found[SEAL]), path)
        manifest = Manifest.parse(data, str(path))
        missing = [name for name in manifest.files if name not in found]
        listed = {*manifest.files, MANIFEST, SEAL}
        extra = [name for name in found if name not in listed and not name.rpartition("/")[2].startswith(".")]
        reasons = [f"{name}: expected in the artifact, got no such file" for name in missing]
        reasons += [f"{name}: expected a hash in `files`, got none" for name in extra]
        if reasons:
            hint = "copy the whole artifact again, and keep other files out of it"
            raise LoadError(reasons, place=str(path), hint=hint)
        return cls(path, manifest, found)

    def cuda_targets(self, name: str | None = None) -> tuple[CudaTarget, ...]:
        """The targets for NVIDIA devices that may run: all, or the one asked for, or none if it is another kind."""
        known = self.manifest.target_names
        if name is not None and name not in known:
            raise UsageError(
                f"target: expected one of {', '.join(known)}, got `{name}`",
                place=str(self.path),
                hint=nearest(name, known),
            )
        return tuple(target for target in self.manifest.cuda_targets if name in (None, target.name))

    def pick_target(self, name: str | None = None) -> Target:
        """The best target this processor can run, or the one asked for; LoadError says what each one lacks."""
        known = {target.name: target for target in self.manifest.targets}
        gpus = ", ".join(target.name for target in self.cuda_targets(name))
        if (name is not None and name not in known) or not known:
            raise LoadError(
                f"targets: expected one for a processor, got {gpus}",
                place=str(self.path),
                hint="compile for this machine as well: `--target cpu`",
            )
        wanted = [known[name]] if name is not None else sorted(known.values(), key=lambda t: -t.level)
        have, reasons = host.isa(), []
        for target in wanted:
            lacking = [flag for flag in target.isa if host.plain_isa(flag) not in (have or ())]
            if not lacking:
                return target
            got = "an unknown processor" if have is None else f"one without {', '.join(lacking)}"
            reasons.append(
                f"target `{target.name}`: expected a processor with {', '.join(target.isa)}, got {got}"
            )
        raise LoadError(
            reasons, place=str(self.path), hint="compile for this machine, or for a portable target"
        )

    def pick_threads(self, threads: int | None = None) -> int:
        """A worker count with a task table: the one asked for or tuned to, or the most this machine has cores for."""
        known, tuned = self.manifest.threads, self.manifest.tuned_threads
        if threads is None and tuned in known and tuned <= host.cores():
            return tuned
        if threads is not None:
            if threads not in known:
                raise UsageError(
                    f"threads: expected one of {', '.join(map(str, known))}, got {threads}",
                    place=str(self.path),
                    hint="a worker count needs its own task table: compile with it, or pick one of these",
                )
            return threads
        return max((n for n in known if n <= host.cores()), default=known[0])

    def verify(self) -> Buffer:
        """Hash every file; returns the weights' data section, read into huge pages on the way.

        hashlib releases the GIL: other files are hashed beside the weights, which are read ahead.
        """
        self.expect_weights()
        others = [name for name in self.manifest.files if name != WEIGHTS]
        with ThreadPoolExecutor(max(2, min(8, host.cores()))) as pool:
            hashes = pool.map(lambda name: self.members[name].sha256(), others)
            weights, digest = _read_weights(self.members[WEIGHTS], pool)
            for name, got in [*zip(others, hashes, strict=True), (WEIGHTS, digest)]:
                _check_hash(name, got, self.manifest.files[name], self.path)
        return weights

    def expect_weights(self) -> None:
        """LoadError for an artifact that was compiled without its weights."""
        if not self.manifest.weights_packed:
            raise LoadError(
                "weights: expected packed ones, got an artifact that was compiled with --no-weights",
                place=str(self.path),
                hint="it can be inspected; compile the model again without that option to run it",
            )

    def read(self, name: str) -> bytes:
        """The verified bytes of one listed file."""
        data = self.members[name].read()
        _check_hash(name, hashlib.sha256(data).hexdigest(), self.manifest.files[name], self.path)
        return data

    def tables(self, threads: int, target: str = "") -> NDArray[np.int32]:
        """The certified task table of one worker count, int32 [2 buckets, workers, records, 32].

        A CUDA target has tables of its own, so it is named; all processors share theirs.
        """
        key = f"{target}-{threads}" if target else str(threads)
        name = f"tables/{key}.npy"
        self._check_certificate(key, name)
        table = self._array(name)
        shape: tuple[int, ...] = np.shape(table)
        records = shape[2] if len(shape) == 4 else 0
        if not records or shape != (2, threads, records, RECORD) or table.dtype != np.int32:
            raise LoadError(
                f"{name}: expected int32[2, {threads}, records, {RECORD}], got {table.dtype}{list(shape)}",
                place=str(self.path),
            )
        return np.ascontiguousarray(table)

    def stream(self, workers: int, target: str) -> NDArray[np.int64]:
        """The weight stream of a CUDA target's workers, int64 [workers, chunks] (ir/stream.py)."""
        name = f"tables/{target}-{workers}.stream.npy"
        stream = self._array(name)
        if stream.ndim != 2 or len(stream) != workers or stream.dtype != np.int64:
            raise LoadError(
                f"{name}: expected int64[{workers}, chunks], got {stream.dtype}{list(stream.shape)}",
                place=str(self.path),
            )
        return np.ascontiguousarray(stream)

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        except ValueError as error:
            raise LoadError(f"{name}: expected an array, got {error}", place=str(self.path)) from error

    def _check_certificate(self, key: str, name: str) -> None:
        proof = self.manifest.certificates.get(key)
        what = f"{key} threads" if key.isdigit() else f"`{key}`"
        hint = "a schedule is only run if the validator accepted it: compile the model again"
        if not isinstance(proof, dict) or "tables" not in proof:
            raise LoadError(
                f"certificates: expected one for {what}, got none", place=str(self.path), hint=hint
            )
        if proof["tables"] != self.manifest.files[name]:
            raise LoadError(
                f"certificates: expected `{key}` to certify {name} {self.manifest.files[name][:12]}.., "
                f"got {str(proof['tables'])[:12]}..",
                place=str(self.path),
                hint=hint,
            )

    def library(self, target: Target) -> Path:
        """The step library as a real file in a private folder, named by its hash; written atomically."""
        data, digest = self.read(target.library), self.manifest.files[target.library]
        path = host.kernel_folder() / f"{digest}.so"
        try:
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                return path
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o700)
            os.replace(temporary, path)
        except OSError as error:
            raise LoadError(f"{target.library}: {error.strerror}", place=str(path.parent)) from error
        return path

    def unpack(self, prefix: str, folder: Path) -> None:
        """Write the verified files below `prefix` into `folder`, flat names only."""
        for name in self.manifest.files:
            if name.startswith(prefix) and "/" not in name[len(prefix) :]:
                (folder / name[len(prefix) :]).write_bytes(self.read(name))


def _sealed(member: Member) -> str:
    return member.read().decode("ascii", "replace").partition(" ")[0].strip()


def _check_hash(name: str, got: str, expected: str, path: Path) -> None:
    if got != expected:
        raise LoadError(
            f"{name}: expected sha256 {expected[:12]}.., got {got[:12]}..",
            place=str(path),
            hint="the file differs from what was compiled: copy the artifact again",
        )


def _read_weights(member: Member, pool: ThreadPoolExecutor) -> tuple[Buffer, str]:
    """The data section of a safetensors file in its own memory, and the hash of the whole file."""
    head = bytearray(8)
    member.read_into(memoryview(head))
    length = int.from_bytes(head, "little")
    if length > min(MAX_HEADER, member.size - 8):
        raise LoadError(
            f"{member.name}: expected a safetensors header, got a length of {length}", place=str(member.path)
        )
    header = bytearray(length)
    member.read_into(memoryview(header), 8)
    data = Buffer(member.size - 8 - length, "the weights")
    digest = hashlib.sha256(head + header)
    pieces = [data.view[at : at + CHUNK] for at in range(0, len(data.view), CHUNK)]
    reads = [pool.submit(member.read_into, piece, 8 + length + i * CHUNK) for i, piece in enumerate(pieces)]
    for piece, done in zip(pieces, reads, strict=True):
        done.result()
        digest.update(piece)  # type: ignore[arg-type]
    return data, digest.hexdigest()
