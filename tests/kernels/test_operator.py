"""Every backend of the operator against the token loop in float64, over random shapes, rules and decays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_kernels.operator import RULES, linear_attention, linear_attention_packed, linear_attention_step
from dtr_kernels.reference import linear_attention_reference
from tests.kernels.cases import CASES, assert_close, narrow, operands


@pytest.mark.parametrize("backend", ["chunked", "recurrent", "compiled"])
@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_backend_equals_float64_token_loop(backend, rule, **case):
    q, k, v, log_decay, beta, state = operands(rule, **case)
    scale = 0.3
    truth, final = linear_attention_reference(
        q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, state=state
    )
    q, k, v, log_decay, beta, state = narrow((q, k, v, log_decay, beta, state))
    out, new = linear_attention(
        q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, state=state, backend=backend
    )
    # float32 rounding over at most 150 steps of products of unit scale
    assert_close(out, truth, 1e-5)
    assert_close(new, final, 1e-5)


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_the_token_loop(rule, per_key):
    q, k, v, log_decay, beta, state = operands(rule, 2, 37, 2, 3, 8, 5, per_key, -0.5, None, 3)
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay, beta, state) if x is not None]
    kwargs = dict(rule=rule, log_decay=log_decay, beta=beta, scale=0.7, state=state)
    truth, _ = linear_attention_reference(q, k, v, **kwargs)
    weight = torch.randn_like(truth)
    expected = torch.autograd.grad((truth * weight).sum(), leaves)
    out, _ = linear_attention(q, k, v, backend="chunked", **kwargs)
    for ours, theirs in zip(torch.autograd.grad((out * weight).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(rule=st.sampled_from(RULES), per_key=st.booleans(), seed=st.integers(0, 2**31))
def test_packed_sequences_in_a_pool_with_null_and_stale_slots(rule, per_key, seed):
    lengths, slots = [5, 1, 70, 3], [4, 2, 1, 0]
    initial = [True, False, True, True]
    q, k, v, log_decay, beta, _ = operands(rule, 1, sum(lengths), 2, 3, 8, 6, per_key, -0.3, None, seed)
    pool = torch.randn(6, 2, 8, 6, generator=torch.Generator().manual_seed(seed))
    before = pool.clone()
    flat = [None if x is None else x[0].float() for x in (q, k, v, log_decay, beta)]
    borders = torch.tensor([0, 5, 6, 76, 79])
    out = linear_attention_packed(
        *flat[:3],
        rule=rule,
        log_decay=flat[3],
        beta=flat[4],
        scale=1.0,
        pool=pool,
        slots=torch.tensor(slots),
        cu_seqlens=borders,
        has_initial_state=torch.tensor(initial),
    )
    for r, slot in enumerate(slots):
        a, b = int(borders[r]), int(borders[r + 1])
        if slot == 0:
            assert not out[a:b].any()
            continue
        start = before[slot : slot + 1].double() if initial[r] else torch.zeros(1, 2, 8, 6, dtype=torch.float64)
        cut = [None if x is None else x[:, a:b] for x in (q, k, v, log_decay, beta)]
        truth, final = linear_attention_reference(
            *cut[:3], rule=rule, log_decay=cut[3], beta=cut[4], scale=1.0, state=start
        )
        assert_close(out[a:b], truth[0], 1e-5)
        assert_close(pool[slot], final[0], 1e-5)
    for untouched in (0, 3, 5):
        assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize("rule", RULES)
def test_step_updates_only_live_slots(rule):
    q, k, v, log_decay, beta, _ = operands(rule, 4, 1, 2, 3, 8, 6, True, -0.3, None, 11)
    pool = torch.randn(7, 2, 8, 6)
    before, slots = pool.clone(), torch.tensor([5, 0, 2, 0])
    flat = [None if x is None else x[:, 0].float() for x in (q, k, v, log_decay, beta)]
    out = linear_attention_step(
        *flat[:3], rule=rule, log_decay=flat[3], beta=flat[4], scale=0.5, pool=pool, slots=slots
    )
    truth, final = linear_attention_reference(
        q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=0.5, state=before[slots].double()
    )
    for r, slot in enumerate(slots.tolist()):
        if slot:
            assert_close(out[r], truth[r, 0], 1e-6)
            assert_close(pool[slot], final[r], 1e-6)
        else:
            assert not out[r].any()
    for untouched in (0, 1, 3, 4, 6):
        assert torch.equal(pool[untouched], before[untouched])


def test_cu_seqlens_equals_separate_sequences():
    q, k, v, log_decay, beta, _ = operands("gated_delta", 1, 90, 2, 2, 8, 8, False, -0.1, None, 5)
    state = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    borders = [0, 20, 21, 90]
    kwargs = dict(rule="gated_delta", scale=1.0)
    out, final = linear_attention(
        q, k, v, log_decay=log_decay, beta=beta, state=state, cu_seqlens=torch.tensor(borders), **kwargs
    )
    for r in range(3):
        a, b = borders[r], borders[r + 1]
        truth, end = linear_attention_reference(
            q[:, a:b], k[:, a:b], v[:, a:b], log_decay=log_decay[:, a:b], beta=beta[:, a:b],
            state=state[r : r + 1], **kwargs,
        )  # fmt: skip
        torch.testing.assert_close(out[:, a:b], truth, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(final[r : r + 1], end, rtol=1e-9, atol=1e-9)


def test_bfloat16_inputs_keep_a_float32_state():
    q, k, v, log_decay, beta, state = operands("gated_delta", 1, 100, 2, 2, 16, 16, False, -0.2, None, 6)
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    truth, _ = linear_attention_reference(
        q.double(), k.double(), v.double(), rule="gated_delta", log_decay=log_decay, beta=beta, scale=1.0, state=state
    )
    out, new = linear_attention(
        q, k, v, rule="gated_delta", log_decay=log_decay.float(), beta=beta.float(), scale=1.0, state=state.float()
    )
    assert (out.dtype, new.dtype) == (torch.bfloat16, torch.float32)
    assert_close(out, truth, 1e-2)  # one rounding to bfloat16 at the end


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rule="gatted"), "accepted are linear, gated, delta, gated_delta"),
        (dict(rule="linear"), "takes no log_decay"),
        (dict(beta=None), "needs beta"),
        (dict(state=torch.zeros(1, 2, 3, 4)), "expected"),
        (dict(backend="fast"), "accepted are auto"),
        (dict(v=torch.zeros(1, 4, 3, 8)), "heads do not fit"),
    ],
)
def test_wrong_operands_are_named(change, message):
    q, k, v, log_decay, beta, _ = narrow(operands("gated_delta", 1, 4, 2, 2, 8, 8, False, -1.0, None, 0))
    kwargs = {"q": q, "k": k, "v": v, "rule": "gated_delta", "log_decay": log_decay, "beta": beta} | change
    with pytest.raises(ValueError, match=message):
        linear_attention(kwargs.pop("q"), kwargs.pop("k"), kwargs.pop("v"), **kwargs)
