"""What a request may ask for or do, unnoticed by the others: aborts, samples, log-probabilities, beams, grammars.

References are the Hugging Face hybrid, or the same request alone in the engine.
"""

import json
import re

import numpy as np
import pytest

from tests.tiny import tiny_hybrid, tiny_tokenizer
from tests.vllm.reference import greedy, log_probabilities, random_prompts

pytestmark = pytest.mark.vllm

FORMS = (None, "gated_deltanet", "gla", "jet", "hedgehog")
NEW_TOKENS = 10
TOLERANCE = 1e-3  # as in test_parity.py


@pytest.fixture(scope="module", params=[64, 0], ids=["window 64", "no window"])
def model(request):
    return tiny_hybrid("llama", FORMS, request.param, 3, hidden=192)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_aborted_requests_leave_no_trace(serve, model, prefix_caching):
    """Aborted before, during and after their prefill. The others get their tokens; so do those that take over the
    slots; and the pool has every block back."""
    from vllm import SamplingParams

    lengths = [1, 333, 64, 200, 90, 333, 1, 130]
    prompts = random_prompts(lengths, seed=41)
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    with serve(model, enable_prefix_caching=prefix_caching) as served:
        engine, free = served.llm.llm_engine, served.free_blocks
        finished = {}
        for steps in (0, 1, 2, 4, 7):
            for index, prompt in enumerate(prompts):
                engine.add_request(f"{steps}-{index}", {"prompt_token_ids": prompt}, sampling)
            for _ in range(steps):
                finished |= {o.request_id: o for o in engine.step() if o.finished}
            engine.abort_request([f"{steps}-{index}" for index in range(1, len(prompts), 2)])
            while engine.has_unfinished_requests():
                finished |= {o.request_id: o for o in engine.step() if o.finished}
            assert served.free_blocks == free, f"{free - served.free_blocks} blocks missing"
            assert not served.scheduler.requests
        afterwards = served.greedy(prompts, NEW_TOKENS)
    expected = greedy(model, prompts, NEW_TOKENS)
    assert afterwards == expected
    for steps in (0, 1, 2, 4, 7):
        for index in range(0, len(prompts), 2):
            assert list(finished[f"{steps}-{index}"].outputs[0].token_ids) == expected[index]


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_several_samples_of_one_prompt(serve, model, prefix_caching):
    """`n` samples share a prompt and, with prefix caching, the states computed for it. The prompts take several steps,
    whose samples are dropped: they may not use up a seed's random numbers, nor stop the engine (`dtr_vllm.cpu_seeds`).
    """
    from vllm import SamplingParams

    prompts = random_prompts([70, 300], seed=43)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    shared = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False}
    with serve(model, enable_prefix_caching=prefix_caching) as served:
        free = served.free_blocks
        # Sampling from the single likeliest token is greedy; with temperature 0 vLLM itself wants n = 1.
        greedy_samples = served.llm.generate(requests, SamplingParams(n=3, top_k=1, **shared), use_tqdm=False)
        sampled = served.llm.generate(requests, SamplingParams(n=4, seed=5, **shared), use_tqdm=False)
        alone = [
            [
                # vLLM gives sample i the seed of its request plus i.
                served.llm.generate([request], SamplingParams(seed=5 + index, **shared), use_tqdm=False)[0]
                for index in range(4)
            ]
            for request in requests
        ]
        assert served.free_blocks == free
    for output, expected in zip(greedy_samples, greedy(model, prompts, NEW_TOKENS), strict=True):
        assert [list(sample.token_ids) for sample in output.outputs] == [expected] * 3
    for output, singles in zip(sampled, alone, strict=True):
        tokens = [list(sample.token_ids) for sample in output.outputs]
        assert tokens == [list(single.outputs[0].token_ids) for single in singles]
        assert len({tuple(sample) for sample in tokens}) > 1, "all samples are the same: nothing was sampled"


def test_log_probabilities_with_a_cached_prefix(serve, model):
    """The prompt's log-probabilities need the whole prompt, cached or not; new tokens' may start from a state."""
    (prompt,) = random_prompts([300], seed=47)
    with serve(model, enable_prefix_caching=True) as served:
        served.greedy([prompt], 2)
        cached = served.run([prompt], NEW_TOKENS, logprobs=5)[0]
        ((tokens, ours),) = served.distributions([prompt], NEW_TOKENS)
    assert cached.num_cached_tokens == 256
    theirs = log_probabilities(model, tokens)
    assert np.abs(ours - theirs[:-1]).max() <= TOLERANCE
    completion = cached.outputs[0]
    assert list(completion.token_ids) == tokens[len(prompt) :]
    for step, found in enumerate(completion.logprobs):
        row = theirs[len(prompt) - 1 + step]
        top = sorted(found, key=lambda token: found[token].rank)[:5]
        assert top == np.argsort(-row, kind="stable")[:5].tolist()
        assert max(abs(found[token].logprob - row[token]) for token in top) <= TOLERANCE


def test_beam_search(serve, model):
    """vLLM's beams are requests of their own that continue one another, so states come from cached prefixes or again
    from the prompt. Each beam's score has to be what the Hugging Face hybrid gives its tokens."""
    from vllm.sampling_params import BeamSearchParams

    (prompt,) = random_prompts([140], seed=53)
    with serve(model, tokenizer=tiny_tokenizer(), enable_prefix_caching=True) as served:
        (output,) = served.llm.beam_search(
            [{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
        )
    assert len(output.sequences) == 3
    for beam in output.sequences:
        rows = log_probabilities(model, beam.tokens)[len(prompt) - 1 : -1]
        new = beam.tokens[len(prompt) :]
        assert len(new) == 6
        assert beam.cum_logprob == pytest.approx(
            sum(row[token] for row, token in zip(rows, new, strict=True)), abs=0.01
        )


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("backend", ["xgrammar", "guidance"])
def test_structured_output(serve, model, backend):
    """A choice, a regular expression and a JSON schema in one batch with requests that have no grammar. In this
    vocabulary every token is a byte, so the expression's tokens are known: the likelier of a and b, eight times."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    tokenizer = tiny_tokenizer()
    prompts = random_prompts([1, 65, 200, 90], seed=59)
    constraints = [
        StructuredOutputsParams(choice=["positive", "negative"]),
        StructuredOutputsParams(regex="[ab]{8}"),
        StructuredOutputsParams(json=SCHEMA),
        None,
    ]
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=64 if constraint else NEW_TOKENS, structured_outputs=constraint)
        for constraint in constraints
    ]
    sampling[-1].ignore_eos = True
    options = {"structured_outputs_config": {"backend": backend, "disable_any_whitespace": True}}
    with serve(model, tokenizer=tokenizer, enable_prefix_caching=True, **options) as served:
        free = served.free_blocks
        for _ in range(2):  # the second time from cached prefixes
            outputs = served.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
            *constrained, plain = [list(output.outputs[0].token_ids) for output in outputs]
            # Not `.text`, which begins with what is left of the prompt's last, incomplete character.
            choice, expression, document = [tokenizer.decode(ids, skip_special_tokens=True) for ids in constrained]
            assert choice in ("positive", "negative")
            assert re.fullmatch("[ab]{8}", expression)
            assert expression == likeliest(model, tokenizer, prompts[1], "ab", 8)
            assert set(json.loads(document)) == {"answer", "sure"}
            assert plain == greedy(model, prompts[-1:], NEW_TOKENS)[0]
        assert served.free_blocks == free


def likeliest(model, tokenizer, prompt, letters, length):
    ids = tokenizer.convert_tokens_to_ids(list(letters))
    tokens = list(prompt)
    for _ in range(length):
        row = log_probabilities(model, tokens)[-1]
        tokens.append(max(ids, key=lambda token: row[token]))
    return tokenizer.decode(tokens[len(prompt) :])
