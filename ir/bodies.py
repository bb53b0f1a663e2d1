"""Which bodies a scheduled program needs, and the arguments each takes from its record.

A body is the code of one (graph, phase, body name). Arguments are named by the value they stand for; a value
the body writes is named `out.VALUE`. Every executor asks here, so record layouts cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from .access import panel_value, stored
from .formats import BLOCK_K, TILE_ROWS
from .graph import Graph, Program
from .limits import Limits
from .op import Op
from .ops import Append, Attend, ExpertLinear
from .phases import Phase
from .schedule import (
    packed_name,
    padded,
    panel_kind,
    panel_kinds,
    panel_row_bytes,
    panel_rows,
    part_experts,
    part_name,
    part_weight,
    parts,
    unit_rows,
)
from .table import Arg, CacheGroup
from .types import TensorType, Value

Args = dict[str, Arg]
UNIT_ROWS = 16  # rows whose whole heads a worker holds at a time
GATHER_ROWS = 32  # rows of one expert that a worker holds at a time
SCRATCH = "sample.scratch"  # each worker's own memory while it samples


def unit_value(part: tuple[Op, ...]) -> str:
    """The memory in which a worker holds one head of UNIT_ROWS rows between a matrix and its epilogue."""
    return f"{part_name(part)}.unit"


def gather_value(part: tuple[Op, ...]) -> str:
    """Memory in which a worker puts panel rows of one expert beside each other, or, of a GPU, its routes."""
    return f"{part_name(part)}.gather"


def routes_bytes(part: tuple[Op, ...], rows: int) -> int:
    """Of the routes of up to so many rows, int32: each active expert and where its list begins, then the lists."""
    anchor = part[0]
    assert isinstance(anchor, ExpertLinear)
    return 4 * (2 * part_experts(part) + 2 + rows * anchor.k)


def sample_scratch_bytes(vocab: int) -> int:
    """Scratch of one sampling worker: a candidate list of 8 bytes a token, and maxima of blocks of 256."""
    return 8 * (vocab + vocab // 256 + 1) + 32 * (vocab // 256 + 1)


def worker_memory(phase: Phase, body: str, rows: int) -> dict[str, int]:
    """Memory each worker has to itself while it runs a body on up to so many rows: name to bytes."""
    if phase.anchor_kind == "sample":
        return {SCRATCH: sample_scratch_bytes(phase.anchor[0].operands[0].tensor.width)}
    if body.startswith("pack."):
        return {}
    if phase.layout == "heads":
        part = part_of(phase, body)
        return {unit_value(part): 4 * UNIT_ROWS * unit_rows(phase, part)}
    if phase.anchor_kind == "experts":
        part = part_of(phase, body)
        weight = part_weight(part)
        panels = GATHER_ROWS * panel_row_bytes(panel_kind(weight), weight.tensor.width)
        return {gather_value(part): max(panels, routes_bytes(part, rows))}
    return {}


def attend_splits(limits: Limits, window: int, bucket: str) -> int:
    """Partials kept per (row, head): one per split of the row's window when few rows share out the splits."""
    if bucket == "many":
        return 1
    whole = -(-limits.context // limits.split_tokens)
    return min(whole, -(-window // limits.split_tokens) + 1) if window else whole


def body_names(phase: Phase) -> tuple[str, ...]:
    """The bodies of a phase in the order they run."""
    if not phase.reads_matrix:
        return (phase.anchor_kind,)
    packs = tuple(f"pack.{kind}" for kind in panel_kinds(phase))
    return packs + tuple(part_name(p) for p in parts(phase))


def all_bodies(program: Program) -> Iterator[tuple[Graph, Phase, str]]:
    for graph in program.graphs:
        for phase in graph.phases:
            for name in body_names(phase):
                yield graph, phase, name


def part_of(phase: Phase, body: str) -> tuple[Op, ...]:
    return next(p for p in parts(phase) if part_name(p) == body)


def part_epilogue(phase: Phase, part: tuple[Op, ...]) -> tuple[Op, ...]:
    """Epilogue ops of a part in program order; an interleaved pair has all of them."""
    mine = {op.out.name for anchor in part for op in phase.epilogue_of(anchor)}
    return tuple(op for op in phase.epilogue if op.out.name in mine)


class BodyArgs:
    """Derives arguments for one program, its limits and bucket."""

    def __init__(self, program: Program, limits: Limits, bucket: str, groups: tuple[CacheGroup, ...]) -> None:
        self.program, self.limits, self.bucket, self.groups = program, limits, bucket, groups

    def of(self, graph: Graph, phase: Phase, body: str) -> Args:
        if body.startswith("pack."):
            return self._pack(graph, phase, body)
        if phase.reads_matrix:
            return self._matrix(graph, phase, part_of(phase, body))
        if phase.anchor_kind == "attend":
            return self._attend(phase)
        if phase.anchor_kind in ("sample", "guess"):
            logits = phase.anchor[0].operands[0].name
            found = {"logits": Arg("value", logits), "maxima": Arg("value", f"{logits}.max")}
            return found | ({"scratch": Arg("value", SCRATCH)} if phase.anchor_kind == "sample" else {})
        if phase.anchor_kind == "commit":
            return {}
        return _operands(phase.ops) | _outputs(graph, phase, phase.ops)

    def _pack(self, graph: Graph, phase: Phase, body: str) -> Args:
        found = _operands(phase.prologue) or _operand(phase.anchor[0].operands[0])
        for name in list(found):
            producer = graph.producer(Value(name, phase.anchor[0].operands[0].type))
            if isinstance(producer, Attend):
                found["splits"] = Arg("number", number=self.splits(producer))
                found["window"] = Arg("number", number=producer.kv.cache.window)
                if producer.sinks is not None:
                    found |= _operand(producer.sinks)
        anchor = phase.anchor[0]
        if isinstance(anchor, ExpertLinear) and panel_rows(anchor.x) > 1:  # which of a row's experts there are
            found |= _operand(anchor.gates)
        panel = panel_value(phase.name, body.removeprefix("pack."))
        return found | {"panel": Arg("value", panel)}

    def _matrix(self, graph: Graph, phase: Phase, part: tuple[Op, ...]) -> Args:
        weight = part_weight(part)
        found: Args = {
            "weight": Arg("weight", packed_name(part)),
            "panel": Arg("value", panel_value(phase.name, panel_kind(weight))),
            "blocks": Arg("number", number=padded(weight.tensor.width) // BLOCK_K),
            "tiles": Arg("number", number=unit_rows(phase, part) // TILE_ROWS),
        }
        if phase.layout == "heads":
            found["unit"] = Arg("value", unit_value(part))
        if phase.anchor_kind == "experts":
            found |= {"gather": Arg("value", gather_value(part)), "layer": Arg("layer")}
        matrices = {part_weight((op,)) for op in part}
        for value in (v for op in part for v in op.operands[1:] if v not in matrices):  # gates, biases
            found |= _operand(value)
        ops = part_epilogue(phase, part)
        made = {op.out.name for op in phase.ops}
        found |= {n: a for n, a in _operands(ops).items() if n not in made}
        for op in ops:
            if isinstance(op, Append):
                found["group"] = Arg("number", number=self.group(op.kv))
        found |= _outputs(graph, phase, (*part, *ops))
        for op in (*part, *ops):
            if graph.is_logits(op.out):
                found["maxima"] = Arg("value", f"{op.out.name}.max")
        return found

    def _attend(self, phase: Phase) -> Args:
        op = phase.anchor[0]
        assert isinstance(op, Attend)
        return {
            "q": Arg("value", op.q.name),
            "out": Arg("value", op.out.name),
            "group": Arg("number", number=self.group(op.kv)),
            "window": Arg("number", number=op.kv.cache.window),
            "splits": Arg("number", number=self.splits(op)),
        }

    def splits(self, op: Attend) -> int:
        return attend_splits(self.limits, op.kv.cache.window, self.bucket)

    def group(self, kv: Value) -> int:
        return next(i for i, g in enumerate(self.groups) if g.type == kv.type)


def _operand(value: Value) -> Args:
    if value.is_weight:
        return {value.name: Arg("weight", value.name.removeprefix("w."))}
    if isinstance(value.type, TensorType) and value.type.dtype == "f32":
        return {value.name: Arg("value", value.name)}
    return {}


def _operands(ops: tuple[Op, ...]) -> Args:
    """What `ops` read from outside, in order of first use."""
    made = {op.out.name for op in ops}
    found: Args = {}
    for op in ops:
        for value in op.operands:
            if value.name not in made:
                found |= _operand(value)
    return found


def _outputs(graph: Graph, phase: Phase, ops: tuple[Op, ...]) -> Args:
    kept = stored(graph, phase)
    return {
        f"out.{op.out.name}": Arg("value", op.out.name)
        for op in ops
        if op.out.name in kept and isinstance(op.out.type, TensorType) and op.out.type.dtype == "f32"
    }
