"""The two kernels that training on a GPU adds to torch, and the chunkwise form with them, against float64 loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_kernels import chunked
from dtr_kernels.chunked import linear_attention_chunked
from dtr_kernels.reference import linear_attention_reference
from dtr_kernels.triton.training import carry, inverse
from tests.kernels.cases import assert_close, narrow, operands
from tests.kernels.triton_cases import DEVICE, RULE_DECAYS

TOLERANCE = 1e-5  # rounding of float32, over at most a few hundred sums of unit scale


def leaf(x, dtype=torch.float64):
    return x.to(DEVICE, dtype, copy=True).requires_grad_()


def loop(updates, state, decay, x, y):
    before = []
    for n in range(updates.shape[1]):
        before.append(state)
        new = updates[:, n] if x is None else updates[:, n] - y[:, n].mT @ (x[:, n] @ state)
        state = (state if decay is None else state * decay[:, n, :, None]) + new
    return torch.stack(before, 1), state


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "key"])
@pytest.mark.parametrize(
    ("sequences", "chunks", "tokens", "key_dim", "value_dim"),
    [(2, 3, 32, 24, 17), (1, 4, 64, 40, 16), (3, 1, 16, 64, 33)],
)
def test_states_from_chunk_to_chunk_and_their_gradients(
    sequences, chunks, tokens, key_dim, value_dim, decay, corrected
):
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    exact = [
        normal(sequences, chunks, key_dim, value_dim),
        normal(sequences, key_dim, value_dim),
        None if decay is None else normal(sequences, chunks, key_dim if decay == "key" else 1).sigmoid(),
        *(normal(sequences, chunks, tokens, key_dim) / (tokens * key_dim) ** 0.5 if corrected else None for _ in "xy"),
    ]
    cotangents = normal(sequences, chunks, key_dim, value_dim), normal(sequences, key_dim, value_dim)
    leaves, ours = ([None if x is None else leaf(x, dtype) for x in exact] for dtype in (torch.float64, torch.float32))
    truth, found = loop(*leaves), carry(*ours)
    for a, b in zip(found, truth, strict=True):
        assert_close(a, b, TOLERANCE)
    for run, dtype in ((truth, torch.float64), (found, torch.float32)):
        torch.autograd.backward(run, [c.to(DEVICE, dtype) for c in cotangents])
    for a, b in zip(ours, leaves, strict=True):
        if a is not None:
            assert_close(a.grad, b.grad, TOLERANCE)


@pytest.mark.parametrize("size", [32, 64])
def test_inverse_and_its_gradient(size):
    exact = torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril(-1) / 8
    a, b = leaf(exact), leaf(exact, torch.float32)
    truth = torch.linalg.inv(torch.eye(size, dtype=torch.float64, device=DEVICE) + a.tril(-1))
    found = inverse(b)
    assert_close(found, truth, TOLERANCE)
    cotangent = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    truth.backward(cotangent)
    found.backward(cotangent.float())
    assert_close(b.grad, a.grad, TOLERANCE)
    with pytest.raises(ValueError, match="accepted are 32, 64"):
        inverse(torch.zeros(16, 16, device=DEVICE))


@settings(max_examples=12, deadline=None)
@given(
    rule_decay=st.sampled_from(RULE_DECAYS),
    length=st.sampled_from([1, 5, 31, 33, 64, 100, 130]),
    group=st.sampled_from([1, 3]),
    key_dim=st.sampled_from([16, 40]),
    decay=st.sampled_from([0.0, -0.3, -20.0]),
    seed=st.integers(0, 2**31),
)
def test_the_chunkwise_form_with_them(rule_decay, length, group, key_dim, decay, seed):
    """Output, last state and every gradient, against autograd through the token loop in float64."""
    rule, per_key = rule_decay
    tensors = operands(rule, 2, length, 2, group, key_dim, 16, per_key, decay, None, seed)
    names = ("q", "k", "v", "log_decay", "beta", "state")
    exact, ours = (
        {name: None if x is None else leaf(x, dtype) for name, x in zip(names, tensors, strict=True)}
        for dtype in (torch.float64, torch.float32)
    )
    truth = linear_attention_reference(**exact, rule=rule, scale=0.5)
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "on_gpu", lambda *_: called.append(1) or True)
        found = linear_attention_chunked(**ours, rule=rule, scale=0.5)
    assert called
    g = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(DEVICE) for x in truth]
    for a, b in zip(found, truth, strict=True):
        assert_close(a, b, TOLERANCE)
    torch.autograd.backward(truth, cotangents)
    torch.autograd.backward(found, [c.float() for c in cotangents])
    for name, x in ours.items():
        if x is not None:
            assert_close(x.grad, exact[name].grad, 5 * TOLERANCE)


def test_wide_heads_are_left_to_torch(monkeypatch):
    """Two blocks of 256 keys do not fit a program's shared memory."""
    monkeypatch.setattr(chunked, "on_gpu", lambda *_: True)
    tensors = narrow(operands("delta", 1, 40, 1, 1, 256, 16, False, 0.0, None, 0))
    q, k, v, _, beta, state = (None if x is None else x.to(DEVICE) for x in tensors)
    assert chunked._kernels(q, k, v, state, True) is None and chunked._kernels(q, k, v, state, False) is not None
    out, _ = linear_attention_chunked(q, k, v, rule="delta", log_decay=None, beta=beta, scale=1.0, state=state)
    exact = [None if x is None else x.double() for x in (q, k, v, beta, state)]
    truth, _ = linear_attention_reference(
        *exact[:3], rule="delta", log_decay=None, beta=exact[3], scale=1.0, state=exact[4]
    )
    assert_close(out, truth, TOLERANCE)
