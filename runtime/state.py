"""The step state as named numpy arrays: what the host and a step say to each other.

Every backend exposes the same names (their meaning: `ir.limits.state_fields`), so the row scheduler never
knows where the bytes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir.limits import Field

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class State:
    """Views over one state buffer; writing to one is what the next step reads."""

    n_rows: Int32  # [1]
    n_outputs: Int32  # [1]
    fault: Int32  # [8]
    row_token: Int32  # [rows]
    row_slot: Int32  # [rows]
    row_position: Int32  # [rows]
    row_output: Int32  # [rows]
    output_row: Int32  # [outputs]
    output_token: Int32  # [outputs]
    slot_finished: Int32  # [slots]
    slot_limit: Int32  # [slots]
    slot_stop: Int32  # [slots, STOP_TOKENS]
    slot_temperature: Float32  # [slots]
    slot_top_k: Int32  # [slots]
    slot_top_p: Float32  # [slots]
    slot_min_p: Float32  # [slots]
    slot_penalty: Float32  # [slots]
    slot_seed: NDArray[np.uint64]  # [slots]
    slot_stream: NDArray[np.uint32]  # [slots]
    slot_seen: NDArray[np.uint32]  # [slots, vocab / 32]
    slot_count: Int32  # [slots]
    slot_tokens: Int32  # [slots, context]
    pages: Int32  # [cache groups, slots, pages per slot]
    row_draft: Int32  # [rows]; this and what follows: of a step with drafts alone
    slot_drafts_most: Int32  # [slots]
    slot_drafts: Int32  # [slots]
    slot_steps: Int32  # [slots]
    slot_drafted: Int32  # [slots, drafts]
    slot_accepted: Int32  # [slots, drafts]
    slot_history: Int32  # [slots, context]
    slot_followed: Int32  # [slots]; of a step with a draft model alone
    routing: Int32  # [layers, rows, experts of a row], of a mixture of experts alone

    _has_drafts = _has_draft_model = False

    def __init__(self, buffer: NDArray[np.uint8], fields: Iterable[Field]) -> None:
        for field in fields:
            raw = buffer[field.offset : field.offset + field.nbytes]
            setattr(self, field.name, raw.view(field.dtype).reshape(field.shape))
            self._has_drafts |= field.name == "row_draft"
            self._has_draft_model |= field.name == "slot_followed"

    def clear_drafts(self, rows: slice) -> None:
        """None of these rows is a draft."""
        if self._has_drafts:
            self.row_draft[rows] = 0

    def start_drafts(self, slot: int, prompt: Sequence[int], most: int, reused: int = 0) -> None:
        """A slot begins that may have `most` drafts a step; its prompt is what they are looked up in first.

        reused: tokens of it whose keys and values are in the cache, a draft model's among them.
        """
        if self._has_draft_model:
            self.slot_followed[slot] = reused
        self.slot_drafts_most[slot] = self.slot_drafts[slot] = most
        self.slot_steps[slot] = self.slot_drafted[slot] = self.slot_accepted[slot] = 0
        if most:
            self.put_history(slot, prompt)

    def put_history(self, slot: int, tokens: Sequence[int]) -> None:
        """The first tokens of a slot."""
        self.slot_history[slot, : len(tokens)] = tokens
