"""KL and perplexity against torch's own losses on whole logits, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dtr_deploy.tasks.divergence import Divergence
from tests.tiny import tiny_backbone, tiny_hybrid

TOLERANCE = 1e-4  # nats a token: float32 logits of size 1 to 10, against float64
IDS = torch.randint(8, 512, (5, 33), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def log_probs(model: object) -> torch.Tensor:
    return model(IDS[:, :-1], use_cache=False).logits.double().log_softmax(-1)  # type: ignore[operator]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("batch_tokens", [33, 80, 10_000])
def test_kl_and_nll_equal_torchs_losses(batch_tokens: int, every: int) -> None:
    teacher, student = tiny_backbone(), tiny_hybrid(window=8)
    divergence = Divergence(IDS, batch_tokens, every)
    divergence.reference(teacher)
    score = divergence.score(student)
    p, q = log_probs(teacher), log_probs(student)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[:, ::every].mean(1)
    nll = F.cross_entropy(q.transpose(1, 2), IDS[:, 1:], reduction="none")[:, ::every].mean(1)
    np.testing.assert_allclose(score.kl, kl.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(score.nll, nll.numpy(), atol=TOLERANCE)
    assert score.perplexity == pytest.approx(float(nll.mean().exp()), rel=TOLERANCE)
    np.testing.assert_array_equal(divergence.kl(student), score.kl)
    assert divergence.perplexity(student) == score.perplexity


def test_the_teacher_does_not_diverge_from_itself() -> None:
    teacher, divergence = tiny_backbone(), Divergence(IDS)
    own = divergence.reference(teacher)
    assert np.abs(own.kl).max() == 0
    assert np.abs(divergence.kl(teacher)).max() < 1e-6
    assert own.perplexity == divergence.perplexity(teacher)


def test_hidden_states_from_elsewhere_are_read_alike() -> None:
    teacher, student, divergence = tiny_backbone(), tiny_backbone(seed=1), Divergence(IDS, 80)
    states = [teacher.model(batch.input_ids).last_hidden_state for batch in divergence.batches()]
    divergence.reference_hidden(states, teacher.lm_head)
    one = divergence.score(student)
    divergence.reference(teacher)
    np.testing.assert_allclose(one.kl, divergence.kl(student), atol=1e-6)


def test_a_reference_must_come_first() -> None:
    with pytest.raises(RuntimeError, match="reference"):
        Divergence(IDS).kl(tiny_backbone())
    with pytest.raises(ValueError, match="T >= 2"):
        Divergence(IDS[:, :1])
    with pytest.raises(ValueError, match="at least 1"):
        Divergence(IDS, every=0)


def test_fingerprints_tell_what_is_read() -> None:
    assert Divergence(IDS).fingerprint() != Divergence(IDS, every=4).fingerprint()
