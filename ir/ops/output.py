"""The end of a step: choose a token per wanted row, make it the next step's row, guess what follows."""

from __future__ import annotations

from typing import Any

from ..errors import expect
from ..op import Op, op
from ..types import OUTPUTS, StateType, TensorType, Type, Value


@op
class Sample(Op):
    """Choose a token for each wanted row by its slot's sampling settings (`ir/sampling.py` has the rules).

    example:
        graph f(logits: f32[L, 16], rows: rows, slots: slots) -> (token) {
          token: i32[L] = sample(logits, rows, slots)
        }
    """

    logits: Value  # [L, vocab]
    rows: Value
    slots: Value

    def infer(self) -> Type:
        shape = self.logits.tensor.shape
        expect(shape[0] == OUTPUTS and len(shape) == 2, f"sample: expected logits [L, vocab], got {list(shape)}")
        return TensorType("i32", (OUTPUTS,))

    def reference(self, logits: Any, rows: Any, slots: Any) -> Any:
        return slots.sample(logits, rows)


@op
class Commit(Op):
    """Record each chosen token in its slot, stop the slot or write its next row; gives the new slots.

    A step compiled with drafts records none behind a wrong guess and writes guesses into the next rows
    (`ir/drafting.py`); what is said stays the same, so the reference has none.

    example:
        graph f(token: i32[L], rows: rows, slots: slots) -> (slots1) {
          slots1: slots = commit(token, rows, slots)
        }
    """

    token: Value  # [L]
    rows: Value
    slots: Value

    def infer(self) -> Type:
        return StateType("slots")

    def reference(self, token: Any, rows: Any, slots: Any) -> Any:
        return slots.commit(token, rows)


@op
class Guess(Op):
    """Note the likeliest token of each wanted row as its slot's next guess; gives the new slots.

    The end of a model that drafts (`ir/drafting.py`). A guess says nothing, so the reference has none.

    example:
        graph f(logits: f32[L, 16], slots: slots) -> (slots1) {
          slots1: slots = guess(logits, slots)
        }
    """

    logits: Value  # [L, vocab]
    slots: Value

    def infer(self) -> Type:
        shape = self.logits.tensor.shape
        expect(shape[0] == OUTPUTS and len(shape) == 2, f"guess: expected logits [L, vocab], got {list(shape)}")
        return StateType("slots")

    def reference(self, logits: Any, slots: Any) -> Any:
        return slots
