"""What an artifact is compiled for, and the layout of the state a step reads and writes.

The layout is data: the CPU step is generated from it, the manifest stores it, the runtime maps numpy arrays
over it. A field has one home, here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from .errors import expect

PAGE_TOKENS = 64  # tokens per KV page: one tile of every kernel
PAGE_RUN = 4  # pages whose tiles of one head lie together: a stream that jumps every 32 KiB is 8 % slower
SPLIT_TOKENS = 256  # tokens per attention split where nobody chose; the order of sums depends on the position alone
PARTIAL_HEADER = 16  # floats before an attention partial's outputs: maximum, sum, padding to a cache line
STOP_TOKENS = 16  # stop tokens per slot
DRAFTERS = ("ngram", "model")  # who guesses: the text so far, or a second model in the same step
DRAFTS = 4  # what to compile where nobody says: more rows cost more than they bring (tests/bench/speculate.py)
ALIGN = 128  # bytes; the unit of every offset in the task table


@dataclass(frozen=True)
class Limits:
    """Compiled limits: rows per step, live slots, context in tokens, rows with logits per step.

    Up to `few_rows` rows a step repeats prologues in every worker and splits attention over the context;
    above it, prologues and attention are shared out by rows. `drafts`: how many tokens a step may guess and check
    behind a slot's last one (`ir/drafting.py`), 0: none; `drafter`: who guesses them. `split_tokens`: of the context
    in one split of attention, whole pages.
    """

    rows: int = 256
    slots: int = 4
    context: int = 4096
    outputs: int = 8
    few_rows: int = 8
    kv_dtype: str = "bf16"
    drafts: int = 0
    drafter: str = "ngram"
    split_tokens: int = SPLIT_TOKENS

    def __post_init__(self) -> None:
        for name in ("rows", "slots", "context", "outputs", "few_rows"):
            value = getattr(self, name)
            expect(value >= 1, f"limits: expected {name} >= 1, got {value}")
        expect(
            self.split_tokens >= PAGE_TOKENS and self.split_tokens % PAGE_TOKENS == 0,
            f"limits: expected split_tokens a multiple of {PAGE_TOKENS}, got {self.split_tokens}",
        )
        expect(self.few_rows <= 64, f"limits: expected few_rows <= 64, got {self.few_rows}")
        expect(self.kv_dtype in ("bf16", "f32"), f"limits: expected kv_dtype bf16 or f32, got {self.kv_dtype}")
        expect(self.drafter in DRAFTERS, f"limits: expected drafter {' or '.join(DRAFTERS)}, got {self.drafter}")
        expect(
            self.outputs >= self.slots,
            f"limits: expected outputs >= slots ({self.slots}), got {self.outputs}",
            hint="every slot may want logits in the same step",
        )
        expect(
            0 <= self.drafts < self.few_rows,
            f"limits: expected drafts 0 to {self.few_rows - 1}, got {self.drafts}",
            hint="the drafts of a slot and its last token are among the few rows of a step",
        )
        for name in ("rows", "outputs") if self.drafts else ():
            expect(
                getattr(self, name) >= self.decode_rows,
                f"limits: expected {name} >= {self.decode_rows}, got {getattr(self, name)}",
                hint=f"so many rows want logits in a step of {self.slots} slots with {self.drafts} drafts",
            )

    @property
    def has_draft_model(self) -> bool:
        return self.drafts > 0 and self.drafter == "model"

    def rows_beside(self, rows: int) -> int:
        """Rows that a step of so many may have without leaving its bucket."""
        few = min(self.few_rows, self.rows)
        return few if rows <= few else self.rows

    def drafts_beside(self, running: int) -> int:
        """Drafts a slot may have in a step of `running` slots: all their rows stay among the few."""
        return drafts_beside(running, self.few_rows, self.drafts)

    @property
    def decode_rows(self) -> int:
        """Rows with logits in a step at most."""
        return decode_rows(self.slots, self.few_rows, self.drafts)

    @property
    def pages(self) -> int:
        """Pages of one slot in an unwindowed cache."""
        return -(-self.context // PAGE_TOKENS)

    def ring_pages(self, window: int, sinks: int = 0) -> int:
        """Pages of one slot in a windowed cache: its window, one step's rows, one page of slack; the page of its sinks,
        which is not of the ring."""
        if not window:
            return self.pages
        return min(self.pages, -(-(window + self.rows) // PAGE_TOKENS) + 1 + (sinks > 0))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def drafts_beside(running: int, few_rows: int, drafts: int) -> int:
    return max(0, min(drafts, few_rows // running - 1))


def decode_rows(slots: int, few_rows: int, drafts: int) -> int:
    """Rows with logits in a step at most: drafts and last tokens of those that run, a prompt's last row of the rest."""
    return max(n * drafts_beside(n, few_rows, drafts) for n in range(1, slots + 1)) + slots


def most_drafts(rows: int, slots: int, outputs: int, few_rows: int) -> int:
    """Drafts there is room for in a step, DRAFTS at most."""
    room = min(rows, outputs or rows)
    return max(n for n in range(min(DRAFTS, few_rows - 1) + 1) if n == 0 or decode_rows(slots, few_rows, n) <= room)


def partial_floats(head_dim: int) -> int:
    """Floats of one attention partial: header, then head_dim outputs padded to 16."""
    return PARTIAL_HEADER + -(-head_dim // 16) * 16


def kv_tile_bytes(head_dim: int, limits: Limits) -> int:
    """Bytes of one KV tile: keys and values of PAGE_TOKENS tokens of one kv head, head_dim padded to 16."""
    return 2 * PAGE_TOKENS * -(-head_dim // 16) * 16 * {"bf16": 2, "f32": 4}[limits.kv_dtype]


def kv_pool_bytes(pages: int, page_bytes: int) -> int:
    """Bytes of one cache group's pool, [runs][layers][kv_heads][PAGE_RUN] tiles: whole runs of pages.

    Page p is place p % PAGE_RUN of run p // PAGE_RUN; `page_bytes`: its tiles of all layers and kv heads.
    """
    return -(-pages // PAGE_RUN) * PAGE_RUN * page_bytes


@dataclass(frozen=True)
class Field:
    """One array of the step state: numpy dtype name, shape, byte offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        sizes = {"int32": 4, "uint32": 4, "float32": 4, "uint64": 8, "int64": 8}
        return sizes[self.dtype] * prod(self.shape)


def state_fields(
    limits: Limits, vocab: int, cache_groups: int, routing: tuple[int, int] = (0, 0)
) -> tuple[Field, ...]:
    """The step state in order, each field aligned to 64 bytes.

    `routing`: layers and experts of a row, of a mixture of experts; `routing[l, r]` has row r's, -1 beyond them.

    Rows: `row_*[i]` for i < n_rows; `row_output[i]` is the row's index among the outputs or -1.
    Outputs: `output_row[j]` for j < n_outputs, ascending. Slots: lengths, sampling, stop set, result ring.
    With drafts: the fields of `_draft_fields`.
    `pages[g, s, p]`: page of positions 64p .. 64p+63 of slot s in cache group g (a ring repeats its pages, but not
    the first where it holds sinks).
    """
    rows, slots, outputs = (limits.rows,), (limits.slots,), (limits.outputs,)
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("n_rows", "int32", (1,)),
        ("n_outputs", "int32", (1,)),
        ("fault", "int32", (8,)),  # 0: kind, worker, record, event, seen, expected
        ("row_token", "int32", rows),
        ("row_slot", "int32", rows),
        ("row_position", "int32", rows),
        ("row_output", "int32", rows),
        ("output_row", "int32", outputs),
        ("output_token", "int32", outputs),  # what this step chose, -1: the logits were not finite
        ("slot_finished", "int32", slots),  # 0 running, 1 stop token, 2 length, 3 not-a-number logits
        ("slot_limit", "int32", slots),  # positions the slot may fill
        ("slot_stop", "int32", (*slots, STOP_TOKENS)),  # unused: -1
        ("slot_temperature", "float32", slots),
        ("slot_top_k", "int32", slots),
        ("slot_top_p", "float32", slots),
        ("slot_min_p", "float32", slots),
        ("slot_penalty", "float32", slots),
        ("slot_seed", "uint64", slots),
        ("slot_stream", "uint32", slots),
        ("slot_seen", "uint32", (*slots, -(-vocab // 32))),
        ("slot_count", "int32", slots),  # tokens committed since the slot started
        ("slot_tokens", "int32", (*slots, limits.context)),  # ring of committed tokens, by count
        ("pages", "int32", (cache_groups, *slots, limits.pages)),
    ]
    if limits.drafts:
        shapes += _draft_fields(limits)
    if routing[0]:
        shapes.append(("routing", "int32", (routing[0], limits.rows, routing[1])))
    fields, offset = [], 0
    for name, dtype, shape in shapes:
        fields.append(Field(name, dtype, shape, offset))
        offset += -(-fields[-1].nbytes // 64) * 64
    return tuple(fields)


def _draft_fields(limits: Limits) -> list[tuple[str, str, tuple[int, ...]]]:
    """What a step that drafts holds besides. A slot's drafted rows follow the row of its last token."""
    slots = (limits.slots,)
    before, behind = _model_draft_fields(limits) if limits.has_draft_model else ([], [])
    return [
        ("row_draft", "int32", (limits.rows,)),  # 0, or the row holds this many-th draft of its slot, from 1
        ("slot_drafts_most", "int32", slots),  # drafts the slot may have, 0: it decodes plainly
        ("slot_drafts", "int32", slots),  # drafts it would have next, by what was accepted lately
        ("slot_steps", "int32", slots),  # steps that committed tokens since the slot started
        ("slot_drafted", "int32", (*slots, limits.drafts)),  # how often it had an n-th draft
        ("slot_accepted", "int32", (*slots, limits.drafts)),  # how often the n-th was accepted
        *before,
        ("slot_history", "int32", (*slots, limits.context)),  # prompt and committed tokens, by position
        *behind,
    ]


def _model_draft_fields(limits: Limits) -> tuple[list[tuple[str, str, tuple[int, ...]]], ...]:
    """What lasts where a model drafts, and what it needs within a step: `end_*` of the slots that go on, in order,
    the first `n_ends`."""
    slots = (limits.slots,)
    return [
        ("slot_followed", "int32", slots),  # the first so many tokens of the slot are in the draft model's cache
    ], [
        ("draft_pass", "int32", (1,)),  # passes of the draft model that are done in this step
        ("n_ends", "int32", (1,)),
        ("end_slot", "int32", slots),
        ("end_position", "int32", slots),  # of the last token
        ("end_drafts", "int32", slots),  # guesses it is to have
        ("end_token", "int32", (*slots, 1 + limits.drafts)),  # the last token and the guesses
    ]


def state_bytes(fields: tuple[Field, ...]) -> int:
    """Bytes of the whole state."""
    return -(-(fields[-1].offset + fields[-1].nbytes) // 64) * 64
