"""Reference bodies: what one record of the task table does, told by the ops' own `reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bodies import part_epilogue, part_of, sample_scratch_bytes
from ..graph import Graph
from ..limits import Limits, partial_floats
from ..op import Op
from ..ops import Append, Attend, ElementwiseOp, Linear, MatrixOp, Select
from ..phases import Phase
from ..reference import RowBatch
from ..sampling import Sampling, sample
from ..schedule import LIVE, padded, panel_kind, panel_row_bytes, panel_rows
from ..types import OUTPUTS, TensorType, Value, seen
from .commit import run_commit
from .experts import run_experts
from .guess import run_guess
from .memory import Cache, State, Workspace


@dataclass
class Call:
    """One record at work: its body, tile range, decoded arguments and the memory it may touch.

    `args` maps names to byte offsets (values), numbers, or, for weights, a layer's key prefix.
    """

    graph: Graph
    phase: Phase
    body: str
    first: int
    last: int
    step: int
    layer: int
    args: Mapping[str, Any]
    space: Workspace
    state: State
    caches: Sequence[Cache]
    weights: Mapping[str, Tensor]
    limits: Limits

    def run(self) -> None:
        if self.body.startswith("pack."):
            self._pack()
        else:
            {
                "linear": self._linear, "experts": lambda: run_experts(self), "attend": self._attend,
                "rows": self._rows, "sample": self._sample, "commit": self._commit, "guess": self._guess,
            }[self.phase.anchor_kind]()  # fmt: skip

    # ---- rows and values --------------------------------------------------------------------

    def count(self, value: Value) -> int:
        """Live rows of an activation."""
        return int((self.state.n_outputs if value.tensor.shape[0] == OUTPUTS else self.state.n_rows)[0])

    def tiles(self, count: int) -> range:
        return range(self.first, count if self.last == LIVE else min(self.last, count), self.step)

    def weight(self, value: Value, prefix: str) -> Tensor:
        return self.weights[prefix + value.name.removeprefix("w.")]

    def value(self, value: Value) -> Tensor:
        """All live rows of an activation, [n, ..]."""
        producer = self.graph.producer(value)
        if isinstance(producer, Attend):
            return self._combine(producer)
        return self.place(value, self.args[value.name])

    def place(self, value: Value, offset: int) -> Tensor:
        """The live rows of an activation at an offset: writing to it writes the workspace."""
        n, inner = self.count(value), panel_rows(value)
        rows = self.space.rows(offset, n * inner, value.tensor.width)
        return rows.view(n, inner, -1) if len(value.tensor.shape) == 3 else rows

    def batch(self, tiles: Sequence[int], of_outputs: bool) -> RowBatch:
        """The step's rows cut to `tiles`: rows, or rows of the outputs."""
        n, m, s = int(self.state.n_rows[0]), int(self.state.n_outputs[0]), self.state
        outputs = torch.from_numpy(s.output_row[:m].astype(np.int64))
        rows = slice(n) if of_outputs else list(tiles)
        token, slot, position = (
            torch.from_numpy(x[:n].astype(np.int64)[rows]) for x in (s.row_token, s.row_slot, s.row_position)
        )
        return RowBatch(token, slot, position, outputs[list(tiles)] if of_outputs else outputs)

    def row_values(self, ops: Sequence[Op], tiles: Sequence[int], last: Value) -> dict[str, Any]:
        """Run row-wise ops on some rows of R, or of L if `last` is one of those."""
        of_outputs = last.tensor.shape[0] == OUTPUTS
        values: dict[str, Any] = {"rows": self.batch(tiles, of_outputs)}
        for op in ops:
            for v in op.operands:
                if v.name in values:
                    continue
                if v.is_weight:
                    values[v.name] = self.weight(v, self.args[v.name])
                elif isinstance(v.type, TensorType):
                    values[v.name] = self.value(v) if isinstance(op, Select) else self.value(v)[list(tiles)]
            values[op.out.name] = op.reference(*(values[v.name] for v in op.operands))
        return values

    # ---- bodies -----------------------------------------------------------------------------

    def _pack(self) -> None:
        x = self.phase.anchor[0].operands[0]
        tiles = list(self.tiles(self.count(x)))
        if not tiles:
            return
        prologue = self.phase.prologue
        packed = self.row_values(prologue, tiles, x)[x.name] if prologue else self.value(x)[tiles]
        size, inner = panel_row_bytes(self.body.removeprefix("pack."), x.tensor.width), panel_rows(x)
        rows = [row * inner + i for row in tiles for i in range(inner)]
        self.space.put_panel(self.args["panel"], size, rows, packed.reshape(-1, x.tensor.width))

    def panel(self, op: MatrixOp) -> Tensor:
        """The activation as a matrix reads it, [n, ..]."""
        n, inner, width = self.count(op.x), panel_rows(op.x), op.x.tensor.width
        size = panel_row_bytes(panel_kind(op.weight), width)
        found = self.space.panel(self.args["panel"], size, n * inner, width)
        return found.view(n, inner, width) if len(op.x.tensor.shape) == 3 else found

    def _linear(self) -> None:
        part, unit = part_of(self.phase, self.body), self.phase.unit
        assert isinstance(part[0], Linear)
        panel = self.panel(part[0])
        columns = slice(self.first * unit, min(self.last * unit, part[0].out.tensor.width))
        values: dict[str, Any] = {}
        for op in part:
            values[op.out.name] = panel @ self.weight(op.operands[1], self.args["weight"])[columns].T
        for op in part_epilogue(self.phase, part):
            if isinstance(op, Append):
                self._append(op, values, columns)
            else:
                operands = [self.operand(op, v, values, columns) for v in op.operands]
                values[op.out.name] = op.reference(*operands)
        self.store(values, columns)

    def outputs(self) -> list[tuple[Op, int]]:
        """The ops whose results are stored, and where."""
        made = {f"out.{op.out.name}": op for op in self.phase.ops}
        return [(made[key], offset) for key, offset in self.args.items() if key in made]

    def operand(self, op: Op, v: Value, values: Mapping[str, Any], columns: slice) -> Tensor:
        if v.name in values:
            return values[v.name]  # type: ignore[no-any-return]
        found = self.weight(v, self.args[v.name]) if v.is_weight else self.value(v)
        wide = isinstance(op, ElementwiseOp) and v.tensor.width == op.out.tensor.width
        return found[..., columns] if wide else found

    def store(self, values: Mapping[str, Any], columns: slice) -> None:
        for op, offset in self.outputs():
            value = op.out
            self.place(value, offset)[:, columns] = values[value.name]
            if "maxima" in self.args:
                self._maxima(values[value.name], value.tensor.width)

    def _maxima(self, logits: Tensor, vocab: int) -> None:
        """The largest of each 32 logits, one per unit."""
        wide = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 32), value=-torch.inf)
        best = wide.reshape(len(wide), wide.shape[1] // 32, 32).amax(-1)
        tiles = padded(vocab) // 32
        at = self.first * self.phase.unit // 32
        self.space.rows(self.args["maxima"], len(logits), tiles, tiles)[:, at : at + best.shape[1]] = best

    def _append(self, op: Append, values: Mapping[str, Any], columns: slice) -> None:
        half, new = next((h, values[v.name]) for h, v in (("k", op.k), ("v", op.v)) if v.name in values)
        n, group = int(self.state.n_rows[0]), self.args["group"]
        slots, positions = self.state.row_slot[:n], self.state.row_position[:n]
        pages = [int(self.state.pages[group, s, p // 64]) for s, p in zip(slots, positions, strict=True)]
        first = columns.start // op.kv.cache.head_dim
        self.caches[group].put(half, self.layer, pages, positions.tolist(), first, new)

    def _rows(self) -> None:
        result = self.phase.ops[-1].out
        tiles = list(self.tiles(self.count(result)))
        if not tiles:
            return
        values = self.row_values(self.phase.ops, tiles, result)
        for op, offset in self.outputs():
            self.place(op.out, offset)[tiles] = values[op.out.name]

    # ---- attention: tiles are (row, kv head, split), partials (m, l, o) in base e ------------

    def _partials(self, op: Attend, offset: int) -> Tensor:
        """[rows, heads, splits, partial floats]."""
        d = op.kv.cache.head_dim
        heads, splits, n = op.q.tensor.width // d, self.args["splits"], int(self.state.n_rows[0])
        width = heads * splits * partial_floats(d)
        return self.space.rows(offset, n, width, width).view(n, heads, splits, partial_floats(d))

    def _span(self, row: int, window: int) -> tuple[int, int]:
        """Positions a row sees, but for sinks before them."""
        position = int(self.state.row_position[row])
        return seen(position, window, 0)[1], position + 1

    def _attend(self) -> None:
        op = self.phase.anchor[0]
        assert isinstance(op, Attend)
        kv_heads, splits, n = op.kv.cache.kv_heads, self.args["splits"], int(self.state.n_rows[0])
        queries = self.space.rows(self.args["q"], n, op.q.tensor.width)
        partials = self._partials(op, self.args["out"])
        for tile in self.tiles(n * kv_heads * splits):
            row, head, split = tile // splits // kv_heads, tile // splits % kv_heads, tile % splits
            lo, hi = self._span(row, self.args["window"])
            sinks = min(op.kv.cache.sinks, lo) if split == 0 else 0
            if splits > 1:
                size = self.limits.split_tokens
                base = (lo // size + split) * size
                lo, hi = max(lo, base), min(hi, base + size)
            if lo < hi:
                at = np.r_[0:sinks, lo:hi]
                self._partial(op, queries[row], partials[row, :, split], head, row, at)

    def _partial(self, op: Attend, query: Tensor, out: Tensor, head: int, row: int, at: np.ndarray) -> None:
        d, group = op.kv.cache.head_dim, self.args["group"]
        pages = self.state.pages[group, int(self.state.row_slot[row])]
        k, v = self.caches[group].read(self.layer, head, pages, at)
        mine = slice(head * op.group, (head + 1) * op.group)
        scores = query.view(-1, d)[mine] @ k.T * op.scale
        if op.softcap:
            scores = op.softcap * torch.tanh(scores / op.softcap)
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top)
        out[mine, 0], out[mine, 1] = top[:, 0], weights.sum(-1)
        out[mine, 16 : 16 + d] = weights @ v

    def _combine(self, op: Attend) -> Tensor:
        """Finished attention [rows, heads * head_dim] from partials, splits in order."""
        d = op.kv.cache.head_dim
        partials = self._partials(op, self.args[op.out.name])
        out, size = torch.empty(len(partials), op.out.tensor.width), self.limits.split_tokens
        for row, of_row in enumerate(partials):
            lo, hi = self._span(row, self.args["window"])
            live = of_row[:, : (hi - 1) // size - lo // size + 1]
            top = live[..., :1].amax(1, keepdim=True)
            take = torch.exp(live[..., :1] - top)
            total = (live[..., 1:2] * take).sum(1)
            if op.sinks is not None:
                total += torch.exp(self.weight(op.sinks, self.args[op.sinks.name])[:, None] - top[:, 0])
            out[row] = ((live[..., 16 : 16 + d] * take).sum(1) / total).flatten()
        return out

    # ---- the end of a step ------------------------------------------------------------------

    def _sample(self) -> None:
        logits, state = self.phase.anchor[0].operands[0], self.state
        vocab, n = logits.tensor.width, self.count(logits)
        rows = self.space.rows(self.args["logits"], n, vocab)
        tiles = padded(vocab) // 32
        maxima = self.space.rows(self.args["maxima"], n, tiles, tiles)
        for j in self.tiles(n):
            self.space.spoil(self.args["scratch"], sample_scratch_bytes(vocab))
            row = int(state.output_row[j])
            slot = int(state.row_slot[row])
            how = Sampling(
                float(state.slot_temperature[slot]), int(state.slot_top_k[slot]), float(state.slot_top_p[slot]),
                float(state.slot_min_p[slot]), float(state.slot_penalty[slot]),
                int(state.slot_seed[slot]), int(state.slot_stream[slot]),
            )  # fmt: skip
            seen = np.unpackbits(state.slot_seen[slot].view(np.uint8), bitorder="little")[:vocab].astype(bool)
            if self.limits.drafts:  # as if the drafts up to this row had been said
                seen[state.row_token[row - int(state.row_draft[row]) + 1 : row + 1]] = True
            token = sample(rows[j].numpy(), how, seen, int(state.row_position[row]))
            # A compiled body looks at the maxima first, so wrong ones must show here too.
            state.output_token[j] = token if bool(maxima[j].max() == rows[j].max()) else -1

    def _commit(self) -> None:
        run_commit(self.state, self.limits)

    def _guess(self) -> None:
        logits = self.phase.anchor[0].operands[0]
        vocab, n = logits.tensor.width, self.count(logits)
        rows, tiles = self.space.rows(self.args["logits"], n, vocab), padded(vocab) // 32
        tops = self.space.rows(self.args["maxima"], n, tiles, tiles).amax(-1)
        equal = [(row == top).nonzero() if top.isfinite() else [] for row, top in zip(rows, tops, strict=True)]
        run_guess(self.state, self.limits, [int(e[0]) if len(e) else -1 for e in equal])
