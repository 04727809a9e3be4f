"""What vLLM is held to: the Hugging Face hybrid, one prompt at a time; and random prompts for both."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def random_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]


def greedy(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Each prompt by itself through transformers' `generate`, with its cache."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )
        results.append(out[0, len(prompt) :].tolist())
    return results


def log_probabilities(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """[T, vocabulary], row t after tokens[: t + 1], of one uncached forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0]
    return logits.float().log_softmax(-1).numpy()


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over positions of KL(reference || other), both [T, vocabulary] log-probabilities; in nats."""
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())
