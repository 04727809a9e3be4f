"""Plain onnxruntime: an exported folder in one `InferenceSession`, its states bound in place.

Past and present of every state are one buffer, so that a decoding step copies no cache. Batches are padded on the right
and masked in the graph. Prompts longer than `prefill_chunk`, and batches with too many logits, go in row by row over
several calls, which bounds memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dtr_deploy.engines.base import TOP_K, Throughput, TokenScores, Workload
from dtr_deploy.engines.timing import WorkloadTimer
from dtr_deploy.errors import UsageError

MODEL_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"
# Logits of one call, float32: rows are added to a batch as long as batch x length x vocabulary stays below it.
LOGIT_BYTES = 512 * 2**20
ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def available() -> tuple[bool, str]:
    """(True, version) or (False, what is missing). Imports nothing heavy."""
    if find_spec("onnxruntime") is None:
        return False, "onnxruntime is not installed (pip install onnxruntime)"
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return True, f"onnxruntime {importlib.metadata.version(name)}"
    return True, "onnxruntime"


def available_cores() -> int:
    """Physical cores this process may use: its affinity without hyperthread siblings, and the container's quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        try:
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            cores.add(("", str(cpu)))
    count = len(cores)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return max(1, count)


class OrtEngine:
    """`Engine` over a folder written by `dtr_deploy.export.onnx`.

    Args:
        folder: holds model.onnx and genai_config.json.
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
        found, reason = available()
        if not found:
            raise UsageError(reason)
        import onnxruntime

        self.folder = check_folder(folder)
        self.precision = precision
        self.prefill_chunk = prefill_chunk
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            str(self.folder / MODEL_FILE), options, providers=list(providers)
        )
        config = json.loads((self.folder / CONFIG_FILE).read_text())
        self._ort_value: Any = onnxruntime.OrtValue.ortvalue_from_numpy
        self._head_size = int(config["model"]["decoder"]["head_size"])
        self._in_place_kv = bool(config["search"].get("past_present_share_buffer", False))
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._has_position_ids = "position_ids" in inputs
        self._past = {name: value for name, value in inputs.items() if name.startswith(("past_key_values.", "past."))}
        logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        self._vocabulary = int(logits.shape[-1])
        self._all_logits = logits.shape[1] != 1
        self._timer = WorkloadTimer(self.name, precision, np.arange(self._vocabulary), self._generate)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        """In batches of prompts of similar length; a prompt too long for one call is alone in its batch."""
        if not self._all_logits:
            raise UsageError(f"{self.folder}: exported with last_logits_only, so it cannot score prompts")
        scores: list[TokenScores | None] = [None] * len(prompts)
        for indices in self._batches(prompts):
            batch = [list(prompts[i]) for i in indices]
            parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in batch]
            for first, begin, logits in self._prefill(batch, _Decoder(self, len(batch), max(map(len, batch)))):
                for row, row_logits in enumerate(logits, start=first):
                    end = min(begin + len(row_logits), len(batch[row]) - 1)
                    if end > begin:
                        parts[row].append(_top(row_logits[: end - begin], batch[row][begin + 1 : end + 1]))
            for i, tokens, rows in zip(indices, batch, parts, strict=True):
                scores[i] = _collect(tokens, rows, min(TOP_K, self._vocabulary))
        return [score for score in scores if score is not None]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy, end-of-text ignored; prompts of one batch differ in length and are padded on the right."""
        outputs: list[list[int]] = [[] for _ in prompts]
        for indices in self._batches(prompts):
            batch = [list(prompts[i]) for i in indices]
            for i, tokens in zip(indices, self._generate(batch, max_new_tokens)[0], strict=True):
                outputs[i] = tokens
        return outputs

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        """`concurrency` rows in one batch."""
        return self._timer.measure(workload, repeats)

    def close(self) -> None:
        self._session = None

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of prompts that run together: sorted by length, within LOGIT_BYTES; long ones alone."""
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
        return within_chunk and rows * (length if self._all_logits else 1) * self._vocabulary * 4 <= LOGIT_BYTES

    def _prefill(self, batch: Sequence[Sequence[int]], decoder: _Decoder) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first row, first position, logits [rows,T',vocabulary]) of each call."""
        lengths = np.array([len(tokens) for tokens in batch])
        longest = int(lengths.max())
        if self._one_call(len(batch), longest) or not self._in_place_kv:
            ids = np.zeros((len(batch), longest), np.int64)
            for row, tokens in enumerate(batch):
                ids[row, : len(tokens)] = tokens
            yield 0, 0, decoder.run(ids, (np.arange(longest) < lengths[:, None]).astype(np.int64))
            return
        # GroupQueryAttention takes a second call of several tokens for one row only.
        step = self.prefill_chunk or longest
        for row, tokens in enumerate(batch):
            alone = decoder.row(row)
            for begin in range(0, len(tokens), step):
                piece = np.array([tokens[begin : begin + step]], np.int64)
                yield row, begin, alone.run(piece, np.ones_like(piece))
        decoder.resume(lengths)

    def _generate(self, batch: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
        """New tokens of each row, seconds until the first of them, seconds for the others."""
        began = time.perf_counter()
        lengths = np.array([len(tokens) for tokens in batch])
        decoder = _Decoder(self, len(batch), int(lengths.max()) + new_tokens)
        last_logits = np.empty((len(batch), self._vocabulary), np.float32)
        for first_row, begin, logits in self._prefill(batch, decoder):
            for row, row_logits in enumerate(logits, start=first_row):
                # The last call of a row holds its last token; one position is all there is with last_logits_only.
                at = lengths[row] - 1 - begin if self._all_logits else 0
                if at < len(row_logits):
                    last_logits[row] = row_logits[at]
        token = last_logits.argmax(-1)
        outputs = [token]
        first = time.perf_counter()
        one = np.ones((len(batch), 1), np.int64)
        while len(outputs) < new_tokens:
            token = decoder.run(token[:, None], one)[:, -1].argmax(-1)
            outputs.append(token)
        rest = time.perf_counter() - first
        return np.stack(outputs, 1).tolist(), first - began, rest


class _Decoder:
    """The states of one batch, and the calls on them."""

    def __init__(
        self, engine: OrtEngine, rows: int, capacity: int, states: dict[str, np.ndarray] | None = None
    ) -> None:
        """capacity: most tokens a row will ever hold. states: share these instead of starting from zeros."""
        self.engine = engine
        self.mask = np.zeros((rows, 0), np.int64)
        self.arrays = states or {
            name: np.zeros(self._shape(value, rows, capacity), ELEMENT_TYPES[value.type])
            for name, value in engine._past.items()
        }
        # No copy: an OrtValue in host memory refers to the array.
        self.values: dict[str, Any] = {name: engine._ort_value(array) for name, array in self.arrays.items()}
        self.binding: Any = engine._session.io_binding()

    def _shape(self, value: Any, rows: int, capacity: int) -> list[int]:
        if not is_kv(value.name):
            return [rows, *value.shape[1:]]
        engine = self.engine
        return [rows, value.shape[1], capacity if engine._in_place_kv else 0, engine._head_size]

    def row(self, row: int) -> _Decoder:
        """A decoder for one row, on this one's states."""
        return _Decoder(self.engine, 1, 0, {name: array[row : row + 1] for name, array in self.arrays.items()})

    def resume(self, lengths: np.ndarray) -> None:
        """Take over rows that were filled one by one, each with lengths[row] tokens."""
        self.mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)

    def run(self, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
        """ids [B,T] int64, real [B,T] int64 (1 = token, 0 = right padding) -> logits [B,T,vocabulary] float32."""
        binding, engine = self.binding, self.engine
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        if engine._has_position_ids:
            binding.bind_cpu_input("position_ids", self.mask.sum(1, keepdims=True) + np.arange(ids.shape[1]))
        self.mask = np.concatenate([self.mask, real], axis=1)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64))
        binding.bind_cpu_input("attention_mask", self.mask)
        binding.bind_output("logits")
        growing = []
        for name, value in self.values.items():
            present = name.replace("past_key_values.", "present.").replace("past.", "present.")
            binding.bind_ortvalue_input(name, value)
            if is_kv(name) and not engine._in_place_kv:
                binding.bind_output(present)
                growing.append(name)
            else:
                binding.bind_ortvalue_output(present, value)
        engine._session.run_with_iobinding(binding)
        outputs = dict(zip(["logits", *self.values], binding.get_outputs(), strict=True))
        self.values.update({name: outputs[name] for name in growing})
        return outputs["logits"].numpy().astype(np.float32, copy=False)


def is_kv(name: str) -> bool:
    """Whether an input is a KV cache of a full-attention layer, which grows with the text."""
    return name.startswith("past_key_values.")


def check_folder(folder: str | Path) -> Path:
    """The folder, if it is an export; UsageError names the file that is missing."""
    folder = Path(folder)
    for name in (MODEL_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: no {name}; expected a folder written by dtr-deploy export")
    return folder


def _top(logits: np.ndarray, actual: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logits [N,vocabulary] and the next tokens -> their log-probabilities, the most likely ids and theirs."""
    import torch

    logprobs = torch.from_numpy(logits).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(actual)[:, None])[:, 0]
    top, ids = logprobs.topk(min(TOP_K, logprobs.shape[-1]), dim=-1)
    return chosen.numpy(), ids.int().numpy(), top.numpy()


def _collect(tokens: list[int], rows: list[tuple[np.ndarray, ...]], width: int) -> TokenScores:
    if not rows:
        empty = np.zeros((0, width))
        return TokenScores(tokens, np.zeros(0, np.float32), empty.astype(np.int32), empty.astype(np.float32))
    return TokenScores(tokens, *(np.concatenate(part) for part in zip(*rows, strict=True)))
