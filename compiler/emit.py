"""From proved schedules to an artifact on disk: code for every target, tables, packed weights, manifest."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..codegen.triton.build import Kernel
from ..ir.errors import CompileError
from ..ir.limits import Limits
from ..ir.schedule import BUCKETS
from ..models.importer import Imported
from .artifact import ArtifactFolder, manifest
from .gpu.compile import SOURCE, GpuCode, add_target, compile_bucket, render_gpu, usage_line
from .lowering import Dump, Lowered, Progress
from .native import NativeCode, build_native, render_native
from .target_list import GpuTarget, Targets
from .weights import PackedWeight, packed_weights, weight_plan, write_weights

GpuBuilds = dict[Future[tuple[Kernel, float]], tuple[GpuTarget, str]]  # kernels being compiled, for what


@dataclass(frozen=True)
class Code:
    """What was generated: C++ for processors, Triton for GPUs."""

    native: NativeCode
    gpu: GpuCode | None

    @property
    def lines(self) -> str:
        """`4310 lines of C++ for cpu-avx2, 2027 lines of Triton`."""
        levels = ", ".join(self.native.units)
        found = [f"{text.count(chr(10))} lines of C++ for {levels}" for text in self.native.steps[:1]]
        found += [f"{self.gpu.source.text.count(chr(10))} lines of Triton"] if self.gpu else []
        return ", ".join(found)


@dataclass(frozen=True)
class Emission:
    """What is known before code is generated; `write` does the rest."""

    model: Path
    quant: str
    imported: Imported
    targets: Targets
    limits: Limits
    threads: tuple[int, ...]
    dump: Dump
    progress: Progress
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    reuse: Path | None = None

    def write(self, lowered: Lowered, output: Path, pack: bool) -> Path | None:
        """Write the artifact; None when `dump` stops after codegen. Nothing is left behind by an error."""
        start = time.perf_counter()
        weights = packed_weights(lowered.program)
        code = self._render(lowered, weights)
        rendering = time.perf_counter() - start
        if self.dump.stops("codegen"):
            self.progress("codegen", rendering, code.lines)
            return None
        folder = ArtifactFolder(output)
        pool = ThreadPoolExecutor(os.cpu_count() or 1)  # of compiler processes
        try:
            entries = self._build(code, folder, weights if pack else None, pool, rendering)
            self._write_files(code, folder)
            more = self._more(code, lowered, folder, entries, pack)
            folder.commit(manifest(lowered.program, self.limits, lowered.schedules, weights, more))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # they write into the folder
            folder.discard()
            raise
        pool.shutdown()
        return output

    def _render(self, lowered: Lowered, weights: list[PackedWeight]) -> Code:
        plan = weight_plan(weights)
        native = render_native(self.targets.levels, lowered, self.threads, plan)
        code = Code(native, render_gpu(self.targets.gpus, lowered, plan))
        for text in native.steps[:1]:
            self.dump.keep("codegen", text, "cpp")
        if code.gpu:
            self.dump.keep("codegen", code.gpu.source.text, "py")
        return code

    def _build(
        self,
        code: Code,
        folder: ArtifactFolder,
        weights: list[PackedWeight] | None,
        pool: ThreadPoolExecutor,
        rendering: float,
    ) -> dict[str, dict[str, Any]]:
        """Run the compilers; weights are packed beside the C++ one, but only when every GPU kernel fits."""
        gpus = self._gpu_builds(code, folder, pool)
        native = {
            level.name: pool.submit(build_native, level, code.native.units[level.name], folder, self.reuse)
            for level in self.targets.levels
        }
        entries = self._gpu_entries(gpus, code, folder)
        if weights is not None:
            self._pack(folder, weights)
        for name, building in native.items():
            entries[name], seconds = building.result()
            rendering += seconds
        self.progress("codegen", rendering, code.lines)
        return entries

    def _gpu_builds(self, code: Code, folder: ArtifactFolder, pool: ThreadPoolExecutor) -> GpuBuilds:
        """A process per architecture and bucket."""
        if code.gpu is None:
            return {}
        folder.path(SOURCE).write_text(code.gpu.source.text)
        return {
            pool.submit(compile_bucket, gpu, bucket, code.gpu.source, self.limits): (gpu, bucket)
            for gpu in self.targets.gpus
            for bucket in BUCKETS
        }

    def _gpu_entries(self, builds: GpuBuilds, code: Code, folder: ArtifactFolder) -> dict[str, dict[str, Any]]:
        """The entries in order of architecture. CompileError with the reasons of all that failed."""
        entries, errors = {}, []
        kernels: dict[str, dict[str, tuple[Kernel, float]]] = {}
        for building in as_completed(builds):
            gpu, bucket = builds[building]
            try:
                found = kernels.setdefault(gpu.arch, {})
                found[bucket] = building.result()
            except CompileError as error:
                errors.append(error)
                continue
            if code.gpu and len(found) == len(BUCKETS):
                made = {b: found[b][0] for b in BUCKETS}
                entries[gpu.arch] = add_target(gpu, made, code.gpu.source.control_words, folder)
                self.progress(gpu.arch, sum(seconds for _, seconds in found.values()), usage_line(entries[gpu.arch]))
        if errors:
            raise CompileError([reason for e in errors for reason in e.reasons], hint=errors[0].hint)
        return {gpu.arch: entries[gpu.arch] for gpu in self.targets.gpus}

    def _pack(self, folder: ArtifactFolder, weights: list[PackedWeight]) -> None:
        start = time.perf_counter()
        name = "weights/weights.safetensors"
        digest = self._kept_weights(folder.path(name), weights)
        folder.add(name, digest)
        size = sum(w.size for w in weights)
        self.progress("pack", time.perf_counter() - start, f"{size / 1e6:.1f} MB in {len(weights)} tensors")

    def _kept_weights(self, path: Path, weights: list[PackedWeight]) -> str:
        """Write the packed weights, or link those that an earlier compilation left to be used again; their sha256."""
        kept = None if self.reuse is None else self.reuse / "weights.safetensors"
        if kept is not None and kept.exists():
            os.link(kept, path)
            return kept.with_suffix(".sha256").read_text()
        digest = write_weights(path, weights, self.imported, lambda done, total: None)
        if kept is not None:
            os.link(path, kept)
            kept.with_suffix(".sha256").write_text(digest)
        return digest

    def _tables(self, code: Code) -> dict[str, tuple[int, np.ndarray]]:
        """Worker count and table by the key that names table and certificate: `4` of processors, `sm_90-132`."""
        tables = {str(count): (count, table) for count, table in code.native.tables.items()}
        if code.gpu:
            for gpu in self.targets.gpus:
                tables |= {f"{gpu.arch}-{count}": (count, code.gpu.tables[count]) for count in gpu.workers}
        return tables

    def _write_files(self, code: Code, folder: ArtifactFolder) -> None:
        for name in sorted(p.relative_to(folder.folder).as_posix() for p in folder.folder.glob("kernels/*/*")):
            folder.add(name)
        for key, (_, table) in self._tables(code).items():
            np.save(folder.path(f"tables/{key}.npy"), table, allow_pickle=False)
            folder.add(f"tables/{key}.npy")
        streams = code.gpu.streams if code.gpu else {}
        for name, count in ((f"tables/{gpu.arch}-{n}.stream.npy", n) for gpu in self.targets.gpus for n in gpu.workers):
            np.save(folder.path(name), streams[count], allow_pickle=False)
            folder.add(name)
        for name, text in self.dump.texts.items():
            if name.endswith(".ir"):
                folder.text(f"ir/{name}", text)
        if self.imported.checkpoint.tokenizer is not None:
            tokenizer = folder.path("tokenizer/x").parent
            self.imported.checkpoint.tokenizer().write(tokenizer)
            for path in sorted(tokenizer.iterdir()):
                folder.add(f"tokenizer/{path.name}")

    def _more(
        self, code: Code, lowered: Lowered, folder: ArtifactFolder, targets: dict[str, dict[str, Any]], pack: bool
    ) -> dict[str, Any]:
        """The manifest's fields that say where the artifact comes from and what it runs on."""
        checkpoint, plain = self.imported.checkpoint, (int, float, bool, str, tuple, dict)
        return {
            "name": self.model.name if self.model.is_dir() else self.model.stem,
            "source": {"path": self.model.name, "format": checkpoint.source, "ignored": self.imported.ignored},
            "hyper": {k: v for k, v in checkpoint.hyper.items() if isinstance(v, plain)},
            "quant": self.quant,
            "calibrated": sorted(key for key, s in self.imported.sources.items() if s.rounded is not None),
            "weights_packed": pack,
            "tuned": self.tuned,
            "numerics": "int8 activations per 32, float32 sums in a fixed order",
            "targets": targets,
            "certificates": {
                key: {
                    "tables": folder.hashes[f"tables/{key}.npy"],
                    "schedules": {b: c.as_dict() for b, c in lowered.certificates[count].items()},
                }
                for key, (count, _) in self._tables(code).items()
            },
        }
