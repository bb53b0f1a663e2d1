"""What is inside an artifact, as plain data and as tables: `inspect` prints it, `compile` summarises it."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import PurePosixPath
from typing import Any

from ...codegen.cpu.units import STEP
from ...ir.formats import FORMATS
from ...ir.graph import Graph, Program
from ...ir.limits import PAGE_TOKENS
from ...ir.op import Op
from ...ir.ops import Attend, ExpertLinear, MatrixOp
from ...ir.phases import Phase
from ...ir.schedule import Schedule, packed_name, part_experts, parts
from ...ir.schedule_text import parse_schedule, show_task
from ...ir.text import parse_program
from ...ir.types import seen_tokens
from ...runtime.artifact import Artifact

Row = dict[str, Any]


def overview(artifact: Artifact, gbps: float) -> Row:
    """The whole artifact in a few numbers; `gbps` is the read bandwidth the floor is computed for."""
    m = artifact.manifest
    weights, matrices = m.raw.get("weights", []), [w for w in m.raw.get("weights", []) if len(w["shape"]) > 1]
    count = sum(prod(w["shape"]) * len(w["matrices"]) for w in matrices)
    by_format: Counter[str] = Counter()
    for w in weights:
        by_format[w["format"]] += w["bytes"]
    step = float(m.traffic["weights_per_step"])
    return {
        "name": m.name,
        "family": m.family,
        "onelaunch": m.raw.get("onelaunch", ""),
        "source": m.raw.get("source", {}),
        "targets": {name: _compiler(entry) for name, entry in m.raw["targets"].items()},
        "threads": list(m.threads),
        "limits": m.limits.as_dict(),
        "numerics": m.raw.get("numerics", ""),
        "weights_bytes": sum(w["bytes"] for w in weights),
        "weights_by_format": dict(by_format),
        "bits_per_weight": 8 * sum(w["bytes"] for w in matrices) / count if count else 0.0,
        "kv_bytes_per_token": sum(g.page_bytes / PAGE_TOKENS for g in m.caches),
        "windows": [
            {"layers": g.layers, "of": sum(c.layers for c in m.caches), "window": g.window, "sinks": g.sinks}
            for g in m.caches
            if g.window
        ],
        "workspace_bytes": m.workspace_bytes,
        "bytes_per_step": step,
        "bytes_per_guess": float(m.traffic.get("weights_per_guess", 0)),
        "tuned": m.raw.get("tuned", {}),
        "read_gbps": gbps,
        "floor_ms": step / gbps * 1e-6,
        "ir": sorted(name.partition("/")[2] for name in m.files if name.startswith("ir/")),
    }


def _compiler(entry: Row) -> str:
    return f"Triton {entry['triton']}, ptxas {entry['ptxas']}" if entry.get("kind") == "cuda" else entry["compiler"]


def tuned_words(found: Row) -> str:
    """What was chosen for a target, from where, and what it was measured or modelled at."""
    chosen = ", ".join(f"{k}={v}" for k, v in found.get("applied", {}).items()) or "defaults"
    if "us" not in found:
        passed_by = f"; {found['passed_by'][0]}" if found.get("passed_by") else ""
        return f"{chosen} ({found['source']}{passed_by})"
    where = found["environment"]["machine"]
    times = f"{found['us']:.0f} us, defaults {found['default_us']:.0f} us"
    left = "" if found["applied"] == found["choices"] else " (not all applied: other targets or limits forbid)"
    return f"{chosen} ({found['source']}, {found['how']} on {where}: {times}){left}"


def summary_lines(found: Row) -> list[str]:
    """`overview` for people."""
    formats = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in found["weights_by_format"].items())
    floor = f"{found['floor_ms']:.2f} ms, {1e3 / found['floor_ms']:.0f} tokens/s" if found["floor_ms"] else "none"
    drafts = found["limits"]["drafts"]
    windows = ", ".join(map(_window_words, found["windows"]))
    guess = f"{found['bytes_per_guess'] / 1e6:.1f} MB for each token guessed, up to {drafts} a step"
    return [
        f"weights    {found['weights_bytes'] / 1e6:.1f} MB, {found['bits_per_weight']:.2f} bits per weight ({formats})",
        f"kv cache   {found['kv_bytes_per_token'] / 1024:.1f} KiB per token, {found['limits']['kv_dtype']}",
        *([f"windows    {windows}"] if windows else []),
        f"workspace  {found['workspace_bytes'] / 2**20:.1f} MiB",
        f"floor      {found['bytes_per_step'] / 1e6:.1f} MB per token: {floor} at {found['read_gbps']:.1f} GB/s read",
        *([f"drafts     {guess}"] if found["bytes_per_guess"] else []),
        *(f"tuned      {name}: {tuned_words(one)}" for name, one in found["tuned"].items()),
    ]


def _window_words(of: Row) -> str:
    sinks = f" and the first {of['sinks']}" if of["sinks"] else ""
    return f"{of['window']} tokens{sinks} in {of['layers']} of {of['of']} layers"


# ---- tensors --------------------------------------------------------------------------------------------


def tensors(artifact: Artifact) -> list[Row]:
    """One row per packed tensor: its format in the checkpoint and here, bits per weight of both."""
    stored = _source_formats(artifact)
    found = []
    for w in artifact.manifest.raw.get("weights", []):
        count = prod(w["shape"]) * len(w["matrices"])
        packed = FORMATS[w["format"]]
        source = FORMATS[stored.get(w["matrices"][0], w["format"])]
        found.append(
            {
                "tensor": w["name"],
                "shape": w["shape"],
                "matrices": len(w["matrices"]),
                "source_format": source.name,
                "format": packed.name,
                "source_bits": source.disk_bits,
                "bits": 8 * w["bytes"] / count,
                "bytes": w["bytes"],
                "note": _packing_note(source.name, packed.name, 8 * w["bytes"] / count, len(w["shape"])),
            }
        )
    return found


def _source_formats(artifact: Artifact) -> dict[str, str]:
    """Formats as imported, by weight key: what --quant changed differs from the manifest."""
    program = parse_program(ir_text(artifact, "import")[1])
    return {
        (f"{layer}." if layer >= 0 else "") + w.name[2:]: w.tensor.dtype
        for graph, layer in program.sections()
        for w in graph.weights
    }


def _packing_note(source: str, packed: str, bits: float, rank: int) -> str:
    if source != packed:
        return f"quantized from {source}"
    if rank == 1:
        return "vector, padded"
    extra = bits - FORMATS[packed].disk_bits
    if extra > 0.01:
        return f"widened by {extra:.2f} bits"
    return "5-6 bit codes kept as they are" if FORMATS[packed].bits in (5, 6) else ""


# ---- phases ---------------------------------------------------------------------------------------------


def phases(artifact: Artifact, gbps: float, depth: int) -> list[Row]:
    """One row per phase and kind of layer: weight and cache bytes, operations of one row, time at `gbps`.

    A draft model's phases count as often as it may run in a step.
    """
    program = fused_program(artifact)
    sizes = {w["name"]: w["bytes"] for w in artifact.manifest.raw.get("weights", [])}
    kv_bytes = 2 if artifact.manifest.limits.kv_dtype == "bf16" else 4
    found = []
    for graph in program.graphs:
        times, layers = program.runs(graph), program.kind_layers(graph.name) or (-1,)
        for phase in graph.phases:
            weights = sum(_phase_weights(phase, sizes, layer) for layer in layers) * times // len(layers)
            cache = times * _cache_bytes(phase, depth, kv_bytes)
            found.append(
                {
                    "section": graph.name,
                    "phase": phase.name,
                    "kind": phase.anchor_kind,
                    "layers": times,
                    "ops": [op.name for op in phase.ops],
                    "weight_bytes": weights,
                    "cache_bytes": cache,
                    "operations": times * _operations(phase, depth),
                    "us": (weights + cache) / gbps * 1e-3,
                }
            )
    return found


def _phase_weights(phase: Phase, sizes: dict[str, int], layer: int) -> int:
    """Bytes a one-row step reads; of a table that is only looked up, one row."""
    prefix = f"{layer}." if layer >= 0 else ""
    total = sum(_active(part, sizes.get(prefix + packed_name(part), 0)) for part in parts(phase) if phase.reads_matrix)
    taken = {op.weight.name for op in phase.anchor if isinstance(op, MatrixOp)}
    for value in phase.weights:
        if value.name not in taken:
            size, shape = sizes.get(prefix + value.name[2:], 0), value.tensor.shape
            total += size // int(shape[0]) if len(shape) == 2 else size
    return total


def _active(part: tuple[Op, ...], size: int) -> int:
    """Of a packed part's bytes, those of one row's experts."""
    anchor = part[0]
    return size * anchor.k // part_experts(part) if isinstance(anchor, ExpertLinear) else size


def _seen(phase: Phase, depth: int) -> int:
    caches = [op.kv.cache for op in phase.anchor if isinstance(op, Attend)]
    return seen_tokens(depth, caches[0].window, caches[0].sinks) if caches else depth + 1


def _cache_bytes(phase: Phase, depth: int, kv_bytes: int) -> int:
    reads = [op.kv.cache for op in phase.anchor if isinstance(op, Attend)]
    return sum(2 * c.kv_heads * c.head_dim * kv_bytes * _seen(phase, depth) for c in reads)


def _operations(phase: Phase, depth: int) -> int:
    """Multiplications and additions of the anchors for one row."""
    total = 0
    for op in phase.anchor:
        if isinstance(op, MatrixOp):
            total += 2 * _active((op,), prod(int(n) for n in op.weight.tensor.shape))
        elif isinstance(op, Attend):
            total += 4 * op.q.tensor.width * _seen(phase, depth)
    return total


# ---- schedule and memory --------------------------------------------------------------------------------


def queue(schedule: Schedule, worker: int) -> list[Row]:
    """What one worker of a schedule does in each section, in order."""
    found = []
    for section in schedule.sections:
        layers = schedule.program.runs(schedule.graph(section.name))
        for task in section.queues[worker % schedule.workers]:
            found.append({"section": section.name, "layers": layers, "task": show_task(task)})
    return found


def memory(artifact: Artifact) -> list[Row]:
    """The buffers of the workspace by offset, and the phases between which each is alive."""
    schedule = stored_schedule(artifact)
    found = []
    for b in sorted(schedule.buffers, key=lambda b: (b.offset, -b.size)):
        found.append(
            {
                "buffer": b.name,
                "offset": b.offset,
                "bytes": b.total(schedule.workers),
                "copies": schedule.workers if b.private else 1,
                "alive": _lifetime(schedule.program, b.name, b.values),
                "values": list(b.values),
            }
        )
    return found


def _lifetime(program: Program, name: str, values: tuple[str, ...]) -> str:
    section, _, _ = name.partition("/")
    graph = next((g for g in program.graphs if g.name == section), None)
    if graph is None:
        return "the whole step"
    names = {v.partition("/")[2].partition(".panel.")[0].removesuffix(".max") for v in values}
    touched = [p.name for p in graph.phases if _touches(graph, p, names)]
    return f"{touched[0]} .. {touched[-1]}" if len(touched) > 1 else "".join(touched)


def _touches(graph: Graph, phase: Phase, names: set[str]) -> bool:
    mine = {v.name for op in phase.ops for v in (*op.operands, op.out)} | {phase.name}
    return bool(mine & names) or f"{phase.name}.scratch" in names


# ---- texts ----------------------------------------------------------------------------------------------


def ir_text(artifact: Artifact, wanted: str) -> tuple[str, str]:
    """(file name, text) of the IR after one pass."""
    from ...ir.errors import UsageError, nearest

    names = {n.partition("-")[2].removesuffix(".ir"): n for n in artifact.manifest.files if n.startswith("ir/")}
    if wanted not in names:
        hint = nearest(wanted, names)
        raise UsageError(f"--ir: expected one of {', '.join(sorted(names))}, got `{wanted}`", hint=hint)
    return names[wanted], artifact.read(names[wanted]).decode()


def fused_program(artifact: Artifact) -> Program:
    """The program the artifact runs, phases and tiles included."""
    return stored_schedule(artifact).program


def stored_schedule(artifact: Artifact) -> Schedule:
    """The schedule kept as text: the largest worker count, few rows."""
    name, text = ir_text(artifact, "allocate")
    return parse_schedule(text, name)


def sources(artifact: Artifact) -> list[tuple[str, str]]:
    """(file name, text) of the generated code; of each target the step comes first, then the kernels it calls."""
    names = [n for n in artifact.manifest.files if n.startswith("kernels/") and n.endswith(".cpp")]
    names.sort(key=lambda name: (PurePosixPath(name).parent, PurePosixPath(name).stem != STEP, name))
    return [(name, artifact.read(name).decode()) for name in names]
