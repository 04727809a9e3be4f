"""A vLLM engine inside the test process: it starts in about a second on a tiny model, so all combinations can be run.

vLLM's settings for that are process-wide; they hold for the tests of this folder and are taken back afterwards.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtr_deploy.hybrid.model import save_hybrid

# Chunks of 96 tokens: prompts of 130 tokens and more are prefilled in several steps, cut at places of no meaning.
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 96,
    "max_logprobs": -1,
    "kv_cache_memory_bytes": 64 * 2**20,
    "enable_prefix_caching": False,
    "seed": 0,
}
Prompts = list[list[int]]


class Served:
    """One model in vLLM, driven by token ids."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def run(self, prompts: Prompts, max_tokens: int, **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, flat_logprobs=True, **sampling
        )
        return self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler, which holds its cache manager."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        """Blocks of KV or state that no request holds, by the block pool's own count."""
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def greedy(self, prompts: Prompts, max_tokens: int) -> Prompts:
        return [list(output.outputs[0].token_ids) for output in self.run(prompts, max_tokens)]

    def distributions(self, prompts: Prompts, max_tokens: int) -> list[tuple[list[int], np.ndarray]]:
        """For each prompt: its tokens and the generated ones, and the log-probabilities [tokens - 1, vocabulary] vLLM
        had at every position: the prompt's through prefill, the others through decoding."""
        results = []
        for prompt, output in zip(prompts, self.run(prompts, max_tokens, logprobs=-1, prompt_logprobs=-1), strict=True):
            completion = output.outputs[0]
            rows = [*_rows(output.prompt_logprobs), *_rows(completion.logprobs)]
            results.append(([*prompt, *completion.token_ids], np.stack(rows)))
        return results


def _rows(flat: Any) -> Iterator[np.ndarray]:
    """Positions of vLLM's flat log-probabilities as rows over the vocabulary; the first prompt token has none."""
    for start, stop in zip(flat.start_indices, flat.end_indices, strict=True):
        if stop > start:
            ids = np.asarray(flat.token_ids[start:stop])
            row = np.full(ids.max() + 1, np.nan)
            row[ids] = flat.logprobs[start:stop]
            yield row


Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """`with serve(model, **options) as served`: saves the Hugging Face model and loads it in vLLM, in this process. A
    checkpoint's folder may stand in the model's place, and `tokenizer=` goes into the folder with it."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()  # vLLM's CPU worker replaces the former
    set_num_threads(1)  # tiny models gain nothing from more, and lose much when other processes hold the cores
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # else a helper of log-probabilities is compiled, for 12 s
        # Starting and stopping an engine collects garbage eight times, which is four fifths of both. The collector
        # still runs by itself.
        patch.setattr(gc, "collect", lambda generation=2: 0)
        # vLLM looks through every loaded module for kernels to replace and stumbles over an object of numba's there.
        patch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
        import dtr_vllm

        dtr_vllm.register()
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        @contextmanager
        def start(model: Any, tokenizer: Any = None, **options: Any) -> Iterator[Served]:
            folder = model
            if not isinstance(model, Path):
                folder = tmp_path_factory.mktemp("model")
                save_hybrid(model, tokenizer, folder)
            if tokenizer is not None:
                options = {"skip_tokenizer_init": False, **options}
            llm = LLM(model=str(folder), **{**OPTIONS, **options})
            try:
                yield Served(llm)
            finally:
                llm.llm_engine.engine_core.shutdown()
                del llm
                cleanup_dist_env_and_memory()

        yield start
    torch.set_num_threads = set_num_threads
    set_num_threads(threads)


@pytest.fixture
def prompts() -> Prompts:
    """Random tokens around the borders of windows (64), chunks (64, 96) and batches; one prompt of a single token."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 5, 63, 64, 65, 130, 200, 333)
    ]


@pytest.fixture(scope="session")
def hugging_face_distributions() -> Callable[[Any, list[int]], np.ndarray]:
    """The reference: log-probabilities [T-1, vocabulary] of one uncached forward pass of the Hugging Face hybrid."""

    def forward(model: Any, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:-1]])).logits[0]
        return logits.float().log_softmax(-1).numpy()

    return forward
