"""Serves an exported folder with plain onnxruntime: continuous batching over a pool of slots, streaming, snapshots.

    runner = OrtRunner("runs/NAME/onnx/int4", slots=8, capacity=4096)
    requests = [runner.submit(tokens, max_new_tokens=64) for tokens in prompts]
    for request, token in runner.stream():
        ...

A pool has `slots` sequences of at most `capacity` tokens. Requests wait in line, are filled in one at a time, and then
decode together, all in one call a token.

- **Prefill is one row at a time**, in pieces of `prefill_chunk`: on the CPU GroupQueryAttention takes a call of several
  tokens on top of a past for one row only. Between two pieces the others decode, so a long prompt delays them by a
  piece and not by its whole length.
- **Decoding rows are the first n slots.** The graph wants one contiguous tensor for each state, and slots are the first
  dimension, so the first n slots are one and nothing is gathered. When a row leaves, the last one takes its slot: one
  copy of one sequence for each request that ends, against a copy of all of them for each token. Decoding rows with gaps
  instead would compute the gaps.
- **A slot starts from zeros**, since recurrent states and carried rows are read from the first token on. Caches need no
  clearing: a call sees as many tokens as its mask says.
- What a request gets depends on the others only as far as onnxruntime's sums depend on the shape of a batch. Where a
  prompt is cut depends on the prompt alone.

Not thread-safe: call it from one thread. After an error of onnxruntime's within a step the states are undefined: make a
new runner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtr_deploy.engines.ort_model import OrtModel
from dtr_deploy.engines.ort_states import Snapshot, StatePool
from dtr_deploy.engines.prefix_store import PrefixStore
from dtr_deploy.engines.sampling import GREEDY, Chooser, Sampling
from dtr_deploy.errors import UsageError

# The mask of a decoding step is widened by this many columns at a time: in between, a token sets one element a row.
MASK_STEP = 128
# Shared prefixes end at a multiple of this: products work on tiles of rows, and rows in what is left of a tile are
# rounded in another way. In int4, where activations are quantized as well, that is enough to change an answer.
CUT = 16

Event = tuple["Request", int | None]
"""A request and its next token, or None once at the end of the request."""


class Request:
    """One text that is being continued. Made by `OrtRunner.submit`; read only.

    Attributes:
        prompt: as submitted.
        max_new_tokens: at most this many tokens are generated.
        tokens: generated so far, without the token that ends a text.
        finish_reason: None while it waits or runs, then "stop" (a stop token came), "length" or "aborted".
        cached_tokens: of the prompt, taken from a snapshot instead of computed.
    """

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: frozenset[int],
        shared: int,
        keep: bool,
        start: Snapshot | None,
    ) -> None:
        self.prompt, self.max_new_tokens, self.stop_tokens = prompt, max_new_tokens, stop_tokens
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.cached_tokens = 0
        self._chooser, self._shared, self._keep, self._start = Chooser(sampling), shared // CUT * CUT, keep, start
        # Where its states are, and how many tokens they hold.
        self._slot = -1
        self._length = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def _held(self) -> list[int]:
        """The tokens in its states: all but the newest, which the next step puts in."""
        return [*self.prompt, *self.tokens][: self._length]


class OrtRunner:
    """Continuous batching over an exported folder.

    Args:
        model: the folder, or an `OrtModel` that others use too.
        slots: most requests at once.
        capacity: most tokens of a request, prompt and new ones; the model's context if None.
        prefill_chunk: most prompt tokens of one call, and so of one step; best a multiple of `CUT`.
        prefix_bytes: for snapshots of shared prefixes; 0 keeps none.
        touch: take the pool's memory at once. By default the operating system gives it when texts get that long, which
            is less, but may fail late.
        threads, providers: as for `OrtModel`, if `model` is a folder.

    Raises UsageError for an option that is out of range, and what `OrtModel` raises.
    """

    def __init__(
        self,
        model: OrtModel | str | Path,
        *,
        slots: int = 8,
        capacity: int | None = None,
        prefill_chunk: int = 512,
        prefix_bytes: int = 256 * 2**20,
        touch: bool = False,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        for name, value, least in (
            ("slots", slots, 1),
            ("prefill_chunk", prefill_chunk, 1),
            ("prefix_bytes", prefix_bytes, 0),
        ):
            if value < least:
                raise UsageError(f"OrtRunner: {name} is {value}; accepted: {least} or more")
        if not isinstance(model, OrtModel):
            model = OrtModel(model, threads=threads, providers=providers)
        if capacity is not None and not 1 < capacity <= model.context:
            raise UsageError(f"OrtRunner: capacity is {capacity}; accepted: 2 to the model's context, {model.context}")
        self.model = model
        self.prefixes = PrefixStore(prefix_bytes)
        self._prefill_chunk = prefill_chunk
        self._pool = StatePool(model, slots, capacity or model.context)
        if touch:
            self._pool.touch()
        self._waiting: deque[Request] = deque()
        self._filling: Request | None = None
        self._active: list[Request] = []
        self._ends: list[Event] = []
        self._real = np.ones((1, self._pool.capacity), np.int64)
        self._ids, self._mask = np.zeros((0, 1), np.int64), np.zeros((0, 0), np.int64)
        self._lengths = np.zeros(0, np.int64)

    @property
    def slots(self) -> int:
        return self._pool.slots

    @property
    def capacity(self) -> int:
        """Most tokens of a request."""
        return self._pool.capacity

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one sequence's states at full capacity, from the arrays that hold them."""
        return self._pool.bytes_per_slot

    @property
    def free_slots(self) -> int:
        return self.slots - len(self._active) - (self._filling is not None)

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._active) + (self._filling is not None)

    @property
    def waiting(self) -> int:
        """Requests without a first token yet."""
        return len(self._waiting) + (self._filling is not None)

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] | None = None,
        shared: int = 0,
        keep: bool = False,
        start: Snapshot | None = None,
    ) -> Request:
        """Put a request in line; `step` and `stream` run it.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: at least one.
            sampling: how tokens are chosen.
            stop_tokens: ids that end the text, and are not part of it; the model's own if None, none if empty.
            shared: others will begin with this many of the prompt's first tokens: the states there go into
                `prefixes`, at a multiple of `CUT` tokens. Every prompt that begins with a stored prefix starts from it.
            keep: the states at the request's end go into `prefixes`, for a prompt that goes on from there (the next
                turn of a chat).
            start: a snapshot whose tokens the prompt begins with; the longest stored prefix if None.

        Raises UsageError for an empty or too long prompt, an id outside the vocabulary, a number out of range, or a
        snapshot that does not fit.
        """
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise UsageError("a prompt has no tokens; give each at least one")
        outside = [token for token in tokens if not 0 <= token < self.model.vocabulary]
        if outside:
            raise UsageError(f"a prompt has the id {outside[0]}; accepted: 0 to {self.model.vocabulary - 1}")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; accepted: 1 or more")
        if len(tokens) + max_new_tokens > self.capacity:
            raise UsageError(
                f"a prompt of {len(tokens):,} tokens and {max_new_tokens:,} new ones exceed the slot's capacity of "
                f"{self.capacity:,}"
            )
        if not 0 <= shared <= len(tokens):
            raise UsageError(f"shared is {shared}; accepted: 0 to the prompt's {len(tokens)} tokens")
        if start is not None and list(start.tokens) != tokens[:-1][: len(start.tokens)]:
            raise UsageError(f"the prompt does not go on from the snapshot's {len(start.tokens)} tokens")
        ends = self.model.ends if stop_tokens is None else frozenset(map(int, stop_tokens))
        request = Request(tokens, max_new_tokens, sampling, ends, shared, keep, start)
        self._waiting.append(request)
        return request

    def stream(self) -> Iterator[Event]:
        """(request, token) as they come, until no request is left; (request, None) is the end of a request.

        Requests may be submitted and aborted while it runs. After it was aborted, only a request's end still comes.
        """
        while self.unfinished or self._ends:
            for request, token in self.step():
                if token is None or request.finish_reason != "aborted":
                    yield request, token

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """The new tokens of each prompt, when all are there. options: of `submit`, the same for all."""
        requests = [self.submit(prompt, max_new_tokens, **options) for prompt in prompts]
        for _ in self.stream():
            pass
        return [request.tokens for request in requests]

    def step(self) -> list[Event]:
        """At most `prefill_chunk` prompt tokens of those in line, then one token for every decoding request."""
        return [*self.prefill(), *self.decode()]

    def prefill(self) -> list[Event]:
        """The first half of a step: what it began, and the first tokens of requests whose prompt is through."""
        events, self._ends = self._ends, []
        spent = 0
        while self._filling is not None or self._begin():
            request = self._filling
            assert request is not None
            # Where a prompt is cut depends on nothing but the prompt, so a request gives the same in any company.
            piece = self._next_piece(request)
            if spent and spent + piece > self._prefill_chunk:
                break
            spent += piece
            self._fill(request, piece, events)
        return events

    def decode(self) -> list[Event]:
        """The other half of a step: one token for each request whose prompt is through."""
        events, self._ends = self._ends, []
        rows = self._active
        if not rows:
            return events
        self._lay_out(rows)
        for row, request in enumerate(rows):
            self._ids[row, 0] = request.tokens[-1]
        logits = self._pool.call(0, self._ids, self._mask)[:, 0]
        self._lengths += 1
        self._mask[np.arange(len(rows)), self._lengths - 1] = 1
        for row, request in enumerate(rows):
            request._length += 1
            self._take(request, logits[row], events)
        for request in reversed([request for request in rows if request.finished]):
            self._leave(request)
        return events

    def abort(self, request: Request) -> None:
        """End a request now and free its slot; the tokens so far stay in it. Does nothing if it has ended."""
        if request.finished:
            return
        request.finish_reason = "aborted"
        if request is self._filling:
            self._filling = None
        elif request in self._active:
            self._leave(request)
        else:
            self._waiting.remove(request)
        self._ends.append((request, None))

    def snapshot(self, request: Request) -> Snapshot:
        """A copy of the states of a request that runs, between two steps. Raises UsageError if it does not run."""
        if request is not self._filling and request not in self._active:
            raise UsageError("a snapshot is of a request that runs; this one has ended or has not begun")
        return self._pool.save(request._slot, request._held())

    def close(self) -> None:
        """Drop requests, states and snapshots. The model stays open, since others may use it."""
        self._waiting.clear()
        self._active.clear()
        self._filling = None
        self.prefixes.clear()
        self._pool = StatePool(self.model, 1, 1)

    def _begin(self) -> bool:
        """Take the next request in line into a free slot, the one behind the decoding rows."""
        if not self._waiting or not self.free_slots:
            return False
        request = self._filling = self._waiting.popleft()
        request._slot = len(self._active)
        snapshot = request._start
        if snapshot is None and self.prefixes.budget:
            snapshot = self.prefixes.longest(request.prompt)
        if snapshot is None:
            self._pool.clear(request._slot)
        else:
            self._pool.load(request._slot, snapshot)
            request._length = request.cached_tokens = len(snapshot.tokens)
        request._start = None
        return True

    def _next_piece(self, request: Request) -> int:
        """Tokens of the next call: up to the next multiple of the chunk, the shared prefix's end or the prompt's."""
        begin = request._length
        end = request._shared if begin < request._shared else len(request.prompt)
        return min(self._prefill_chunk - begin % self._prefill_chunk, end - begin)

    def _fill(self, request: Request, piece: int, events: list[Event]) -> None:
        begin, end = request._length, request._length + piece
        ids = np.array([request.prompt[begin:end]], np.int64)
        logits = self._pool.call(request._slot, ids, self._real[:, :end])
        request._length = end
        if end == request._shared and request.prompt[:end] not in self.prefixes:
            self.prefixes.put(self._pool.save(request._slot, request.prompt[:end]))
        if end < len(request.prompt):
            return
        self._filling = None
        if request._slot != len(self._active):
            # Rows left since it began.
            self._pool.move(request._slot, len(self._active), end)
            request._slot = len(self._active)
        self._active.append(request)
        self._take(request, logits[0, -1], events)
        if request.finished:
            self._leave(request)

    def _take(self, request: Request, logits: np.ndarray, events: list[Event]) -> None:
        """Choose a request's next token, and say whether it was the last."""
        token = request._chooser.choose(logits)
        if token in request.stop_tokens:
            request.finish_reason = "stop"
        else:
            request.tokens.append(token)
            events.append((request, token))
            if len(request.tokens) == request.max_new_tokens:
                request.finish_reason = "length"
        if request.finished:
            events.append((request, None))

    def _leave(self, request: Request) -> None:
        """Free a decoding row: the last one takes its slot."""
        if request._keep and request.finish_reason != "aborted":
            self.prefixes.put(self._pool.save(request._slot, request._held()))
        last = self._active.pop()
        if last is not request:
            self._pool.move(last._slot, request._slot, last._length)
            last._slot = request._slot
            self._active[last._slot] = last
        request._slot = -1
        self._lengths = np.zeros(0, np.int64)

    def _lay_out(self, rows: list[Request]) -> None:
        """Ids, mask and lengths of the next decoding call, made anew where rows came or went or the mask is full."""
        if len(self._lengths) == len(rows) and self._lengths.max() < self._mask.shape[1]:
            return
        self._lengths = np.array([request._length for request in rows], np.int64)
        width = min(-(-(int(self._lengths.max()) + 1) // MASK_STEP) * MASK_STEP, self.capacity)
        self._mask = (np.arange(width) < self._lengths[:, None]).astype(np.int64)
        self._mask[:, -1] = 1
        self._ids = np.empty((len(rows), 1), np.int64)
