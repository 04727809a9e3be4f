"""An exported hybrid under plain onnxruntime computes what the Hugging Face hybrid computes."""

import numpy as np
import pytest

from dtr_deploy.engines.genai import GenaiEngine
from dtr_deploy.engines.torch import TorchEngine
from dtr_kernels.forms import FORMS

FAMILIES = ("llama", "qwen2", "qwen3")
MIXED = (None, "gated_deltanet", "gla", "gated_deltanet")
# Forms whose states differ in shape, and so share the largest.
OTHERS = (None, "jet", "hedgehog", "gla")
# Both sum float32 products in other orders: 1e-5 of log-probabilities that reach -40. The gate of a build is 1e-3.
TOLERANCE = 2e-4


def largest_difference(ours, theirs) -> float:
    return max(float(np.abs(a.logprobs - b.logprobs).max(initial=0.0)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("group", (1, 3, 4))
@pytest.mark.parametrize("window", (0, 64))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_hugging_face(family, form, window, group, exported, engine, prompts):
    model, folder = exported(family, (None, form), window, group, hidden=64 if group == 4 else 96, head_dim=16)
    texts = prompts(1, 130)
    assert largest_difference(engine(folder).score(texts), TorchEngine(model).score(texts)) < TOLERANCE


@pytest.mark.parametrize("forms", (MIXED, OTHERS))
@pytest.mark.parametrize("length", (1, 2, 63, 64, 65, 127, 128, 129, 200))
def test_every_block_border_of_the_window(length, forms, exported, engine, prompts):
    model, folder = exported("llama", forms)
    texts = prompts(length)
    assert largest_difference(engine(folder).score(texts), TorchEngine(model).score(texts)) < TOLERANCE


@pytest.mark.parametrize("group", (5, 16))
def test_group_sizes_without_a_fast_kernel(group, exported, engine, prompts):
    """5 is padded to 8; above 8 nothing is padded."""
    model, folder = exported("llama", (None, "gated_deltanet"), 64, group, hidden=160, head_dim=16)
    texts = prompts(70)
    assert largest_difference(engine(folder).score(texts), TorchEngine(model).score(texts)) < TOLERANCE


@pytest.mark.parametrize("forms", ((None, "gated_deltanet"), OTHERS))
@pytest.mark.parametrize("window", (0, 1, 2, 3, 5))
def test_small_windows(window, forms, exported, engine, prompts):
    """A convolution wants 3 rows: none, fewer and as many as the window keeps."""
    model, folder = exported("llama", forms, window)
    texts = prompts(1, 4, 5, 6, 33)
    assert largest_difference(engine(folder).score(texts), TorchEngine(model).score(texts)) < TOLERANCE


@pytest.mark.parametrize(
    "forms", (("gla", "gated_deltanet", None), ("hedgehog", "jet", None), ("gla", "hedgehog", None))
)
def test_first_layer_linear_and_last_layer_full(forms, exported, engine, prompts):
    model, folder = exported("qwen2", forms)
    texts = prompts(90)
    assert largest_difference(engine(folder).score(texts), TorchEngine(model).score(texts)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_unreplaced_backbone(family, exported, engine, prompts):
    model, folder = exported(family, None)
    texts = prompts(1, 90)
    assert largest_difference(engine(folder).score(texts), TorchEngine(model).score(texts)) < TOLERANCE


def test_top_ids_and_their_log_probabilities(exported, engine, prompts):
    model, folder = exported()
    ours, theirs = engine(folder).score(prompts(40))[0], TorchEngine(model).score(prompts(40))[0]
    np.testing.assert_allclose(ours.top_logprobs, theirs.top_logprobs, atol=TOLERANCE)
    assert (ours.top_ids[:, 0] == theirs.top_ids[:, 0]).all()


@pytest.mark.parametrize("forms", (MIXED, OTHERS))
@pytest.mark.parametrize("precision", ("int8", "int4"))
def test_quantized_is_close(precision, forms, exported, engine, prompts):
    """Mean KL from the fp32 export, against what quantizing the unreplaced backbone of the same random weights costs.

    Random weights quantize badly at 4 bits, backbone or hybrid alike, hence the comparison: twice the backbone's for
    the sensitivity of gates and normalisation, and 0.01 nats for int8, where both are almost nothing.
    """
    texts = prompts(60, 90)

    def divergence(forms) -> float:
        full, quantized = (
            engine(exported("llama", forms, precision=kind)[1], kind).score(texts) for kind in ("fp32", precision)
        )
        return mean_kl(full, quantized)

    assert divergence(forms) < 2 * divergence(None) + 0.01


@pytest.mark.parametrize("window", (0, 64))
@pytest.mark.parametrize("forms", (MIXED, OTHERS, ("gated_deltanet", "gla", None)))
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_close(family, forms, window, exported, engine, prompts):
    """Mean KL from the fp32 export, against the unreplaced backbone's own; states and forms stay float32.

    Twice the backbone's: each layer rounds what it gets and gives, whatever it is made of.
    """
    texts = prompts(1, 60, 130)

    def divergence(forms) -> float:
        full, half = (
            engine(exported(family, forms, window, precision=kind)[1], kind).score(texts) for kind in ("fp32", "fp16")
        )
        return mean_kl(full, half)

    assert divergence(forms) < 2 * divergence(None) + 1e-4 < 1e-2


@pytest.mark.parametrize("forms", (None, MIXED, ("gated_deltanet", "gla", None)))
def test_half_precision_under_genai(forms, exported, engine, prompts):
    """Same folder, two programs, the same kernels."""
    _, folder = exported("llama", forms, precision="fp16")
    texts = prompts(1, 70)
    assert GenaiEngine(folder, "fp16", threads=1).generate(texts, 8) == engine(folder, "fp16").generate(texts, 8)


def mean_kl(full, other) -> float:
    return float(np.mean([_kl(a, b, row) for a, b in zip(full, other, strict=True) for row in range(len(a.logprobs))]))


def _kl(a, b, row: int) -> float:
    """KL of position `row` over a's most likely tokens; what b does not list has b's smallest listed probability."""
    listed = dict(zip(b.top_ids[row].tolist(), b.top_logprobs[row].tolist(), strict=True))
    floor = min(listed.values())
    log_q = np.array([listed.get(token, floor) for token in a.top_ids[row].tolist()])
    return float(np.sum(np.exp(a.top_logprobs[row]) * (a.top_logprobs[row] - log_q)))
