"""Batched, prefix-sharing likelihood scoring against one unbatched forward a request."""

import random

import numpy as np
import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.requests import Request, encode_pairs
from dtr_deploy.tasks.scoring import (
    MIN_SHARED,
    fingerprint,
    hidden_states,
    plan_batches,
    prefix_cache,
    read_requests,
    repeat_cache,
)
from tests.tasks.reference import TOLERANCE, token_log_probs
from tests.tiny import tiny_backbone, tiny_hybrid, tiny_tokenizer


def random_requests(count: int = 24, prefix: int = 0, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(8, 512) for _ in range(length))

    shared = tokens(prefix)
    requests = []
    for _ in range(count // 3):
        context = shared + tokens(rng.randint(1, 30))
        # Two answers to one context, one of them of one token; and one context of its own.
        requests += [Request(context, tokens(1)), Request(context, tokens(rng.randint(2, 6)))]
        requests.append(Request(shared + tokens(rng.randint(1, 50)), tokens(rng.randint(1, 3))))
    return requests


MODELS = {
    "llama": lambda: tiny_backbone("llama"),
    "qwen2": lambda: tiny_backbone("qwen2"),
    "hybrid": lambda: tiny_hybrid("llama", window=8),
    "hybrid without window": lambda: tiny_hybrid("qwen3", window=0),
    "hybrid that starts linear": lambda: tiny_hybrid("llama", forms=("gated_deltanet", "gla", None), window=8),
}


@pytest.mark.parametrize("prefix", [0, MIN_SHARED + 9], ids=["no prefix", "shared prefix"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_one_forward_a_request(name: str, prefix: int) -> None:
    model = MODELS[name]()
    requests = random_requests(prefix=prefix)
    batches = plan_batches(requests, pad_token_id=0, batch_tokens=150)
    assert len(batches) > 2 and all(batch.shared >= prefix for batch in batches)
    scores = read_requests(batches, hidden_states(model, batches), model.get_output_embeddings(), len(requests))
    for index, request in enumerate(requests):
        values, greedy = token_log_probs(model, request)
        assert scores.log_probs[index] == pytest.approx(sum(values), abs=TOLERANCE)
        assert scores.greedy[index] == greedy
        assert scores.lengths[index] == len(request.continuation)


def test_greedy_is_true_for_what_the_model_would_write() -> None:
    model = tiny_backbone()
    context = (9, 10, 11)
    written = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:]
    right = tuple(written.tolist())
    wrong = (*right[:3], (right[3] + 1) % 512)
    batches = plan_batches([Request(context, right), Request(context, wrong)], 0)
    scores = read_requests(batches, hidden_states(model, batches), model.get_output_embeddings(), 2)
    assert scores.greedy.tolist() == [True, False]


def test_inputs_that_begin_alike_share_a_row() -> None:
    context = (20, 21, 22)
    answers = [(30,), (31,), (32, 33), (32, 34, 35)]
    [batch] = plan_batches([Request(context, answer) for answer in answers], 0)
    # Read from `context` (three times), `context 32` (twice) and `context 32 34`: one row holds them all.
    assert batch.input_ids.tolist() == [[20, 21, 22, 32, 34]]
    assert len(batch.targets) == 1 + 1 + 2 + 3


def test_rows_are_sorted_by_length_and_batches_hold_the_budget() -> None:
    requests = random_requests(60)
    batches = plan_batches(requests, 0, batch_tokens=200)
    lengths = [int(row.sum()) for batch in batches for row in batch.attention_mask]
    assert lengths == sorted(lengths, reverse=True)
    assert all(batch.tokens <= 200 or batch.input_ids.shape[0] == 1 for batch in batches)
    assert sorted(index for batch in batches for index in set(batch.requests.tolist())) == list(range(len(requests)))


def test_a_shared_prefix_never_covers_a_position_that_is_read() -> None:
    context = tuple(range(100, 100 + 2 * MIN_SHARED))
    # The second request is read from inside what both have in common.
    requests = [Request(context, (9, 8)), Request(context[: MIN_SHARED + 1], (7, 6))]
    batches = plan_batches(requests, 0)
    assert all(int(batch.positions.min()) >= batch.shared for batch in batches)


def test_reading_all_columns_and_only_the_last_ones_agree() -> None:
    model, requests = tiny_backbone(), random_requests(prefix=MIN_SHARED)
    batches = plan_batches(requests, 0)
    short = list(hidden_states(model, batches))
    full = [model.model(b.input_ids, attention_mask=b.attention_mask, use_cache=False)[0] for b in batches]
    assert all(s.shape[1] == f.shape[1] - b.shared for s, f, b in zip(short, full, batches, strict=True))
    one = read_requests(batches, short, model.lm_head, len(requests))
    other = read_requests(batches, full, model.lm_head, len(requests))
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=TOLERANCE)


def test_forward_hidden_replaces_the_models_own_forward() -> None:
    model, other, requests = tiny_backbone(seed=0), tiny_backbone(seed=1), random_requests()
    batches = plan_batches(requests, 0)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return other.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    through = read_requests(batches, hidden_states(model, batches, forward), other.lm_head, len(requests))
    direct = read_requests(batches, hidden_states(other, batches), other.lm_head, len(requests))
    np.testing.assert_array_equal(through.log_probs, direct.log_probs)


def test_repeating_a_cache_leaves_the_original_alone() -> None:
    model = tiny_hybrid(window=8)
    ids = torch.randint(8, 512, (1, 20))
    cache = prefix_cache(model, ids)
    before = [tensor.clone() for layer in cache.layers for tensor in _tensors(layer)]
    copy = repeat_cache(cache, 3)
    model(torch.randint(8, 512, (3, 5)), past_key_values=copy, use_cache=True)
    after = [tensor for layer in cache.layers for tensor in _tensors(layer)]
    assert len(before) == len(after) > 4
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _tensors(layer: object) -> list[torch.Tensor]:
    values = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else [value])]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_prompts_longer_than_the_context_are_refused() -> None:
    model = tiny_backbone()
    model.config.max_position_embeddings = 16
    batches = plan_batches([Request(tuple(range(8, 40)), (9,))], 0)
    with pytest.raises(UsageError, match=r"32 tokens does not fit .* context of 16"):
        next(hidden_states(model, batches))


def test_hidden_states_of_the_wrong_shape_are_refused() -> None:
    batches = plan_batches(random_requests(), 0)
    with pytest.raises(ValueError, match="do not fit"):
        read_requests(batches, [torch.zeros(1, 2, 3)] * len(batches), lambda h: h, 24)


def test_a_fingerprint_sees_every_token_and_every_read() -> None:
    one = plan_batches([Request((9, 10, 11), (12,))], 0)
    assert fingerprint(one) == fingerprint(plan_batches([Request((9, 10, 11), (12,))], 0))
    others = [Request((9, 10, 12), (12,)), Request((9, 10, 11), (13,)), Request((9, 10), (11, 12))]
    assert len({fingerprint(one), *(fingerprint(plan_batches([other], 0)) for other in others)}) == 4


@pytest.mark.parametrize("context", ["Label:", "Label: ", "é 🙂"])
def test_pairs_have_the_tokens_of_the_whole_text(context: str) -> None:
    tokenizer = tiny_tokenizer()
    [request] = encode_pairs(tokenizer, [(context, " good")])
    assert list(request.context + request.continuation) == tokenizer(context + " good")["input_ids"]
    assert tokenizer.decode(request.context) == context.rstrip(" ")
