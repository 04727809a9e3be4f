"""Prefill in Triton against the float64 token loop: on the GPU if there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_kernels.triton import linear_attention_prefill, plan_of_operator
from dtr_kernels.triton.arithmetic import INTERPRETED, unit_lower_inverse
from tests.kernels.cases import assert_close
from tests.kernels.triton_cases import DEVICE, RULE_DECAYS, huge_pool, pack


def check(case):
    inputs = case.inputs()
    case.check(linear_attention_prefill(**inputs, **case.packing()), inputs["pool"])


def test_kernels_run_on_the_gpu_or_in_the_interpreter():
    assert INTERPRETED.value == (not torch.cuda.is_available())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rule", "per_key"), RULE_DECAYS)
def test_rules_decays_and_groups(rule, per_key, group):
    # chunks of 32: one token more than a chunk, one alone, and a part of one
    check(
        pack(rule, per_key, [33, 1, 7], kv_heads=2, group=group, key_dim=24, value_dim=17, initial=[True, False, True])
    )


@settings(max_examples=25, deadline=None)
@given(
    rule_decay=st.sampled_from(RULE_DECAYS),
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65]), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3]),
    key_dim=st.sampled_from([8, 16, 40]),
    value_dim=st.sampled_from([8, 33]),
    decay=st.sampled_from([0.0, -0.05, -20.0]),
    beta=st.sampled_from([None, 0.0, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    pool_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    initial=st.lists(st.booleans(), min_size=3, max_size=3),
    slots=st.permutations([-1, 0, 1, 2, 5]),
    seed=st.integers(0, 2**31),
)
def test_any_pack(rule_decay, lengths, initial, slots, key_dim, dtype, **kwargs):
    n = len(lengths)
    if dtype != torch.float32:
        # 64 keys of 8 dimensions are nearly dependent: the delta rule's system then amplifies rounding to bfloat16.
        key_dim = max(key_dim, 40)
    check(pack(*rule_decay, lengths, initial=initial[:n], slots=slots[:n], key_dim=key_dim, dtype=dtype, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "per_key"), [x for x in RULE_DECAYS if x[0].startswith("gated")])
def test_decays_from_none_to_all_are_exact(rule, per_key, dtype):
    """exp(-20) a token sums to -1,280 in a chunk; what float32 loses there must not reach the tokens that matter."""
    case = pack(rule, per_key, [130], kv_heads=1, group=2, key_dim=32, value_dim=16, dtype=dtype)
    g = torch.Generator().manual_seed(7)
    choice = torch.tensor([0.0, -20.0, -1e-3, -0.37, -200.0], dtype=torch.float64)
    decay = choice[torch.randint(5, case.log_decay.shape, generator=g)]
    decay[:60] = -20.0 + 0.01 * decay[:60]
    decay[60:75] *= 1e-2
    beta = None if case.beta is None else torch.randint(2, case.beta.shape, generator=g).double().to(DEVICE)
    check(case.with_decays(decay.float().double().to(DEVICE), beta))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rule", "per_key"), RULE_DECAYS)
def test_narrow_inputs(rule, per_key, dtype):
    check(pack(rule, per_key, [66, 5], kv_heads=1, group=2, key_dim=40, dtype=dtype, pool_dtype=torch.bfloat16))


def test_operand_and_output_dtypes_are_choices():
    case = pack("gated_delta", False, [40], kv_heads=1, group=2)
    out = linear_attention_prefill(
        **case.inputs(), **case.packing(), operand_dtype=torch.bfloat16, out_dtype=torch.bfloat16
    )
    assert out.dtype == torch.bfloat16
    assert_close(out, case.truth()[0], 1e-2)


@pytest.mark.parametrize(("rule", "per_key"), [("gated", True), ("gated_delta", False)])
def test_a_prompt_in_two_calls_is_the_prompt_in_one(rule, per_key):
    """Chunked prefill: the second call starts from what the first left in the slots."""
    whole = pack(rule, per_key, [50, 41], kv_heads=1, initial=[False, False])
    inputs = whole.inputs()
    truth, states = whole.truth()
    for cuts, initial in (([(0, 37), (50, 60)], False), ([(37, 50), (60, 91)], True)):
        rows = torch.cat([torch.arange(*cut) for cut in cuts]).to(DEVICE)
        part = {n: None if inputs[n] is None else inputs[n][rows] for n in ("q", "k", "v", "log_decay", "beta")}
        borders = torch.tensor([0, cuts[0][1] - cuts[0][0], len(rows)])
        out = linear_attention_prefill(
            **{**inputs, **part}, cu_seqlens=borders, has_initial_state=torch.tensor([initial, initial])
        )
        assert_close(out, truth[rows], 1e-5)
    assert_close(inputs["pool"], states, 1e-5)


def test_rows_of_no_sequence_are_zero_and_one_plan_serves_many_layers():
    case = pack("gated_delta", False, [20, 0, 35], slots=[3, 1, 2], initial=[True, False, False])
    inputs = case.inputs()
    longer = {n: torch.nn.functional.pad(inputs[n], (0,) * (2 * inputs[n].ndim - 1) + (40,), value=9.0)
              for n in ("q", "k", "v", "log_decay", "beta")}  # fmt: skip
    plan = plan_of_operator(torch.tensor(case.borders), 95, torch.float32, DEVICE)
    truth, states = case.truth()
    for _ in range(2):
        inputs["pool"].copy_(case.pool)
        out = linear_attention_prefill(**{**inputs, **longer}, **case.packing(), plan=plan)
        assert_close(out[:55], truth, 1e-5)
        assert not out[55:].any()
        assert_close(inputs["pool"], states, 1e-5)
        assert torch.equal(inputs["pool"][1], case.pool[1])  # an empty sequence has no first token to start from zeros
    with pytest.raises(ValueError, match="the plan is for 95 tokens"):
        linear_attention_prefill(**inputs, **case.packing(), plan=plan)


@pytest.mark.parametrize("sequences", [1, 130, 300])
def test_plan_covers_every_token_once(sequences):
    lengths = torch.randint(0, 70, (sequences,), generator=torch.Generator().manual_seed(sequences))
    borders = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens = int(borders[-1]) + 33
    plan = plan_of_operator(borders.to(DEVICE), tokens, torch.float32)
    sequence, begin, end = plan.table.tolist()
    borders = [*borders.tolist(), tokens]
    expected = [
        (r, a, min(a + 32, borders[r + 1])) for r in range(sequences + 1) for a in range(borders[r], borders[r + 1], 32)
    ]
    table = list(zip(sequence, begin, end, strict=True))
    assert table[: len(expected)] == expected
    assert all(row == (-1, 0, 0) for row in table[len(expected) :])
    assert all(table[plan.first_chunk[r]][0] == r for r in range(sequences) if lengths[r])


def test_strided_views_are_read_in_place():
    case = pack("gated_delta", False, [33, 9], kv_heads=2, group=2, key_dim=16, value_dim=16)
    inputs = case.inputs()
    qkv = torch.cat([inputs[n].flatten(1) for n in ("q", "k", "v")], 1)
    q, k, v = (x.unflatten(1, (-1, 16)) for x in qkv.split([64, 32, 32], 1))
    pages = torch.randn(8, 700, device=DEVICE)
    pool = pages[:, 64:576].unflatten(1, (2, 16, 16))
    pool.copy_(case.pool)
    before = pages.clone()
    inputs.update(q=q, k=k, v=v, pool=pool, log_decay=inputs["log_decay"].t().contiguous().t())
    case.check(linear_attention_prefill(**inputs, **case.packing()), pool)
    before[:, 64:576], pages[:, 64:576] = 0, 0
    assert torch.equal(before, pages)


def test_pools_of_more_than_two_to_the_31_elements():
    pool, slot = huge_pool(1, 16, 16)
    case = pack("gated", False, [20], kv_heads=1, key_dim=16, value_dim=16)
    small = replace(case, pool=pool[slot][None].repeat(8, 1, 1, 1))
    inputs = case.inputs() | {"pool": pool, "slots": torch.tensor([slot], dtype=torch.int32, device=DEVICE)}
    out = linear_attention_prefill(**inputs, **case.packing())
    truth, states = small.truth()
    assert_close(out, truth, 1e-5)
    assert_close(pool[slot], states[case.slots[0]], 1e-2)  # one rounding to bfloat16


@triton.jit
def invert(a, out, C: tl.constexpr):
    i = tl.arange(0, C)
    at = i[:, None] * C + i[None, :]
    tl.store(out + at, unit_lower_inverse(tl.load(a + at), C))


@pytest.mark.parametrize("size", [32, 64])
def test_block_inverse_of_a_system_whose_powers_explode(size):
    """All ones below the diagonal: the inverse has entries of 1, the powers that a Neumann series adds up of 10^18."""
    a = torch.ones(size, size, device=DEVICE).tril(-1)
    a[5, 2], a[size - 1, 0] = 0.25, -0.5
    out = torch.empty_like(a)
    invert[(1,)](a, out, C=size)
    assert_close(out, torch.linalg.inv(torch.eye(size, dtype=torch.float64, device=DEVICE) + a.double()), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rule="gatted"), "accepted are linear, gated, delta, gated_delta"),
        (dict(rule="gated"), "takes no beta"),
        (dict(log_decay=None), "needs log_decay"),
        (dict(q=torch.zeros(8, 3, 24)), "do not divide"),
        (dict(k=torch.zeros(8, 2, 8)), "shapes do not fit"),
        (dict(v=torch.zeros(8, 2, 17, dtype=torch.float64)), "v is torch.float64"),
        (dict(pool=torch.zeros(8, 2, 24, 16)), r"expected \[S, 2, 24, 17\]"),
        (dict(pool=torch.zeros(8, 2, 17, 24).transpose(2, 3)), "must be contiguous"),
        (dict(cu_seqlens=torch.tensor([0, 8, 8])), "1 slots need 2 borders"),
        (dict(operand_dtype=torch.float16), "operand_dtype torch.float16"),
    ],
)
def test_wrong_operands_are_named(change, message):
    case = pack("gated_delta", False, [8])
    with pytest.raises(ValueError, match=message):
        linear_attention_prefill(**{**case.inputs(), **case.packing(), **change})
