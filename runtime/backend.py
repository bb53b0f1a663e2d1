"""What a device must do to run steps. The CPU backend is `cpu.py`; a GPU one goes beside it.

Rows, pages and sampling settings are written through `state`; nothing above this interface knows the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import OnelaunchError
from .state import Int32, State


class StepFault(OnelaunchError):
    """A step stopped by itself: a wait passed its deadline. The model must be loaded again."""

    exit_code = 4

    @classmethod
    def read(cls, fault: Int32) -> StepFault:
        """From the state's fault record: kind, worker, record, event, seen, expected."""
        kind, worker, record, event, seen, expected = (int(x) for x in fault[:6])
        return cls(
            f"step: worker {worker} stopped at record {record}: "
            f"expected {expected} signals of event {event}, got {seen} (fault kind {kind})",
            hint="not the request but the schedule or the machine is at fault: load the model again",
        )


class Backend(Protocol):
    """One loaded model on one device. Made ready by its constructor; not safe to share between threads."""

    state: State
    observer: Callable[[int], None] | None  # called after every step with the rows it had

    def step(self) -> None:
        """Run the rows in `state` once; raises StepFault."""

    def run(self, steps: int) -> int:
        """Up to `steps` steps back to back (decode rows only); how many before no rows were left."""

    def logits(self, outputs: int) -> NDArray[np.float32]:
        """The last step's logits [outputs, vocab]: a view, overwritten by the next step."""

    def zero_pages(self, group: int, pages: NDArray[np.int32]) -> None:
        """Clear pages of one cache group, in every layer and head."""

    def read_gbps(self) -> float:
        """Bandwidth of a plain read of all weights by the same workers, GB/s."""

    def close(self) -> None:
        """Stop the workers; a second call does nothing."""
