"""The states of several sequences, and the calls of the graph on them, with past and present in one buffer.

Every state is one array whose first dimension is the slot, so that neighbouring slots are one contiguous tensor: a
decoding step binds slots 0 to n-1 of each array, a prefill binds one slot. Nothing is copied between calls, and what is
bound is only bound again when it is another array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtr_deploy.engines.ort_model import OrtModel


@dataclass(frozen=True)
class Snapshot:
    """The states of one sequence after `tokens`, copied out of a pool. arrays: by state, caches cut to the tokens."""

    tokens: tuple[int, ...]
    arrays: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class StatePool:
    """States for `slots` sequences of at most `capacity` tokens, zeros at first.

    The arrays are reserved at once, but the operating system gives memory for a page only when it is first written.
    """

    def __init__(self, model: OrtModel, slots: int, capacity: int, session: Any = None) -> None:
        """session: whose calls are made; the model's served graph if None."""
        import onnxruntime

        self.model, self.slots, self.capacity = model, slots, capacity
        self._session = session or model.session
        self._ort_value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.arrays = {state.name: np.zeros(state.of(slots, capacity), state.dtype) for state in model.states}
        self._last_logits = np.empty((slots, 1, model.vocabulary), model.logits_dtype)
        self._calls: dict[tuple[int, int], _Bound] = {}

    @property
    def bytes_per_slot(self) -> int:
        """Of all states of one sequence, at full capacity."""
        return sum(array.nbytes for array in self.arrays.values()) // self.slots

    def touch(self) -> None:
        """Have the operating system give all memory now. Only for a pool that holds nothing: it writes zeros."""
        for array in self.arrays.values():
            array.fill(0)

    def call(self, first: int, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Run the graph on slots first to first + B - 1, whose states it moves on.

        Args:
            first: the first slot.
            ids: int64 [B,T], contiguous.
            mask: int64 [B,L], contiguous. Its last T columns are 1 for a token of `ids` and 0 for padding on the right;
                the ones before them count the tokens that the slot holds. L is at most `capacity`. After a first call,
                B must be 1 or T must be 1 (a rule of GroupQueryAttention).

        Returns:
            logits [B,1,vocabulary] of each row's last token, or [B,T,vocabulary] if the session gives all logits, in
            the model's dtype, in a buffer that the next call overwrites.

        Arrays that are passed again, changed or not, are not bound again.
        """
        rows, length = ids.shape
        bound = self._calls.get((first, rows))
        if bound is None:
            bound = self._calls[first, rows] = self._bind(first, rows)
        self._set(bound, "input_ids", ids)
        self._set(bound, "attention_mask", mask)
        if self.model.takes_positions:
            before = mask[:, : mask.shape[1] - length].sum(1, keepdims=True)
            self._set(bound, "position_ids", before + np.arange(length))
        everything = self.model.all_logits or self._session is not self.model.session
        if everything and (bound.logits is None or bound.logits.shape[1] != length):
            self._set_logits(bound, np.empty((rows, length, self.model.vocabulary), self.model.logits_dtype))
        self._session.run_with_iobinding(bound.binding)
        assert bound.logits is not None
        return bound.logits

    def clear(self, slot: int) -> None:
        """Make a slot empty. What is left of its caches is never read: a call sees as many tokens as its mask says."""
        for state in self.model.states:
            if not state.cache:
                self.arrays[state.name][slot] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a sequence of `length` tokens to another slot."""
        for state in self.model.states:
            array = self.arrays[state.name]
            if state.cache:
                array[target, :, :length] = array[source, :, :length]
            else:
                array[target] = array[source]

    def save(self, slot: int, tokens: Sequence[int]) -> Snapshot:
        """A copy of a slot that holds `tokens`."""
        length = len(tokens)
        arrays = {
            state.name: self.arrays[state.name][slot, :, :length].copy()
            if state.cache
            else self.arrays[state.name][slot].copy()
            for state in self.model.states
        }
        return Snapshot(tuple(tokens), arrays)

    def load(self, slot: int, snapshot: Snapshot) -> None:
        """Make a slot what it was when the snapshot was taken."""
        for state in self.model.states:
            array, saved = self.arrays[state.name], snapshot.arrays[state.name]
            if state.cache:
                array[slot, :, : saved.shape[1]] = saved
            else:
                array[slot] = saved

    def _bind(self, first: int, rows: int) -> _Bound:
        bound = _Bound(self._session.io_binding())
        for state in self.model.states:
            # An OrtValue in host memory refers to the array: no copy.
            value = self._ort_value(self.arrays[state.name][first : first + rows])
            bound.binding.bind_ortvalue_input(state.name, value)
            bound.binding.bind_ortvalue_output(state.present, value)
        self._set_logits(bound, self._last_logits[:rows])
        return bound

    def _set(self, bound: _Bound, name: str, array: np.ndarray) -> None:
        if bound.inputs.get(name) is not array:
            bound.binding.bind_ortvalue_input(name, self._ort_value(array))
            bound.inputs[name] = array

    def _set_logits(self, bound: _Bound, logits: np.ndarray) -> None:
        bound.binding.bind_ortvalue_output("logits", self._ort_value(logits))
        bound.logits = logits


class _Bound:
    """A binding of one range of slots. inputs, logits: the arrays it refers to, which must live as long as it does."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.inputs: dict[str, np.ndarray] = {}
        self.logits: np.ndarray | None = None
