"""Decoding in Triton against the float64 token loop and against the forms: on the GPU or in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_kernels.forms import FormConfig, make_form
from dtr_kernels.reference import linear_attention_reference
from dtr_kernels.triton import linear_attention_decode
from dtr_kernels.triton.arithmetic import softplus
from tests.kernels.cases import assert_close
from tests.kernels.triton_cases import DEVICE, RULE_DECAYS, huge_pool, pack


@settings(max_examples=60, deadline=None)
@given(
    rule_decay=st.sampled_from(RULE_DECAYS),
    slots=st.lists(st.integers(-1, 7), min_size=1, max_size=5, unique=True),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    key_dim=st.sampled_from([8, 24, 64]),
    value_dim=st.sampled_from([8, 17, 65]),
    decay=st.sampled_from([0.0, -0.05, -20.0]),
    beta=st.sampled_from([None, 0.0, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    pool_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_one_token_each(rule_decay, slots, **kwargs):
    case = pack(*rule_decay, [1] * len(slots), slots=slots, **kwargs)
    inputs = case.inputs()
    case.check(linear_attention_decode(**inputs), inputs["pool"])


@settings(max_examples=30, deadline=None)
@given(
    rule_decay=st.sampled_from(RULE_DECAYS),
    lengths=st.lists(st.integers(0, 8), min_size=5, max_size=5),
    slots=st.permutations([-1, 0, 1, 4, 7]),
    initial=st.lists(st.booleans(), min_size=5, max_size=5),
    group=st.sampled_from([1, 3]),
    value_dim=st.sampled_from([8, 33]),
    pool_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_few_tokens_each(rule_decay, lengths, slots, initial, **kwargs):
    case = pack(*rule_decay, lengths, slots=slots, initial=initial, key_dim=16, **kwargs)
    inputs = case.inputs()
    case.check(linear_attention_decode(**inputs, **case.packing()), inputs["pool"])


def test_writes_to_a_given_output_of_its_dtype_and_leaves_other_rows_alone():
    case = pack("gated", True, [2, 3], slots=[4, 0])
    rows = torch.full((9, 6, 17), 7.0, dtype=torch.bfloat16, device=DEVICE)
    inputs = case.inputs()
    for name in ("q", "k", "v", "log_decay"):
        inputs[name] = torch.cat([inputs[name], torch.full_like(inputs[name][:4], torch.nan)])
    out = linear_attention_decode(**inputs, **case.packing(), out=rows)
    assert out.data_ptr() == rows.data_ptr()
    assert_close(out[:5], case.truth()[0], 1e-2)
    assert (out[5:] == 7).all()


def test_strided_slots_and_views():
    case = pack("gated_delta", False, [1, 1, 1], kv_heads=2, group=2, key_dim=16, value_dim=16)
    inputs = case.inputs()
    qkv = torch.cat([inputs[n].flatten(1) for n in ("q", "k", "v")], 1)
    q, k, v = (x.unflatten(1, (-1, 16)) for x in qkv.split([64, 32, 32], 1))
    slots = torch.stack([inputs["slots"], inputs["slots"] + 1], 1)[:, 0]
    inputs.update(q=q, k=k, v=v, slots=slots, beta=inputs["beta"].t().contiguous().t())
    case.check(linear_attention_decode(**inputs), inputs["pool"])


def test_pools_of_more_than_two_to_the_31_elements():
    pool, slot = huge_pool(1, 16, 16)
    case = pack("gated", False, [1], kv_heads=1, key_dim=16, value_dim=16)
    small = replace(case, pool=pool[slot][None].repeat(8, 1, 1, 1))
    inputs = case.inputs() | {"pool": pool, "slots": torch.tensor([slot], dtype=torch.int32, device=DEVICE)}
    out = linear_attention_decode(**inputs)
    truth, states = small.truth()
    assert_close(out, truth, 1e-5)
    assert_close(pool[slot], states[case.slots[0]], 1e-2)  # one rounding to bfloat16


CONFIG = FormConfig(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=16)
ROWS = 4


def form_and_inputs(name):
    """A form with random parameters and its inputs for ROWS tokens, on DEVICE."""
    g = torch.Generator().manual_seed(3)
    form = make_form(name, CONFIG)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=g))
    q, k, v = (torch.randn(ROWS, heads, 16, generator=g) for heads in (6, 2, 2))
    return form.to(DEVICE), *(x.to(DEVICE) for x in (q, k, v, 2 * torch.randn(ROWS, 24, generator=g)))


def form_truth(form, q, k, v, hidden, state):
    """The form itself around the float64 token loop: output before mixing, and the states."""
    operands = [x if x is None else x[:, None] for x in form.operands(q, k, v, hidden)]
    out, states = linear_attention_reference(
        *operands[:3], rule=form.rule, log_decay=operands[3], beta=operands[4], scale=form.scale, state=state.double()
    )
    return form.readout(out[:, 0], hidden).detach(), states.detach()


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("name", ["gated_deltanet", "gla"])
@torch.no_grad()
def test_fused_gates_norms_and_readout_equal_the_form(name, gain):
    form, q, k, v, hidden = form_and_inputs(name)
    if name == "gated_deltanet":
        gates = dict(
            log_decay=form.decay_proj(hidden), decay_from="softplus", decay_log_rate=form.decay_log_rate,
            beta=form.beta_proj(hidden), beta_from="logits", l2_normalise=True,
        )  # fmt: skip
    else:
        logits = form.decay_up(form.decay_down(hidden)).unflatten(-1, (2, 16))
        gates = dict(log_decay=logits, decay_from="logsigmoid", beta=None)
    pool = torch.randn(6, 2, 16, 16, device=DEVICE)
    slots = torch.tensor([3, 1, 5, 2], device=DEVICE)
    truth, states = form_truth(form, q, k, v, hidden, pool[slots])
    if not gain:
        operands = [x if x is None else x[:, None].double() for x in form.operands(q, k, v, hidden)]
        truth, _ = linear_attention_reference(
            *operands[:3], rule=form.rule, log_decay=operands[3], beta=operands[4], scale=form.scale,
            state=pool[slots].double(),
        )  # fmt: skip
        truth = truth[:, 0]
    out = linear_attention_decode(
        q, k, v, rule=form.rule, scale=form.scale, pool=pool, slots=slots,
        readout_gain=form.out_gain if gain else None, **gates,
    )  # fmt: skip
    assert_close(out, truth, 1e-5)
    assert_close(pool[slots], states, 1e-5)


@torch.no_grad()
def test_normaliser_equals_hedgehog():
    form, q, k, v, hidden = form_and_inputs("hedgehog")
    pool = torch.rand(6, 2, 32, 17, device=DEVICE)
    pool[2] = 0  # a sequence's first token
    slots = torch.tensor([3, 0, 2, 5], device=DEVICE)
    truth, states = form_truth(form, q, k, v, hidden, pool[slots])
    operands = form.operands(q, k, v, hidden)
    before = pool.clone()
    out = linear_attention_decode(
        *operands[:3], rule=form.rule, log_decay=None, beta=None, scale=form.scale, pool=pool, slots=slots,
        normaliser=True, readout_gain=form.out_gain, rms_readout=False,
    )  # fmt: skip
    live = [0, 2, 3]
    assert_close(out[live], truth[live], 1e-5)
    assert_close(pool[slots[live]], states[live], 1e-5)
    assert not out[1].any()
    assert torch.equal(pool[[0, 1, 4]], before[[0, 1, 4]])


def test_normaliser_under_decays_and_corrections_is_the_last_column():
    case = pack("gated_delta", True, [3, 1], key_dim=16, value_dim=9)
    case.v[..., -1] = 1.0
    inputs = case.inputs()
    inputs["pool"].abs_()
    truth, states = replace(case, pool=case.pool.abs()).truth()
    far = truth[..., -1:].abs().clamp_min(0.1)  # the truth divides by what is not near 0
    assert (truth[..., -1:] > 0).any()
    out = linear_attention_decode(**inputs, **case.packing(), normaliser=True)
    positive = (truth[..., -1] > 0.1)[..., None]
    assert_close(torch.where(positive, out, 0.0), torch.where(positive, truth[..., :-1] / far, 0.0), 1e-5)
    assert_close(inputs["pool"], states, 1e-5)


@pytest.mark.parametrize("normaliser", [False, True])
def test_readout_of_a_state_too_large_for_one_program(normaliser):
    case = pack("gated", False, [1, 1], slots=[3, 0], kv_heads=1, group=2, key_dim=256, value_dim=256 + normaliser)
    case.v[..., -1] = 1.0
    inputs = case.inputs()
    inputs["pool"][..., -1].abs_()
    inputs["q"].abs_()
    inputs["k"].abs_()
    truth, states = replace(case, q=case.q.abs(), k=case.k.abs(), pool=inputs["pool"].clone()).truth()
    gain = torch.linspace(0.5, 2, 512, device=DEVICE).view(2, 256)
    out = linear_attention_decode(**inputs, normaliser=normaliser, readout_gain=gain, out_dtype=torch.bfloat16)
    truth = truth[0, :, :-1] / truth[0, :, -1:] if normaliser else truth[0]
    truth = truth * torch.rsqrt(truth.square().mean(-1, keepdim=True) + 1e-6) * gain
    assert_close(out[0], truth, 1e-2)
    assert not out[1].any()
    assert_close(inputs["pool"], states, 1e-5)


@triton.jit
def apply_softplus(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, softplus(tl.load(x + i)))


def test_softplus_is_relatively_exact_where_decays_are_small():
    x = torch.linspace(-60, 60, 1024, device=DEVICE)
    out = torch.empty_like(x)
    apply_softplus[(1,)](x, out, N=1024)
    exact = torch.log1p(torch.exp(x.double()))
    assert ((out.double() - exact) / exact).abs().max() < 5e-6  # exp(-60) itself is rounded to 60 ulp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(decay_from="sigmoid"), "accepted are"),
        (dict(decay_from="softplus"), "needs it"),
        (dict(beta=None), "needs beta"),
        (dict(decay_log_rate=torch.zeros(3), decay_from="softplus"), r"expected \(2,\)"),
        (dict(readout_gain=torch.zeros(6, 16)), r"expected \(6, 17\)"),
        (dict(out=torch.zeros(2, 6, 16)), r"expected \(2, 6, 17\)"),
        (dict(slots=torch.tensor([1])), "2 tokens for 1 slots"),
        (dict(cu_seqlens=torch.tensor([0, 2])), "2 slots need 3 borders"),
        (dict(rule="delta", log_decay=None, decay_from="logsigmoid"), "nothing to make from logsigmoid"),
    ],
)
def test_wrong_operands_are_named(change, message):
    case = pack("gated_delta", False, [1, 1])
    with pytest.raises(ValueError, match=message):
        linear_attention_decode(**{**case.inputs(), **change})
