"""Forms: operands stay within the operator's contract, start values mean what they say, ranks add up to the whole."""

import math

import pytest
import torch

from dtr_kernels.forms import FORMS, FormConfig, TeacherStatistics, make_form

CONFIG = FormConfig(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=8, window=16)
STATISTICS = TeacherStatistics(
    distance=torch.tensor([20.0, 300.0]), window_share=torch.full((6,), 0.7), output_rms=torch.rand(6) + 0.1
)


def inputs(config=CONFIG):
    g = torch.Generator().manual_seed(0)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    qkv = [torch.randn(2, 5, h, config.head_dim, generator=g) for h in heads]
    return *qkv, torch.randn(2, 5, config.hidden_size, generator=g)


def randomised(name, config=CONFIG):
    torch.manual_seed(0)
    form = make_form(name, config)
    with torch.no_grad():
        for p in form.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return form


@pytest.mark.parametrize("name", FORMS)
def test_operands_fit_the_operator(name):
    form = randomised(name)
    op = form.operands(*inputs())
    assert op.q.shape == (2, 5, 6, 8) and op.k.shape == op.v.shape == (2, 5, 2, 8)
    assert {x.dtype for x in op if x is not None} == {torch.float32}
    assert op.log_decay.shape == ((2, 5, 2, 8) if form.decay_per_key else (2, 5, 2)) and (op.log_decay <= 0).all()
    assert (op.beta is None) == ("delta" not in form.rule)
    if op.beta is not None:
        assert ((op.beta >= 0) & (op.beta <= 1)).all()


def test_start_decay_has_the_teachers_mean_distance():
    form = make_form("gated_deltanet", CONFIG)
    form.start_from(STATISTICS)
    with torch.no_grad():
        decay = form.operands(*inputs()).log_decay[0, 0]
    # A geometric memory exp(-t/d) has time constant d.
    torch.testing.assert_close(-1 / decay, STATISTICS.distance, rtol=1e-4, atol=0)


def test_start_decay_of_gla_spans_time_scales_around_the_teachers():
    form = make_form("gla", CONFIG)
    form.start_from(STATISTICS)
    with torch.no_grad():
        scales = -1 / form.operands(*inputs()).log_decay[0, 0]
    torch.testing.assert_close(scales[:, 0] * 4, STATISTICS.distance, rtol=1e-3, atol=0)
    torch.testing.assert_close(scales[:, -1] / 4, STATISTICS.distance, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_start_mixes_in_the_window_by_its_share(name):
    form = make_form(name, CONFIG)
    form.start_from(STATISTICS)
    linear, window = torch.zeros(1, 6, 8), torch.ones(1, 6, 8)
    torch.testing.assert_close(form.mix(linear, window), torch.full((1, 6, 8), 0.7))
    assert form.mix(linear, None) is linear


@pytest.mark.parametrize("name", FORMS)
def test_readout_has_the_teachers_size(name):
    form = make_form(name, CONFIG)
    form.start_from(STATISTICS)
    out = form.readout(100 * torch.randn(4, 6, 8), torch.zeros(4, 24))
    torch.testing.assert_close(out.square().mean(-1).sqrt(), STATISTICS.output_rms.expand(4, 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_two_ranks_are_halves_of_the_whole(name):
    """SHARD says how a tensor-parallel engine cuts parameters; the halves have to compute the whole's heads."""
    whole = randomised(name)
    half = FormConfig(24, 3, 1, 8, 16)
    q, k, v, hidden = inputs()
    op = whole.operands(q, k, v, hidden)
    mixed = whole.mix(whole.readout(q, hidden), q)
    for rank in range(2):
        part = make_form(name, half)
        state = {}
        for key, tensor in whole.state_dict().items():
            if key in whole.SHARD:
                _, dim = whole.SHARD[key]
                tensor = tensor.chunk(2, dim)[rank]
            state[key] = tensor
        part.load_state_dict(state)
        heads, kv = slice(3 * rank, 3 * rank + 3), slice(rank, rank + 1)
        ours = part.operands(q[:, :, heads], k[:, :, kv], v[:, :, kv], hidden)
        torch.testing.assert_close(ours.log_decay, op.log_decay[:, :, kv])
        if op.beta is not None:
            torch.testing.assert_close(ours.beta, op.beta[:, :, kv])
        torch.testing.assert_close(part.mix(part.readout(q[:, :, heads], hidden), q[:, :, heads]), mixed[:, :, heads])


@pytest.mark.parametrize("name", FORMS)
def test_parameters_stay_float32_under_another_default_dtype(name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        form = make_form(name, CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in form.parameters()} == {torch.float32}


def test_state_of_one_sequence():
    spec = make_form("gla", CONFIG).state_spec(torch.bfloat16)
    size = {name: math.prod(s.shape) * s.dtype.itemsize for name, s in spec.items()}
    assert size == {"recurrent": 2 * 8 * 8 * 4, "window_k": 16 * 2 * 8 * 2, "window_v": 16 * 2 * 8 * 2}


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="accepted are gated_deltanet, gla"):
        make_form("mamba", CONFIG)
