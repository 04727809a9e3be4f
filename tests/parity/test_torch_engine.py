"""The reference engine, held to transformers' own logits and `generate`, and to itself over other paths."""

import numpy as np
import pytest
import torch

from dtr_deploy.engines.base import TOP_K, Engine, Workload
from dtr_deploy.engines.torch import TorchEngine, available
from tests.tiny import tiny_backbone, tiny_hybrid

PROMPTS = [[5], [5, 6], list(range(3, 40)), [int(t) for t in np.random.default_rng(0).integers(3, 500, 230)]]
CACHED = 1e-4
"""Other summation orders in float32 over four layers with logits of order ten."""


@pytest.fixture(scope="module")
def hybrid():
    return tiny_hybrid("llama", ["gated_deltanet", None, "gla", None], window=8, group=3, seed=0)


def reference(model, prompt: list[int]) -> torch.Tensor:
    """[T-1, V] log-probabilities straight from the model."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("which", ["backbone", "hybrid"])
def test_scores_are_the_models_log_probabilities(which: str, hybrid) -> None:
    model = tiny_backbone("qwen3") if which == "backbone" else hybrid
    engine = TorchEngine(model)
    assert isinstance(engine, Engine) and (engine.name, engine.precision) == ("torch", "fp32")
    for prompt, scores in zip(PROMPTS, engine.score(PROMPTS), strict=True):
        expected = reference(model, prompt)
        actual = torch.tensor(prompt[1:])[:, None]
        assert scores.tokens == prompt and scores.top_ids.shape == (len(prompt) - 1, TOP_K)
        assert scores.logprobs.dtype == scores.top_logprobs.dtype == np.float32 and scores.top_ids.dtype == np.int32
        np.testing.assert_allclose(scores.logprobs, expected.gather(1, actual)[:, 0], atol=1e-5)
        np.testing.assert_allclose(scores.top_logprobs, expected.topk(TOP_K, -1).values, atol=1e-5)
        picked = expected.gather(1, torch.tensor(scores.top_ids).long())
        np.testing.assert_allclose(scores.top_logprobs, picked, atol=1e-5)


def test_logits_in_blocks_are_the_same(hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TorchEngine(hybrid).score(PROMPTS)
    monkeypatch.setattr("dtr_deploy.engines.torch.LOGIT_ROWS", 7)
    for a, b in zip(whole, TorchEngine(hybrid).score(PROMPTS), strict=True):
        # float32 sums in another order: a few units in the last place of values up to 30
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
        assert a.logprobs.shape == b.logprobs.shape


@pytest.mark.parametrize("backend", ["auto", "reference", "recurrent", "chunked"])
@pytest.mark.parametrize("cached", [False, True])
def test_every_path_agrees(hybrid, backend: str, cached: bool) -> None:
    full = TorchEngine(hybrid).score(PROMPTS)
    engine = TorchEngine(hybrid, cached=cached, backend=backend)
    for a, b in zip(full, engine.score(PROMPTS), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=CACHED)
    assert {layer.self_attn.backend for layer in hybrid.model.layers if hasattr(layer.self_attn, "form")} == {"auto"}


def test_a_backend_needs_a_hybrid() -> None:
    with pytest.raises(ValueError, match="no layer that could be run on it"):
        TorchEngine(tiny_backbone(), backend="reference")


def test_generate_is_greedy(hybrid) -> None:
    found = TorchEngine(hybrid).generate(PROMPTS[2:], 6)
    for prompt, tokens in zip(PROMPTS[2:], found, strict=True):
        expected = hybrid.generate(
            torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def test_throughput_measures_its_parts(hybrid) -> None:
    workload = Workload(prompt=64, output=4, concurrency=2)
    measured = TorchEngine(hybrid).throughput(workload, repeats=1)
    assert (measured.engine, measured.precision, measured.workload, measured.repeats) == ("torch", "fp32", workload, 1)
    assert measured.prefill_seconds > 0 and measured.decode_seconds > 0
    assert measured.end_to_end_seconds == pytest.approx(measured.prefill_seconds + measured.decode_seconds)


def test_it_says_what_it_is() -> None:
    ok, reason = available()
    assert ok and reason.startswith("torch ")
