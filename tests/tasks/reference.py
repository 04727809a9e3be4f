"""The slow truth that scoring is held to: one request at a time, all logits, no padding and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dtr_deploy.tasks.requests import Request

TOLERANCE = 2e-4
"""Nats on a sum of log-probabilities: float32 matmuls of other shapes differ by about 1e-6 of a logit of size 1 to
10, layers add to that, and a continuation sums up to ten tokens."""


@torch.no_grad()
def token_log_probs(model: Any, request: Request) -> tuple[list[float], bool]:
    """Log-probability of each token of the continuation (nats), and whether each is the argmax."""
    ids = torch.tensor([request.context + request.continuation])
    log_probs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    first = len(request.context) - 1
    values, greedy = [], True
    for step, token in enumerate(request.continuation):
        row = log_probs[first + step]
        values.append(float(row[token]))
        greedy &= int(row.argmax()) == token
    return values, greedy


def sums(model: Any, requests: Sequence[Request]) -> list[float]:
    """Log-probability of each continuation, nats."""
    return [sum(token_log_probs(model, request)[0]) for request in requests]
