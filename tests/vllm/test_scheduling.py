"""What vLLM's scheduler does leaves the tokens as they are: chunks, batches, reused slots, cached prefixes."""

import numpy as np
import pytest

from tests.tiny import tiny_hybrid
from tests.vllm.reference import greedy, random_prompts

pytestmark = pytest.mark.vllm

FORMS = (None, "gated_deltanet", "gla", "jet", "hedgehog", None)
NEW_TOKENS = 12
TOLERANCE = 1e-3  # as in test_parity.py


@pytest.fixture(scope="module", params=[64, 0], ids=["window 64", "no window"])
def model(request):
    return tiny_hybrid("llama", FORMS, request.param, 3, hidden=192)


def alone(model, prompts, new_tokens=NEW_TOKENS):
    return greedy(model, prompts, new_tokens)


@pytest.mark.parametrize("chunk", [16, 63, 64, 65, 2048])
def test_prefill_in_chunks_of_any_size(serve, hugging_face_distributions, model, chunk):
    """Chunks shorter than, equal to and longer than the window; a border falls on and beside every multiple of 64."""
    prompts = random_prompts([200, 257, 129], seed=chunk)
    with serve(model, max_num_batched_tokens=chunk) as served:
        for tokens, ours in served.distributions(prompts, 2):
            assert np.abs(ours - hugging_face_distributions(model, tokens)).max() <= TOLERANCE


def test_slots_are_reused_without_a_trace(serve, model, prompts):
    """vLLM never clears a state slot. Rounds in different orders give every prompt slots that others have filled; the
    one-token prompt has no token but its first to overwrite them with."""
    expected = alone(model, prompts)
    with serve(model) as served:
        assert served.greedy(prompts, NEW_TOKENS) == expected
        assert served.greedy(prompts[::-1], NEW_TOKENS) == expected[::-1]
        single = random_prompts([1] * 8, seed=3)
        assert served.greedy(single, NEW_TOKENS) == alone(model, single)


def test_more_requests_than_fit_a_batch(serve, model):
    """Requests end at different times and others take their place among running decodes."""
    prompts = random_prompts([1, 200, 3, 64, 90, 2, 140, 17, 1, 65, 33, 128], seed=5)
    with serve(model, max_num_seqs=3) as served:
        assert served.greedy(prompts, NEW_TOKENS) == alone(model, prompts)


def test_cached_prefixes_give_the_same_tokens(serve, model):
    prompts = random_prompts([129, 300, 700, 1100], seed=11)
    longer = [prompts[2][:650] + random_prompts([50], seed=12)[0]]
    with serve(model, enable_prefix_caching=True, max_num_batched_tokens=512) as served:
        first = served.run(prompts, NEW_TOKENS)
        second = served.run(prompts, NEW_TOKENS)
        branch = served.run(longer, NEW_TOKENS)
    expected = alone(model, prompts)
    assert [list(o.outputs[0].token_ids) for o in first] == expected
    assert [list(o.outputs[0].token_ids) for o in second] == expected
    assert [list(o.outputs[0].token_ids) for o in branch] == alone(model, longer)
    # States are kept at the last border of 128 tokens a step ends on; without hits this test would say nothing.
    assert [o.num_cached_tokens for o in second] == [128, 256, 640, 1024]
    assert branch[0].num_cached_tokens == 640


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_requests_start_over(serve, model, prefix_caching):
    """With pages for few sequences, vLLM drops running requests and computes them again later; with prefix caching
    from a state it kept."""
    prompts = random_prompts([100, 120, 110, 90], seed=13)
    new_tokens = 60
    options = {"max_model_len": 512, "disable_log_stats": False, "enable_prefix_caching": prefix_caching}
    # A page holds 128 tokens of attention or one state. There are enough for the four prompts, until they grow.
    with serve(model, num_gpu_blocks_override=14, **options) as served:
        free = served.free_blocks
        outputs = served.run(prompts, new_tokens)
        assert served.free_blocks == free
    assert sum(o.metrics.num_preemptions for o in outputs) > 0, "nothing was preempted: the pool is too large"
    assert [list(o.outputs[0].token_ids) for o in outputs] == alone(model, prompts, new_tokens)
