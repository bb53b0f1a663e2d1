"""The step state of a device, as the host sees and changes it.

Two copies on the host: `State`'s views are over page-locked memory, a second one says what the device has.
What differs is what the host wrote, so a decode loop that writes nothing uploads nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir.limits import Field
from .cuda_driver import Context
from .memory import Bytes
from .state import State

# Small fields a step writes and the host reads after it.
RETURNED = (
    "n_rows", "n_outputs", "fault", "row_token", "row_slot", "row_position", "row_output", "output_row",
    "output_token", "slot_finished", "slot_count", "row_draft", "slot_drafts_most", "slot_drafts", "slot_steps",
    "slot_drafted", "slot_accepted", "slot_followed",
)  # fmt: skip
# Large fields with a way of their own, and what only a step needs, while a model drafts. Never part of another copy:
# the host's may be behind the device's.
APART = (
    "slot_seen", "slot_tokens", "slot_history", "routing",
    "draft_pass", "n_ends", "end_slot", "end_position", "end_drafts", "end_token",
)  # fmt: skip
WORD = 8  # bytes; offsets of fields are multiples of it
NEAR = 256  # bytes; two changes this close are one copy: its start costs more than its bytes


class DeviceState(State):
    """Views over the host's copy. Take `slot_seen` anew from here each time: a step changes it on the device.

    host: page-locked copy, a multiple of 8 bytes; device: address of the state there. All copies run in `stream`,
    in the current context.
    """

    def __init__(
        self, host: Bytes, fields: Iterable[Field], context: Context, stream: object, device: int
    ) -> None:
        self._seen_stale = self._seen_used = False
        fields = sorted(fields, key=lambda field: field.offset)
        super().__init__(host, fields)
        known = {field.name: field for field in fields}
        self._context, self._call, self._stream = context, context.driver.call, stream
        self._host, self._device = host, device
        self._words, self._sent = host.view(np.uint64), host.view(np.uint64).copy()
        self._history_offset = known["slot_history"].offset if "slot_history" in known else 0
        self._histories: list[tuple[int, int]] = []  # offset and bytes of beginnings that the device has yet to get
        self._steps_before = np.zeros(0, np.int32)
        self._seen_range = _ranges(fields, ["slot_seen"])[0]
        self._watched = _ranges(fields, known.keys() - APART)
        self._returned, self._routing = _ranges(fields, RETURNED), _ranges(fields, ["routing"])
        self._ring, self._ring_offset = self.slot_tokens, known["slot_tokens"].offset
        self._fault_offset = known["fault"].offset
        self.slot_tokens, self.fault = _read_only(self.slot_tokens), _read_only(self.fault)

    @property
    def slot_seen(self) -> NDArray[np.uint32]:  # type: ignore[override]
        """The seen bits; the device's own marks are fetched first, if it made any since."""
        if self._seen_stale:
            with self._context:
                self._down([self._seen_range])
                self._call("cuStreamSynchronize", self._stream)
            self._accept([self._seen_range])
            self._seen_stale = False
        self._seen_used = True
        return self._seen

    @slot_seen.setter
    def slot_seen(self, value: NDArray[np.uint32]) -> None:
        self._seen = value

    def put_history(self, slot: int, tokens: Sequence[int]) -> None:
        super().put_history(slot, tokens)
        self._histories.append((self._history_offset + slot * self.slot_history[0].nbytes, 4 * len(tokens)))

    def upload(self) -> None:
        """Queue copies of what the host changed; after it the host's copy must rest until the stream did."""
        for at, size in self._histories:
            self._call("cuMemcpyHtoDAsync", self._device + at, self._address + at, size, self._stream)
        self._histories.clear()
        for first, end in [*self._watched, *([self._seen_range] if self._seen_used else [])]:
            new, old = self._words[first:end], self._sent[first:end]
            if np.array_equal(new, old):
                continue
            for start, stop in _runs(first + np.flatnonzero(new != old)):
                at, size = WORD * start, WORD * (stop - start)
                self._call("cuMemcpyHtoDAsync", self._device + at, self._address + at, size, self._stream)
                self._sent[start:stop] = self._words[start:stop]
        self._seen_used = False

    def outputs(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Of each output of the next step: its slot, and the tokens that slot has if the commit gets to it."""
        if self._has_drafts:
            self._steps_before = self.slot_steps.copy()
        slots = self.row_slot[self.output_row[: self.n_outputs[0]]]
        earlier = np.tril(slots[:, None] == slots, -1).sum(1, dtype=np.int32)
        return slots, self.slot_count[slots] + earlier

    def download(self, slots: NDArray[np.int32], counts: NDArray[np.int32], steps: int, fault: int) -> int:
        """After `steps` queued steps: wait, and take what they changed; how many found rows to do.

        slots, counts: `outputs` before them; fault: address of their fault record. Safe to repeat if interrupted.
        """
        self._seen_stale = True
        self._down(self._returned)
        if steps > 1:
            self._download_tokens(slots, counts, steps)
        size = self.fault.nbytes
        self._call("cuMemcpyDtoHAsync", self._address + self._fault_offset, fault, size, self._stream)
        self._call("cuStreamSynchronize", self._stream)
        self._accept(self._returned)
        if steps == 1 and not self.fault[0]:  # the commit put output_token there; no need to copy it again
            # What drafts chose that did not hold lies beyond the slot's count, until other tokens replace it.
            self._ring[slots, counts % self._ring.shape[1]] = self.output_token[: len(slots)]
        if self._has_drafts:
            return int((self.slot_steps - self._steps_before)[slots].max(initial=0))
        return int((self.slot_count[slots] - counts).max(initial=0))

    def _download_tokens(self, slots: NDArray[np.int32], counts: NDArray[np.int32], steps: int) -> None:
        """The ring entries `steps` steps may have written, of each slot."""
        context = self._ring.shape[1]
        most = min(context, steps * (1 + self.slot_drafted.shape[1]) if self._has_drafts else steps)
        for slot, count in dict(zip(slots[::-1].tolist(), counts[::-1].tolist(), strict=True)).items():
            first = count % context  # of the slot's first output: its drafts come behind it
            for start, stop in ((first, min(first + most, context)), (0, first + most - context)):
                if stop > start:
                    at = self._ring_offset + 4 * (slot * context + start)
                    size = 4 * (stop - start)
                    self._call("cuMemcpyDtoHAsync", self._address + at, self._device + at, size, self._stream)

    def download_routing(self) -> None:
        """The experts of the last step's rows, of a mixture of experts: wait, and take them."""
        self._down(self._routing)
        self._call("cuStreamSynchronize", self._stream)

    @property
    def _address(self) -> int:
        return int(self._host.ctypes.data)

    def _down(self, ranges: Sequence[tuple[int, int]]) -> None:
        for first, end in ranges:
            at, size = WORD * first, WORD * (end - first)
            self._call("cuMemcpyDtoHAsync", self._address + at, self._device + at, size, self._stream)

    def _accept(self, ranges: Sequence[tuple[int, int]]) -> None:
        for first, end in ranges:
            self._sent[first:end] = self._words[first:end]


def _ranges(fields: Sequence[Field], names: Collection[str]) -> list[tuple[int, int]]:
    """The words of the named ones of all `fields` (by offset); those with no other between are one range."""
    ranges: list[tuple[int, int]] = []
    joined = False
    for field in fields:
        first, end = field.offset // WORD, -(-(field.offset + field.nbytes) // WORD)
        if field.name in names and joined:
            ranges[-1] = (ranges[-1][0], end)
        elif field.name in names:
            ranges.append((first, end))
        joined = field.name in names
    return ranges


def _runs(words: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Ascending word numbers as ranges that bridge gaps of NEAR bytes."""
    parts = np.split(words, np.flatnonzero(np.diff(words) > NEAR // WORD) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _read_only(array: NDArray[np.int32]) -> NDArray[np.int32]:
    view = array.view()
    view.flags.writeable = False
    return view
