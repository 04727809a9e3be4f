"""Window attention against full softmax attention with an explicit band mask, in float64, with and without the rest."""

import pytest
import torch

from dtr_kernels.window import window_attention, window_attention_packed, window_attention_step
from tests.kernels.cases import banded, rest_at, some_rest


def qkv(batch, length, group=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, h, 8, generator=g, dtype=torch.float64) for h in (2 * group, 2, 2)]


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 32, 50])
def test_equals_banded_softmax(length, group, with_rest):
    q, k, v = qkv(2, length, group)
    rest = some_rest(q) if with_rest else None
    out, _ = window_attention(q, k, v, window=16, scale=0.4, rest=rest)
    torch.testing.assert_close(out, banded(q, k, v, 16, 0.4, rest=rest), rtol=1e-6, atol=1e-6)  # softmax is float32


def test_a_rest_of_no_weight_or_of_all():
    q, k, v = qkv(1, 30)
    rest = some_rest(q)
    alone, _ = window_attention(q, k, v, window=16)
    none, _ = window_attention(q, k, v, window=16, rest=rest._replace(logit=torch.full((6,), -1e4)))
    every, _ = window_attention(q, k, v, window=16, rest=rest._replace(logit=torch.full((6,), 1e4)))
    torch.testing.assert_close(none, alone)
    torch.testing.assert_close(every, rest.value.double())


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("cuts", [[1] * 40, [7, 20, 1, 12], [16, 16, 8], [39, 1]])
def test_cached_calls_equal_one_call(cuts, with_rest):
    q, k, v = qkv(2, 40)
    rest = some_rest(q) if with_rest else None
    truth, past, a = banded(q, k, v, 16, 0.4, rest=rest), None, 0
    for n in cuts:
        cut = slice(a, a + n)
        out, past = window_attention(
            q[:, cut], k[:, cut], v[:, cut], window=16, scale=0.4, past=past, rest=rest_at(rest, slice(None), cut)
        )
        torch.testing.assert_close(out, truth[:, a : a + n], rtol=1e-6, atol=1e-6)
        a += n


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_seen_nor_cached(side, with_rest):
    lengths, total = [30, 3, 18], 30
    mask = torch.zeros(3, total, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, -n:] = True
    if side == "right":
        mask = mask.flip(1)
    q, k, v = qkv(3, total + 4)
    rest = some_rest(q) if with_rest else None
    before, after = (rest_at(rest, slice(None), cut) for cut in (slice(total), slice(total, None)))
    full = torch.cat([mask, torch.ones(3, 4, dtype=torch.bool)], 1)
    out, past = window_attention(q[:, :total], k[:, :total], v[:, :total], window=16, scale=0.4, mask=mask, rest=before)
    later, _ = window_attention(q[:, total:], k[:, total:], v[:, total:], window=16, scale=0.4, past=past, rest=after)
    both = torch.cat([out, later], 1)
    for row in range(3):
        real, at = full[row], slice(row, row + 1)
        own = None if rest is None else rest_at(rest, at)
        own = None if own is None else own._replace(value=own.value[:, real])
        truth = banded(q[at, real], k[at, real], v[at, real], 16, 0.4, rest=own)
        torch.testing.assert_close(both[row : row + 1, real], truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_rest", [False, True])
def test_ring_caches_over_chunked_prefill_and_decode(with_rest):
    window, length = 16, 60
    q, k, v = (x.float() for x in qkv(3, length, seed=4))
    rest = some_rest(q) if with_rest else None
    truth = banded(q.double(), k.double(), v.double(), window, 0.4, rest=rest)
    slots = torch.tensor([3, 1, 4])
    ring_k, ring_v = torch.randn(6, window, 2, 8), torch.randn(6, window, 2, 8)  # stale contents
    untouched = ring_k[[0, 2, 5]].clone()
    position = [0, 0, 0]
    for step in ([5, 1, 30], [20, 16, 3], [1, 17, 15]):
        borders = torch.tensor([0, *torch.tensor(step).cumsum(0).tolist()])
        take = lambda x: torch.cat([x[r, position[r] : position[r] + step[r]] for r in range(3)])  # noqa: B023, E731
        out = window_attention_packed(
            take(q), take(k), take(v), window=window, scale=0.4, ring_k=ring_k, ring_v=ring_v,
            slots=slots, cu_seqlens=borders, start=torch.tensor(position),
            rest=rest and rest._replace(value=take(rest.value)),
        )  # fmt: skip
        torch.testing.assert_close(out.double(), take(truth), rtol=1e-5, atol=1e-5)
        position = [p + n for p, n in zip(position, step, strict=True)]
    for _ in range(12):
        rows = torch.arange(3)
        at = torch.tensor(position)
        padded = lambda x: torch.cat([x[rows, at], x[:1, 0]])  # noqa: B023, E731
        out = window_attention_step(
            padded(q), padded(k), padded(v), window=window, scale=0.4, ring_k=ring_k, ring_v=ring_v,
            slots=torch.cat([slots, torch.tensor([0])]), positions=torch.tensor([*position, 9]),
            rest=rest and rest._replace(value=padded(rest.value)),
        )  # fmt: skip
        torch.testing.assert_close(out[:3].double(), truth[rows, at], rtol=1e-5, atol=1e-5)
        assert not out[3].any()
        position = [p + 1 for p in position]
    assert torch.equal(ring_k[[0, 2, 5]], untouched)
