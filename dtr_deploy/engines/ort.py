"""`Engine` over plain onnxruntime: scores of whole prompts, and text and throughput through `OrtRunner`.

`model.onnx` gives the logits of each row's last token, and is what serves; scores come from `model_all_logits.onnx`,
which is opened when the first are asked for. Batches of prompts to score are padded on the right and masked in the
graph. Prompts longer than `prefill_chunk`, and batches with too many tokens or logits, go in row by row over several
calls, which bounds memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dtr_deploy.engines.base import TOP_K, Throughput, TokenScores, Workload
from dtr_deploy.engines.ort_model import OrtModel
from dtr_deploy.engines.ort_model import available as available
from dtr_deploy.engines.ort_runner import OrtRunner
from dtr_deploy.engines.ort_states import StatePool
from dtr_deploy.engines.timing import WorkloadTimer
from dtr_deploy.errors import UsageError

# Logits of one call, float32, and tokens of one call, padding counted: rows are added to a batch as long as both stay
# below these.
LOGIT_BYTES = 512 * 2**20
CALL_TOKENS = 8192
# Most prompts that `generate` decodes together.
SLOTS = 8


class OrtEngine:
    """`Engine` over a folder written by `dtr_deploy.export.onnx`.

    Args:
        folder: holds model.onnx and genai_config.json; for scores also model_all_logits.onnx.
        precision: what the folder was exported as; reported, not checked.
        threads: of one operator; `available_cores()` if None.
        prefill_chunk: most tokens of a row in one call; 0 for no limit.
        providers: onnxruntime execution providers.

    Raises UsageError if onnxruntime or a file is missing.
    """

    name = "ort"

    def __init__(
        self,
        folder: str | Path,
        precision: str,
        *,
        threads: int | None = None,
        prefill_chunk: int = 2048,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self._model = OrtModel(folder, threads=threads, providers=providers)
        self.folder = self._model.folder
        self.precision = precision
        self.prefill_chunk = prefill_chunk
        self._runner: OrtRunner | None = None
        self._timer = WorkloadTimer(self.name, precision, np.arange(self._model.vocabulary), self._run_batch)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        """In batches of prompts of similar length; a prompt too long for one call is alone in its batch."""
        session = self._model.scoring_session()
        scores: list[TokenScores | None] = [None] * len(prompts)
        for indices in self._batches(prompts):
            batch = [list(prompts[i]) for i in indices]
            parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in batch]
            pool = StatePool(self._model, len(batch), max(map(len, batch)), session)
            for first, begin, logits in self._logits(batch, pool):
                for row, row_logits in enumerate(logits, start=first):
                    end = min(begin + len(row_logits), len(batch[row]) - 1)
                    if end > begin:
                        parts[row].append(_top(row_logits[: end - begin], batch[row][begin + 1 : end + 1]))
            for i, tokens, rows in zip(indices, batch, parts, strict=True):
                scores[i] = _collect(tokens, rows, min(TOP_K, self._model.vocabulary))
        return [score for score in scores if score is not None]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy, end-of-text ignored."""
        if not prompts:
            return []
        longest = max(map(len, prompts))
        runner = self._runner_for(min(len(prompts), SLOTS), longest, max_new_tokens)
        return runner.generate(prompts, max_new_tokens, stop_tokens=())

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        """`concurrency` rows in one batch."""
        return self._timer.measure(workload, repeats)

    def close(self) -> None:
        self._runner = None
        self._model.close()

    def _runner_for(self, slots: int, prompt: int, new_tokens: int) -> OrtRunner:
        """The last runner if it fits, so that memory is not touched for the first time in every run."""
        capacity = max(2, prompt + new_tokens)
        if self._runner is None or self._runner.slots != slots or self._runner.capacity < capacity:
            self._runner = None
            chunk = self.prefill_chunk or capacity
            self._runner = OrtRunner(self._model, slots=slots, capacity=capacity, prefill_chunk=chunk, prefix_bytes=0)
        return self._runner

    def _run_batch(self, batch: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
        """New tokens of each row, seconds until the first of all rows, seconds for the others."""
        runner = self._runner_for(len(batch), len(batch[0]), new_tokens)
        requests = [runner.submit(tokens, new_tokens, stop_tokens=()) for tokens in batch]
        began = time.perf_counter()
        while runner.waiting:
            runner.prefill()
        first = time.perf_counter()
        while runner.unfinished:
            runner.decode()
        rest = time.perf_counter() - first
        return [request.tokens for request in requests], first - began, rest

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of prompts that are scored together: sorted by length, within one call's limits; long ones alone."""
        if any(len(prompt) == 0 for prompt in prompts):
            raise UsageError("a prompt has no tokens; give each at least one")
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if batch and not self._one_call(len(batch) + 1, len(prompts[i])):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _one_call(self, rows: int, length: int) -> bool:
        """Whether rows x length tokens go in at once; else a row at a time, and each row in pieces."""
        within_chunk = not self.prefill_chunk or length <= self.prefill_chunk
        tokens = rows * length
        return within_chunk and tokens <= CALL_TOKENS and tokens * self._model.vocabulary * 4 <= LOGIT_BYTES

    def _logits(self, batch: Sequence[Sequence[int]], pool: StatePool) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first row, first position, logits [rows,T',vocabulary]) of each call."""
        lengths = np.array([len(tokens) for tokens in batch])
        longest = int(lengths.max())
        if self._one_call(len(batch), longest):
            ids = np.zeros((len(batch), longest), np.int64)
            for row, tokens in enumerate(batch):
                ids[row, : len(tokens)] = tokens
            yield 0, 0, pool.call(0, ids, (np.arange(longest) < lengths[:, None]).astype(np.int64))
            return
        # GroupQueryAttention takes a second call of several tokens for one row only.
        step = self.prefill_chunk or longest
        for row, tokens in enumerate(batch):
            for begin in range(0, len(tokens), step):
                piece = np.array([tokens[begin : begin + step]], np.int64)
                yield row, begin, pool.call(row, piece, np.ones((1, begin + piece.shape[1]), np.int64))


def _top(logits: np.ndarray, actual: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logits [N,vocabulary] and the next tokens -> their log-probabilities, the most likely ids and theirs."""
    import torch

    logprobs = torch.from_numpy(logits).float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(actual)[:, None])[:, 0]
    top, ids = logprobs.topk(min(TOP_K, logprobs.shape[-1]), dim=-1)
    return chosen.numpy(), ids.int().numpy(), top.numpy()


def _collect(tokens: list[int], rows: list[tuple[np.ndarray, ...]], width: int) -> TokenScores:
    if not rows:
        empty = np.zeros((0, width))
        return TokenScores(tokens, np.zeros(0, np.float32), empty.astype(np.int32), empty.astype(np.float32))
    return TokenScores(tokens, *(np.concatenate(part) for part in zip(*rows, strict=True)))
