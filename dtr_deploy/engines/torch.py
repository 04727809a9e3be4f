"""The reference engine: a Hugging Face causal LM in this process.

It scores by one full forward, or, with `cached=True`, the way a server would: the prompt over several calls with a
cache, then token by token. Both must agree. It also runs the hybrid on another backend of the linear-attention
operator, for the lower rungs of the parity ladder.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dtr_deploy.engines.base import TOP_K, Throughput, TokenScores, Workload

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PRECISION = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LOGIT_ROWS = 512
"""Rows of logits made at once: a vocabulary of 150,000 at 8,000 tokens would take 4.8 GB in float32."""
CACHED_TAIL = 8
"""With `cached=True`, the last tokens of a prompt that are fed one at a time."""
CACHED_BORDERS = (1, 67, 200)
"""With `cached=True`, where a prompt is split before that: no multiple of any chunk or block size."""


def available() -> tuple[bool, str]:
    """PyTorch and transformers are requirements of dtr-deploy: always there in a whole installation."""
    from importlib.metadata import version

    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        return False, f"{' and '.join(missing)} not installed"
    return True, f"torch {version('torch')}, transformers {version('transformers')}"


class TorchEngine:
    """`Engine` over a loaded model, which it does not own: closing it leaves the model as it was.

    backend: how hybrid layers run the operator ("auto", "reference", "chunked", "recurrent",
    "compiled"). Anything but "auto" needs a hybrid: ValueError otherwise.
    """

    name = "torch"

    def __init__(self, model: PreTrainedModel, *, cached: bool = False, backend: str = "auto") -> None:
        self.model = model.eval()
        self.precision = PRECISION[str(model.dtype).removeprefix("torch.")]
        self.cached = cached
        self.backend = backend
        self.mixers: list[Any] = [module for module in model.modules() if hasattr(module, "form")]
        if backend != "auto" and not (self.mixers and all(hasattr(mixer, "backend") for mixer in self.mixers)):
            raise ValueError(f"backend {backend!r}: the model has no layer that could be run on it")

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        """One prompt after another, without padding: this is what padded batches elsewhere are held to."""
        import torch

        with torch.inference_mode(), self._operator_backend():
            return [self._score(list(prompt)) for prompt in prompts]

    def _score(self, tokens: list[int]) -> TokenScores:
        import torch

        ids = torch.tensor([tokens], device=self.model.device)
        hidden = self._hidden_cached(ids) if self.cached else self._base_model()(input_ids=ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        width = min(TOP_K, head.weight.shape[0])
        rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for begin in range(0, len(tokens) - 1, LOGIT_ROWS):
            end = min(begin + LOGIT_ROWS, len(tokens) - 1)
            logprobs = torch.log_softmax(head(hidden[0, begin:end]).float(), dim=-1)
            actual = logprobs.gather(1, ids[0, begin + 1 : end + 1, None])[:, 0]
            top, top_ids = logprobs.topk(width, dim=-1)
            rows.append((actual.cpu().numpy(), top_ids.int().cpu().numpy(), top.cpu().numpy()))
        if not rows:
            return TokenScores(
                tokens, np.zeros(0, np.float32), np.zeros((0, width), np.int32), np.zeros((0, width), np.float32)
            )
        logprob, ids_, tops = (np.concatenate(part) for part in zip(*rows, strict=True))
        return TokenScores(tokens, logprob, ids_, tops)

    def _hidden_cached(self, ids: torch.Tensor) -> torch.Tensor:
        """[1,T] ids -> [1,T,hidden] over several calls with one cache."""
        import torch

        length = ids.shape[1]
        tail = max(1, length - CACHED_TAIL)
        borders = sorted({0, *(b for b in CACHED_BORDERS if b < tail), *range(tail, length), length})
        cache, parts = None, []
        for begin, end in pairwise(borders):
            out = self._base_model()(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.last_hidden_state)
        return torch.cat(parts, dim=1)

    def _base_model(self) -> Any:
        return self.model.base_model

    @contextmanager
    def _operator_backend(self) -> Iterator[None]:
        if self.backend == "auto":
            yield
            return
        before = [mixer.backend for mixer in self.mixers]
        for mixer in self.mixers:
            mixer.backend = self.backend
        try:
            yield
        finally:
            for mixer, backend in zip(self.mixers, before, strict=True):
                mixer.backend = backend

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy, one prompt after another, with a cache."""
        import torch

        with torch.inference_mode(), self._operator_backend():
            return [self._generate(torch.tensor([list(prompt)]), max_new_tokens)[0][0].tolist() for prompt in prompts]

    def _generate(self, ids: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float, float]:
        """ids [B,T] -> new tokens [B,new_tokens], seconds until the first of them, seconds for the others."""
        import torch

        began = time.perf_counter()
        out = self.model(input_ids=ids.to(self.model.device), use_cache=True, logits_to_keep=1)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
        self._wait()
        first = time.perf_counter()
        while len(tokens) < new_tokens:
            out = self.model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        self._wait()
        return torch.cat(tokens, dim=1), first - began, time.perf_counter() - first

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        """All requests as one batch."""
        import torch

        random = torch.Generator().manual_seed(0)
        size = (workload.concurrency, workload.prompt)
        prefill, decode = [], []
        with torch.inference_mode(), self._operator_backend():
            self._generate(torch.randint(self.model.config.vocab_size, (workload.concurrency, 8), generator=random), 2)
            for _ in range(repeats):
                ids = torch.randint(self.model.config.vocab_size, size, generator=random)
                _, before_first, after_first = self._generate(ids, workload.output)
                prefill.append(before_first)
                decode.append(after_first)
        return Throughput(
            engine=self.name,
            precision=self.precision,
            workload=workload,
            repeats=repeats,
            prefill_seconds=statistics.median(prefill),
            decode_seconds=statistics.median(decode),
            end_to_end_seconds=statistics.median(a + b for a, b in zip(prefill, decode, strict=True)),
        )

    def close(self) -> None:
        return None
