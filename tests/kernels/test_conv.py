"""The dynamic convolution against a float64 loop over tokens and taps."""

import pytest
import torch

from dtr_kernels.conv import dynamic_conv, dynamic_conv_packed, dynamic_conv_step

HEADS, DIM, KERNEL = 2, 8, 4


def convolved(v, taps, before=()):
    """The truth for one sequence: v [T,Hkv,D], taps [T,K,Hkv,D], before: the rows that came earlier, oldest first."""
    rows = [*before, *v]
    out = []
    for t in range(len(v)):
        total = torch.zeros(HEADS, DIM, dtype=torch.float64)
        for j in range(KERNEL):
            source = len(before) + t - (KERNEL - 1) + j
            if source >= 0:
                total += taps[t, j].double() * rows[source].double()
        out.append(total)
    return torch.stack(out) if out else v.double()


def values_and_taps(batch, length, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, length, HEADS, DIM, generator=g, dtype=torch.float64)
    return v.to(dtype), torch.randn(batch, length, KERNEL, HEADS, DIM, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 20])
def test_equals_the_loop(length):
    v, taps = values_and_taps(2, length)
    out, past = dynamic_conv(v, taps)
    for row in range(2):
        torch.testing.assert_close(out[row], convolved(v[row], taps[row]))
        padded = torch.cat([torch.zeros(3, HEADS, DIM, dtype=torch.float64), v[row]])
        assert torch.equal(past[row], padded[-3:])


@pytest.mark.parametrize("cuts", [[1] * 12, [2, 1, 7, 2], [3, 9], [5, 0, 7]])
def test_calls_in_sequence_equal_one_call(cuts):
    v, taps = values_and_taps(2, 12)
    whole, a, past = dynamic_conv(v, taps)[0], 0, None
    for n in cuts:
        out, past = dynamic_conv(v[:, a : a + n], taps[:, a : a + n], past=past)
        torch.testing.assert_close(out, whole[:, a : a + n])
        a += n


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]],  # left
        [[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],  # right
        [[0, 1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]],  # between tokens; a row without any
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_padding_changes_nothing(mask, started):
    """Real tokens come out as if the padding were not there, in this call and in the next one."""
    mask = torch.tensor(mask, dtype=torch.bool)
    v, taps = values_and_taps(2, 8, seed=1)
    v_next, taps_next = values_and_taps(2, 3, seed=2)
    v[~mask] = 1e6  # what may not be seen
    before = values_and_taps(2, 3, seed=3)[0] if started else torch.zeros(2, 3, HEADS, DIM, dtype=torch.float64)
    out, past = dynamic_conv(v, taps, past=before if started else None, mask=mask)
    later, _ = dynamic_conv(v_next, taps_next, past=past)
    assert out.isfinite().all()
    for row in range(2):
        real = mask[row]
        torch.testing.assert_close(out[row, real], convolved(v[row, real], taps[row, real], before[row]))
        seen = [*before[row], *v[row, real]]
        torch.testing.assert_close(later[row], convolved(v_next[row], taps_next[row], seen))


def test_gradients_of_taps_and_values():
    v, taps = (x.requires_grad_() for x in values_and_taps(1, 5))
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda a, b: dynamic_conv(a, b)[0], (v, taps))
    assert torch.autograd.gradcheck(lambda a, b: dynamic_conv(a, b, mask=mask)[0][:, 1:], (v, taps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_over_chunked_prefill_and_decode(dtype):
    """Three sequences over slots that hold stale rows, prefilled in ragged chunks beside a null slot, then decoded."""
    length = 40
    v, taps = values_and_taps(3, length, seed=4)
    v, taps = v.to(dtype), taps.float()
    truth = torch.stack([convolved(v[r], taps[r]) for r in range(3)])
    pool = torch.randn(6, KERNEL - 1, HEADS, DIM).to(dtype)
    untouched = pool[[0, 2, 5]].clone()
    slots, position = torch.tensor([3, 1, 4]), [0, 0, 0]
    for step in ([2, 1, 11], [1, 0, 3], [12, 2, 7]):
        spans = [(r, position[r], position[r] + step[r]) for r in range(3)] + [(0, 0, 2)]
        take = lambda x, spans=spans: torch.cat([x[r, a:b] for r, a, b in spans])  # noqa: E731
        out = dynamic_conv_packed(
            take(v), take(taps), pool=pool,
            slots=torch.cat([slots, torch.tensor([0])]),
            cu_seqlens=torch.tensor([0, *step, 2]).cumsum(0),
            has_initial_state=torch.tensor([*(p > 0 for p in position), True]),
        )  # fmt: skip
        assert not out[-2:].any()
        torch.testing.assert_close(out[:-2].double(), take(truth)[:-2], rtol=1e-5, atol=1e-5)
        position = [p + n for p, n in zip(position, step, strict=True)]
    for _ in range(12):
        rows, at = torch.arange(3), torch.tensor(position)
        padded = lambda x, rows=rows, at=at: torch.cat([x[rows, at], x[:1, 0], x[:1, 1]])  # noqa: E731
        out = dynamic_conv_step(padded(v), padded(taps), pool=pool, slots=torch.cat([slots, torch.tensor([0, -1])]))
        torch.testing.assert_close(out[:3].double(), truth[rows, at], rtol=1e-5, atol=1e-5)
        assert not out[3:].any()
        position = [p + 1 for p in position]
    assert torch.equal(pool[[0, 2, 5]], untouched)


def test_a_sequence_without_tokens_keeps_its_rows():
    v, taps = values_and_taps(1, 2, dtype=torch.float32)
    pool = torch.randn(3, KERNEL - 1, HEADS, DIM)
    before = pool[1].clone()
    dynamic_conv_packed(
        v[0], taps[0], pool=pool, slots=torch.tensor([1, 2]), cu_seqlens=torch.tensor([0, 0, 2]),
        has_initial_state=torch.tensor([False, False]),
    )  # fmt: skip
    assert torch.equal(pool[1], before)


def test_a_slot_that_holds_nan_starts_from_zeros():
    """Pages are never cleared and may hold anything."""
    v, taps = values_and_taps(1, 2, dtype=torch.float32)
    pool = torch.full((2, KERNEL - 1, HEADS, DIM), torch.nan)
    out = dynamic_conv_packed(
        v[0], taps[0], pool=pool, slots=torch.tensor([1]), cu_seqlens=torch.tensor([0, 2]),
        has_initial_state=torch.tensor([False]),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), convolved(v[0], taps[0]), rtol=1e-5, atol=1e-5)
    assert pool[1].isfinite().all()
