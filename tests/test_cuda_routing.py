"""Which experts a step on a device used, brought to the host for whoever observes; without a GPU or a driver."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np

from onelaunch.ir.limits import Limits, state_bytes, state_fields
from onelaunch.runtime.cuda import CudaBackend
from onelaunch.runtime.cuda_state import DeviceState

FIELDS = state_fields(Limits(rows=4, slots=2, context=64, outputs=2), vocab=40, cache_groups=1, routing=(2, 3))
ROUTED = next(f for f in FIELDS if f.name == "routing")


class Observed(CudaBackend):
    """A backend whose device is memory of the host: a step writes its number among the experts and ends one row."""

    def __init__(self) -> None:
        size = state_bytes(FIELDS)
        self.host, self.device = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.steps = 0
        context = SimpleNamespace(driver=SimpleNamespace(call=self.copied))
        self._state = DeviceState(self.host, FIELDS, context, None, self.device.ctypes.data)  # type: ignore[arg-type]
        self.state = self._state

    def copied(self, name: str, *arguments: int) -> None:
        if name.startswith("cuMemcpy"):
            ctypes.memmove(*arguments[:3])

    def _ready(self) -> nullcontext[None]:  # type: ignore[override]
        return nullcontext()

    def _replay(self, steps: int) -> int:
        assert steps == 1
        self.steps += 1
        self.device[ROUTED.offset : ROUTED.offset + ROUTED.nbytes].view(np.int32)[:] = self.steps
        self._state.n_rows[0] -= 1
        return 1


def test_whoever_observes_sees_the_experts_of_every_step_until_no_row_is_left():
    backend, seen = Observed(), []
    backend.state.n_rows[0] = 3
    backend.observer = lambda rows: seen.append((rows, backend.state.routing[:, :rows].tolist()))
    assert backend.run(5) == 3
    assert [rows for rows, _ in seen] == [3, 2, 1]
    assert [experts[0][0] for _, experts in seen] == [[1] * 3, [2] * 3, [3] * 3]


def test_routing_is_never_sent_to_the_device():
    backend = Observed()
    backend.device[:] = 7
    backend.state.routing[:] = 5
    backend._state.upload()
    assert (backend.device[ROUTED.offset : ROUTED.offset + ROUTED.nbytes] == 7).all()
