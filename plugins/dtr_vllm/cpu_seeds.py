"""Requests with a seed on a CPU: keeps one of them from stopping the engine.

A prompt that is computed in several steps is sampled from in each, and all samples but the last are dropped. vLLM 0.32
turns the generator of a seeded request back by CUDA's offset then, which CPU generators do not have: the engine dies
with "CPU Generator does not use offset". With prefix caching nearly every prompt of a hybrid is split at a block
border, so it would happen at once. Here such steps do without the request's generator, which has the same effect.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def keep_seeds_out_of_partial_prefills() -> None:
    """Change vLLM's CPU model runner, in this process. Idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner, "keeps_seeds_out_of_partial_prefills", False):
        return
    sample, book = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def _sample(self: Any, *arguments: Any, **options: Any) -> Any:
        generators, requests = self.input_batch.generators, self.input_batch.num_reqs
        dropped = np.nonzero(self.discard_request_mask.np[:requests])[0].tolist()
        self.seeds_kept_out = {index: generators.pop(index) for index in dropped if index in generators}
        return sample(self, *arguments, **options)

    def _bookkeeping_sync(self: Any, *arguments: Any, **options: Any) -> Any:
        result = book(self, *arguments, **options)
        self.input_batch.generators.update(self.seeds_kept_out)
        return result

    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync
    CPUModelRunner.keeps_seeds_out_of_partial_prefills = True
