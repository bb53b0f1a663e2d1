"""The CUDA backend's copy of the step state where steps draft: what the host sees is what the device committed."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onelaunch.ir.limits import Limits, state_bytes, state_fields
from onelaunch.ir.vm.commit import run_commit
from onelaunch.ir.vm.guess import run_guess
from onelaunch.runtime.cuda_state import DeviceState
from onelaunch.runtime.state import State

LIMITS = Limits(rows=16, slots=3, context=60, outputs=12, few_rows=8, drafts=4)
each_drafter = pytest.mark.parametrize("limits", [LIMITS, replace(LIMITS, drafter="model")], ids=["ngram", "model"])
VOCAB = 40


class Device:
    """Memory of its own, copies that happen at once, and a step that chooses tokens by chance, drafts among them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        fields = state_fields(limits, VOCAB, 1)
        self.memory, self.host = (np.zeros(state_bytes(fields), np.uint8) for _ in range(2))
        self.state = State(self.memory, fields)
        self.fault = np.zeros(8, np.int32)
        self.up = 0
        context: Any = SimpleNamespace(driver=self)
        self.mirror = DeviceState(self.host, fields, context, None, self.memory.ctypes.data)
        self.rng = random.Random(0)

    def call(self, name: str, *arguments: Any) -> None:
        if name in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"):
            target, source, size, _ = arguments
            ctypes.memmove(target, source, size)
            self.up += size * (name == "cuMemcpyHtoDAsync")

    def replay(self, steps: int) -> int:
        slots, counts = self.mirror.outputs()
        self.mirror.upload()
        for _ in range(steps):
            self._step()
        return self.mirror.download(slots, counts, steps, self.fault.ctypes.data)

    def _step(self) -> None:
        s = self.state
        for j in range(int(s.n_outputs[0])):
            row = int(s.output_row[j])
            held = j + 1 < s.n_outputs[0] and s.row_draft[row + 1] and self.rng.random() < 0.7
            s.output_token[j] = s.row_token[row + 1] if held else self.rng.randrange(3)
        run_commit(s, self.limits)
        for _ in range(self.limits.drafts if self.limits.has_draft_model else 0):
            run_guess(s, self.limits, [self.rng.randrange(3) for _ in range(int(s.n_outputs[0]))])


def start(state: State, slot: int, row: int, prompt: list[int]) -> None:
    state.slot_count[slot] = state.slot_finished[slot] = 0
    state.slot_limit[slot], state.slot_stop[slot] = 60, -1
    state.start_drafts(slot, prompt, 4)
    state.row_token[row], state.row_slot[row], state.row_position[row] = prompt[-1], slot, len(prompt) - 1
    state.row_output[row] = state.output_row[row] = row
    state.clear_drafts(slice(row, row + 1))
    state.n_rows[0] = state.n_outputs[0] = row + 1


@each_drafter
@pytest.mark.parametrize("steps", [1, 3])
def test_the_host_sees_every_token_that_was_committed(steps: int, limits: Limits) -> None:
    device = Device(limits)
    host, there, accepted = device.mirror, device.state, 0
    for prompt in ([1, 2, 1, 2, 1], [1, 2, 0, 0]):  # the second finds what the first has left
        for slot in range(3):
            start(host, slot, slot, prompt)
        while host.n_rows[0]:
            before = host.slot_steps.copy()
            done = device.replay(steps)
            assert done == (there.slot_steps - before).max()
            for slot in range(3):
                count = int(there.slot_count[slot])
                assert host.slot_count[slot] == count
                kept = slice(0, len(prompt)), slice(len(prompt), min(60, len(prompt) + count))
                assert there.slot_history[slot, kept[0]].tolist() == prompt
                assert (there.slot_history[slot, kept[1]] == host.slot_tokens[slot, : kept[1].stop - len(prompt)]).all()
            lasting = ["slot_followed"] if limits.has_draft_model else []
            for name in ("row_draft", "slot_drafts", "slot_accepted", "slot_drafted", "slot_steps", *lasting):
                assert (getattr(host, name) == getattr(there, name)).all(), name
        accepted += int(there.slot_accepted.sum())
    assert accepted > 50


@each_drafter
def test_decoding_uploads_nothing(limits: Limits) -> None:
    device = Device(limits)
    start(device.mirror, 0, 0, [1, 2, 1, 2, 1])
    device.replay(1)
    device.up = 0
    for _ in range(4):
        device.replay(1)
    assert device.up == 0
