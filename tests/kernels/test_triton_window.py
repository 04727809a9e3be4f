"""The softmax window in Triton against full attention with a band, in float64: on the GPU or in the interpreter."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_kernels.triton import plan_of_window, window_attention_decode, window_attention_prefill
from dtr_kernels.window import Rest
from tests.kernels.cases import assert_close, banded, some_rest
from tests.kernels.triton_cases import DEVICE

LENGTH = 90
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # rounding of weights and output


def sequences(count, window, kv_heads, group, dim, dtype, seed, with_rest=False):
    """q, k, v [count, LENGTH, H, D] rounded to dtype, the truth in float64, stale rings, and the rest."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(dtype).to(DEVICE)  # noqa: E731
    q = normal(count, LENGTH, kv_heads * group, dim)
    k, v = normal(count, LENGTH, kv_heads, dim), normal(count, LENGTH, kv_heads, dim)
    rest = some_rest(q.cpu(), seed % 1000) if with_rest else None
    truth = banded(q.cpu().double(), k.cpu().double(), v.cpu().double(), window, 0.4, rest=rest).to(DEVICE)
    rings = [torch.full((6, window, kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    return q, k, v, truth, rings, rest and Rest(*(x.to(DEVICE) for x in rest))


def check_rings(rings, k, v, slots, positions, window):
    """Row p % W holds token p; rows of no token and slots of no sequence are as they were."""
    for ring, new in zip(rings, (k, v), strict=True):
        expected = torch.full_like(ring, torch.nan)
        for r, slot in enumerate(slots):
            for p in range(max(0, positions[r] - window), positions[r]):
                expected[slot, p % window] = new[r, p]
        torch.testing.assert_close(ring, expected, rtol=0, atol=0, equal_nan=True)


def packed(x, starts, lengths):
    return torch.cat([x[r, a : a + n] for r, (a, n) in enumerate(zip(starts, lengths, strict=True))])


@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.lists(st.sampled_from([0, 1, 3, 17, 40]), min_size=3, max_size=3), min_size=1, max_size=2),
    window=st.sampled_from([1, 5, 16, 48]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 4]),
    dim=st.sampled_from([8, 24]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    shared_plan=st.booleans(),
    with_rest=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_prompts_in_parts_then_tokens_one_by_one(
    steps, window, kv_heads, group, dim, dtype, shared_plan, with_rest, seed
):
    q, k, v, truth, (ring_k, ring_v), rest = sequences(3, window, kv_heads, group, dim, dtype, seed, with_rest)
    slots, starts = [3, 1, 4], [0, 0, 0]
    kwargs = dict(window=window, scale=0.4, ring_k=ring_k, ring_v=ring_v)
    for lengths in steps:
        borders = torch.tensor([0, *accumulate(lengths)], device=DEVICE)
        plan = None
        if shared_plan:
            plan = plan_of_window(borders, sum(lengths))
        out = window_attention_prefill(
            *(packed(x, starts, lengths) for x in (q, k, v)), slots=torch.tensor(slots, device=DEVICE),
            cu_seqlens=borders, start=torch.tensor(starts), plan=plan,
            rest=rest and rest._replace(value=packed(rest.value, starts, lengths)), **kwargs,
        )  # fmt: skip
        if sum(lengths):
            assert_close(out, packed(truth, starts, lengths), TOLERANCE[dtype])
        starts = [a + n for a, n in zip(starts, lengths, strict=True)]
        check_rings((ring_k, ring_v), k, v, slots, starts, window)
    for _ in range(3):
        out = window_attention_decode(
            *(torch.cat([x[range(3), starts], x[:1, 0]]) for x in (q, k, v)),
            slots=torch.tensor([*slots, 0], device=DEVICE), positions=torch.tensor([*starts, 9], device=DEVICE),
            rest=rest and rest._replace(value=torch.cat([rest.value[range(3), starts], rest.value[:1, 0]])), **kwargs,
        )  # fmt: skip
        assert_close(out[:3], truth[range(3), starts], TOLERANCE[dtype])
        assert not out[3].any()
        starts = [a + 1 for a in starts]
        check_rings((ring_k, ring_v), k, v, slots, starts, window)


def test_null_slots_and_rows_of_no_sequence_are_zero():
    q, k, v, truth, (ring_k, ring_v), _ = sequences(3, 16, 2, 2, 8, torch.float32, 0)
    take = lambda x: x[:, :20].flatten(0, 1)  # noqa: E731
    out = window_attention_prefill(
        take(q), take(k), take(v), window=16, scale=0.4, ring_k=ring_k, ring_v=ring_v,
        slots=torch.tensor([0, 2], device=DEVICE), cu_seqlens=torch.tensor([0, 20, 40]), start=torch.tensor([0, 0]),
    )  # fmt: skip
    assert not out[:20].any()
    assert not out[40:].any()
    assert_close(out[20:40], truth[1, :20], 1e-5)
    check_rings((ring_k, ring_v), k[1:], v[1:], [2], [20], 16)


def test_strided_operands_a_given_output_and_rings_in_pages():
    q, k, v, truth, rings, _ = sequences(2, 8, 2, 3, 8, torch.float32, 1)
    pages = torch.zeros(6, 400, device=DEVICE)
    ring_k, ring_v = pages[:, 16:144].unflatten(1, (8, 2, 8)), pages[:, 200:328].unflatten(1, (8, 2, 8))
    ring_k.copy_(rings[0])
    ring_v.copy_(rings[1])
    qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], 2)
    kwargs = dict(window=8, scale=0.4, ring_k=ring_k, ring_v=ring_v)
    table = torch.tensor([[5, 0], [2, 0]], device=DEVICE, dtype=torch.int32)
    given = torch.empty(2, 6, 8, device=DEVICE)
    for position in range(11):
        parts = [x.unflatten(1, (-1, 8)) for x in qkv[:, position].split([48, 16, 16], 1)]
        out = window_attention_decode(
            *parts, slots=table[:, 0], positions=torch.full((2,), position, device=DEVICE), out=given, **kwargs
        )
        assert out.data_ptr() == given.data_ptr()
        assert_close(out, truth[:, position], 1e-5)
    check_rings((ring_k, ring_v), k, v, [5, 2], [11, 11], 8)
    assert not pages[:, :16].any() and not pages[:, 144:200].any() and not pages[:, 328:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=15), r"expected \[S, 15, 2, 8\]"),
        (dict(q=torch.zeros(3, 4, 7)), "shapes do not fit"),
        (dict(ring_v=torch.zeros(6, 16, 2, 8, dtype=torch.bfloat16)), "ring_v is"),
        (dict(slots=torch.zeros(2, dtype=torch.int32)), r"expected \(3,\)"),
        (dict(positions=torch.zeros(2, dtype=torch.int32)), r"expected \(3,\)"),
        (dict(out=torch.zeros(3, 4, 9)), r"expected \(3, 4, 8\)"),
        (dict(rest=Rest(torch.zeros(4), torch.zeros(3, 4, 9))), r"expected \(4,\) and \(3, 4, 8\)"),
    ],
)
def test_wrong_operands_are_named(change, message):
    q, k, v, _, (ring_k, ring_v), _ = sequences(3, 16, 2, 2, 8, torch.float32, 0)
    slots = torch.tensor([1, 2, 3])
    kwargs = dict(q=q[:, 0], k=k[:, 0], v=v[:, 0], window=16, scale=1.0, ring_k=ring_k, ring_v=ring_v, slots=slots,
                  positions=slots)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        window_attention_decode(**(kwargs | change))
