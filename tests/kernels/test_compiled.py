"""The C kernels, compiled for every instruction set of this processor: float64 truths, types, gradients, building."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtr_kernels.compiled import build, library, rows
from dtr_kernels.operator import (
    RULES,
    available_backends,
    linear_attention,
    linear_attention_packed,
    linear_attention_step,
)
from dtr_kernels.reference import linear_attention_reference
from dtr_kernels.window import Rest, window_attention, window_attention_packed, window_attention_step
from tests.kernels.cases import CASES, assert_close, banded, narrow, operands, rest_at, some_rest

# One library for all examples of a test: the fixture does not depend on the example.
examples = lambda n: settings(  # noqa: E731
    max_examples=n, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@examples(40)
@given(**CASES, types=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_batch_equals_the_float64_token_loop(implementation, rule, types, **case):
    """16-bit inputs are exact in the truth as well: only the output is rounded."""
    q, k, v, log_decay, beta, state = operands(rule, **case)
    q, k, v = (x.to(types) for x in (q, k, v))
    kwargs = dict(rule=rule, scale=0.3)
    truth, final = linear_attention_reference(
        q.double(), k.double(), v.double(), log_decay=log_decay, beta=beta, state=state, **kwargs
    )
    out, new = linear_attention(
        q, k, v, log_decay=narrow([log_decay])[0], beta=narrow([beta])[0], state=state.float(), **kwargs
    )
    assert out.dtype == types and new.dtype == torch.float32
    assert_close(out, truth, 1e-5 if types == torch.float32 else 1e-2)
    assert_close(new, final, 1e-5)


@examples(25)
@given(
    rule=st.sampled_from(RULES),
    per_key=st.booleans(),
    group=st.sampled_from([1, 2, 3, 4, 5, 8]),
    key_dim=st.sampled_from([8, 20, 64]),
    value_dim=st.sampled_from([6, 33, 65]),
    decay=st.sampled_from([-0.3, -20.0]),
    initial=st.lists(st.booleans(), min_size=5, max_size=5),
    pool_type=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_ragged_sequences_in_a_pool(
    implementation, rule, per_key, group, key_dim, value_dim, decay, initial, pool_type, seed
):
    """Null and stale slots, an empty sequence, one token, slots used again in the next step."""
    lengths, slots = [5, 1, 40, 0, 3], [4, 2, 1, 5, 0]
    q, k, v, log_decay, beta, _ = operands(
        rule, 1, sum(lengths), 2, group, key_dim, value_dim, per_key, decay, None, seed
    )
    pool = torch.randn(7, 2, key_dim, value_dim, generator=torch.Generator().manual_seed(seed)).to(pool_type)
    before = pool.clone()
    flat = [None if x is None else x[0].float() for x in (q, k, v, log_decay, beta)]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    kwargs = dict(rule=rule, scale=1.0)
    out = linear_attention_packed(
        *flat[:3], log_decay=flat[3], beta=flat[4], pool=pool, slots=torch.tensor(slots, dtype=torch.int32),
        cu_seqlens=borders, has_initial_state=torch.tensor(initial), **kwargs,
    )  # fmt: skip
    tolerance = 1e-5 if pool_type == torch.float32 else 1e-2  # the state is rounded when it is stored
    for r, slot in enumerate(slots):
        a, b = int(borders[r]), int(borders[r + 1])
        if slot == 0 or a == b:
            assert not out[a:b].any()
            assert torch.equal(pool[slot], before[slot])
            continue
        start = before[slot : slot + 1].double() * initial[r]
        cut = [None if x is None else x[:, a:b] for x in (q, k, v, log_decay, beta)]
        truth, final = linear_attention_reference(*cut[:3], log_decay=cut[3], beta=cut[4], state=start, **kwargs)
        assert_close(out[a:b], truth[0], 1e-5)
        assert_close(pool[slot], final[0], tolerance)
    for untouched in (3, 6):
        assert torch.equal(pool[untouched], before[untouched])
    kept = pool.clone()
    one = [None if x is None else x[:4] for x in flat]
    again = torch.tensor([1, 0, 6, 2])
    out = linear_attention_step(*one[:3], log_decay=one[3], beta=one[4], pool=pool, slots=again, **kwargs)
    cut = [None if x is None else x[0, :4, None] for x in (q, k, v, log_decay, beta)]
    truth, final = linear_attention_reference(
        *cut[:3], log_decay=cut[3], beta=cut[4], state=kept[again].double(), **kwargs
    )
    for r, slot in enumerate(again.tolist()):
        if slot:
            assert_close(out[r], truth[r, 0], 1e-5)
            assert_close(pool[slot], final[r], tolerance)
        else:
            assert not out[r].any() and torch.equal(pool[0], kept[0])


@examples(12)
@given(
    rule=st.sampled_from(RULES),
    per_key=st.booleans(),
    length=st.sampled_from([1, 31, 32, 33, 70]),
    group=st.sampled_from([1, 2, 3, 4, 6]),
    value_dim=st.sampled_from([6, 33, 64]),
    decay=st.sampled_from([0.0, -0.3, -20.0]),
    beta=st.sampled_from([None, 0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_gradients_equal_the_token_loop(implementation, rule, per_key, length, group, value_dim, decay, beta, seed):
    tensors = operands(rule, 2, length, 2, group, 12, value_dim, per_key, decay, beta, seed)

    def gradients(inputs, run):
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        q, k, v, log_decay, beta, state = leaves
        out, final = run(q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=0.7, state=state)
        g = torch.Generator().manual_seed(seed)
        weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in (out, final)]
        loss = (out * weights[0]).sum() + (final * weights[1]).sum()
        return torch.autograd.grad(loss, [x for x in leaves if x is not None])

    truth = gradients(tensors, linear_attention_reference)
    for ours, theirs in zip(gradients(narrow(tensors), linear_attention), truth, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_memory_of_training_is_linear_in_the_number_of_tokens():
    """What the forward pass keeps, in bytes a token, does not grow with T."""
    kept = []
    for length in (512, 2048):
        q, k, v, log_decay, beta, state = narrow(operands("gated_delta", 1, length, 3, 3, 64, 64, False, -0.1, None, 0))
        sizes: dict[int, int] = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = linear_attention(
                q.requires_grad_(), k, v, rule="gated_delta", log_decay=log_decay, beta=beta, state=state,
                backend="compiled",
            )  # fmt: skip
        out.sum().backward()
        kept.append(sum(sizes.values()) / length)
    assert kept[1] <= kept[0] * 1.01


@examples(12)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 15, 16, 17, 70, 256, 257, 300]),
    group=st.sampled_from([1, 3, 4, 8]),
    dim=st.sampled_from([8, 20, 64]),
    window=st.sampled_from([1, 4, 17, 64, 100]),
    padded=st.booleans(),
    with_rest=st.booleans(),
    types=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_window_and_its_gradients_equal_banded_softmax(
    implementation, batch, length, group, dim, window, padded, with_rest, types, seed
):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, h, dim, generator=g).to(types) for h in (2 * group, 2, 2))
    valid = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        valid[-1, length // 2 :] = False
        valid[0, : length // 3] = False
    weight = torch.randn(q.shape, generator=g) * valid[..., None, None]
    rest = some_rest(q, seed % 1000) if with_rest else ()
    leaves = [x.double().requires_grad_() for x in (q, k, v, *rest)]
    truth = banded(*leaves[:3], window, 0.2, valid, Rest(*leaves[3:]) if rest else None)
    expected = torch.autograd.grad((truth * weight).sum(), leaves)
    ours = [x.requires_grad_() for x in (q, k, v, *rest)]
    out, _ = window_attention(
        *ours[:3], window=window, scale=0.2, mask=valid if padded else None, rest=Rest(*ours[3:]) if rest else None
    )
    assert out.dtype == types
    tolerance = 1e-5 if types == torch.float32 else 1e-2
    assert_close(out * valid[..., None, None], truth * valid[..., None, None], tolerance)
    for mine, theirs in zip(torch.autograd.grad((out * weight).sum(), ours), expected, strict=True):
        # torch rounds intermediate gradients to bfloat16
        assert_close(mine, theirs, tolerance if types == torch.float32 else 3e-2)


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("types", [torch.float32, torch.bfloat16])
def test_ring_caches_of_the_models_type(implementation, types, with_rest):
    """A prompt in pieces that wrap around the ring, then tokens one by one, with a null row among them."""
    window, length = 20, 90
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, length, h, 24, generator=g).to(types) for h in (6, 2, 2))
    rest = some_rest(q) if with_rest else None
    truth = banded(q.double(), k.double(), v.double(), window, 0.3, rest=rest)[0]
    ring_k, ring_v = torch.randn(4, window, 2, 24).to(types), torch.randn(4, window, 2, 24).to(types)
    stale = ring_k[[0, 1, 3]].clone()
    tolerance, done = (1e-5 if types == torch.float32 else 2e-2), 0
    rings = dict(window=window, scale=0.3, ring_k=ring_k, ring_v=ring_v)
    for n in (7, 1, 50, 13):
        cut = [x[0, done : done + n] for x in (q, k, v)]
        out = window_attention_packed(
            *cut, **rings, slots=torch.tensor([2]), cu_seqlens=torch.tensor([0, n]), start=torch.tensor([done]),
            rest=rest_at(rest, 0, slice(done, done + n)),
        )  # fmt: skip
        assert_close(out, truth[done : done + n], tolerance)
        done += n
    while done < length:
        rows = [torch.cat([x[0, done : done + 1], x[0, :1]]) for x in (q, k, v)]
        out = window_attention_step(
            *rows, **rings, slots=torch.tensor([2, 0]), positions=torch.tensor([done, 5]),
            rest=rest_at(rest, 0, [done, 0]),
        )  # fmt: skip
        assert_close(out[0], truth[done], tolerance)
        assert not out[1].any()
        done += 1
    assert torch.equal(ring_k[[0, 1, 3]], stale)


@pytest.mark.parametrize("dim", [8, 20, 64, 130])
def test_rows_and_their_gradients_equal_torch_in_float64(implementation, dim):
    if implementation == "torch":
        assert not rows.fits(torch.zeros(1, dim))
        return
    g = torch.Generator().manual_seed(0)
    x, gain = torch.randn(2, 7, 3, dim, generator=g), torch.randn(3, dim, generator=g)
    cos, sin = torch.randn(1, 7, dim, generator=g), torch.randn(1, 7, dim, generator=g)

    def half_turned(x):
        return torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)

    def normed(x, gain):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain

    cases = [
        ([x], lambda x: rows.unit_rows(x, 1e-6), lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)),
        ([x], lambda x: rows.rotary(x, cos, sin), lambda x: x * cos[:, :, None] + half_turned(x) * sin[:, :, None]),
        ([x, gain], lambda x, gain: rows.readout(x, gain, 1e-6), normed),
    ]
    for inputs, ours, theirs in cases:
        exact = [t.double().requires_grad_() for t in inputs]
        single = [t.clone().requires_grad_() for t in inputs]
        truth, out = theirs(*exact), ours(*single)
        assert_close(out, truth, 1e-5)
        weight = torch.randn(out.shape, generator=g)
        expected = torch.autograd.grad((truth * weight).sum(), exact)
        for mine, other in zip(torch.autograd.grad((out * weight).sum(), single), expected, strict=True):
            assert_close(mine, other, 1e-5)


def test_a_machine_without_a_compiler_falls_back_with_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    library._load.cache_clear()
    q, k, v, log_decay, beta, state = narrow(operands("gated_delta", 1, 20, 2, 2, 8, 8, False, -1.0, None, 0))
    kwargs = dict(rule="gated_delta", log_decay=log_decay, beta=beta, state=state)
    try:
        with pytest.warns(UserWarning, match="no C compiler"):
            assert not library.is_available()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, _ = linear_attention(q, k, v, **kwargs)
        assert "compiled" not in available_backends()
        with pytest.raises(ValueError, match="no C compiler"):
            linear_attention(q, k, v, backend="compiled", **kwargs)
    finally:
        monkeypatch.undo()
        library._load.cache_clear()
    assert "compiled" in available_backends()
    torch.testing.assert_close(out, linear_attention(q, k, v, backend="compiled", **kwargs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("slots", "borders"),
    [([5, 1], [0, 3, 6]), ([1, 2], [0, 3, 7]), ([1, 2], [0, 4, 3]), ([1, 2], [-1, 3, 6])],
)
def test_indices_out_of_range_are_refused_and_write_nothing(slots, borders):
    """In C they would be written to whatever lies there."""
    q, k, v, log_decay, beta, _ = narrow(operands("gated_delta", 1, 6, 2, 2, 8, 8, False, -1.0, None, 0))
    pool, rings = torch.randn(5, 2, 8, 8), [torch.randn(5, 4, 2, 8) for _ in range(2)]
    before = [x.clone() for x in (pool, *rings)]
    pack = dict(slots=torch.tensor(slots), cu_seqlens=torch.tensor(borders))
    with pytest.raises(IndexError, match="outside"):
        linear_attention_packed(
            q[0], k[0], v[0], rule="gated_delta", log_decay=log_decay[0], beta=beta[0], scale=1.0, pool=pool,
            has_initial_state=torch.tensor([True, True]), **pack,
        )  # fmt: skip
    with pytest.raises(IndexError, match="outside"):
        window_attention_packed(
            q[0], k[0], v[0], window=4, scale=1.0, ring_k=rings[0], ring_v=rings[1], start=torch.tensor([0, 0]), **pack
        )
    with pytest.raises(IndexError, match="outside"):
        window_attention_step(
            q[0, :2], k[0, :2], v[0, :2], window=4, scale=1.0, ring_k=rings[0], ring_v=rings[1],
            slots=torch.tensor([1, 5]), positions=torch.tensor([0, 0]),
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip((pool, *rings), before, strict=True))


def test_disabled_kernels_are_not_called(monkeypatch):
    q, k, v, log_decay, beta, state = narrow(operands("gated_delta", 1, 20, 2, 2, 8, 8, False, -1.0, None, 0))
    run = lambda: linear_attention(  # noqa: E731
        q, k, v, rule="gated_delta", log_decay=log_decay, beta=beta, state=state
    )[0]
    assert library.is_available()
    expected = run()

    def refuse(*_):
        raise AssertionError("a compiled kernel was called")

    monkeypatch.setattr("dtr_kernels.compiled.linear.call", refuse)
    with library.disabled(), library.disabled(False):
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="was called"):
        run()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("DTR_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("DTR_KERNELS_MARCH", "no-such-machine")
    with pytest.raises(build.BuildError, match=r"failed: .*no-such-machine"):
        build.build()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_processes_that_build_at_once_end_with_one_library(tmp_path):
    environment = os.environ | {"DTR_KERNELS_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "dtr_kernels.compiled"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=120)[0].strip() for process in running}
    assert len(printed) == 1 and [str(p) for p in tmp_path.glob("*") if p.name != "lock"] == list(printed)
