"""Forms: operands stay within the operator's contract, start values mean what they say, ranks add up to the whole."""

import math

import pytest
import torch

from dtr_kernels.conv import dynamic_conv
from dtr_kernels.forms import FORMS, FormConfig, TeacherStatistics, make_form
from dtr_kernels.operator import linear_attention
from dtr_kernels.window import window_attention

CONFIG = FormConfig(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=8, window=16)
STATISTICS = TeacherStatistics(
    distance=torch.tensor([20.0, 300.0]), rest_logit=torch.linspace(-1, 2, 6), output_rms=torch.rand(6) + 0.1
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


def branch(form, q, k, v, hidden, backend="auto"):
    """The linear branch as a mixer runs it."""
    taps = form.taps(hidden)
    values = v if taps is None else dynamic_conv(v, taps)[0]
    op = form.operands(q, k, values, hidden)
    out, _ = linear_attention(
        op.q, op.k, op.v, rule=form.rule, log_decay=op.log_decay, beta=op.beta, scale=form.scale, backend=backend
    )
    return form.readout(out, hidden)


@pytest.mark.parametrize("name", FORMS)
def test_operands_fit_the_operator(name):
    form = randomised(name)
    q, k, v, hidden = inputs()
    taps = form.taps(hidden)
    assert (taps is None) == (form.conv_kernel == 0)
    if taps is not None:
        assert taps.shape == (2, 5, form.conv_kernel, 2, 8) and taps.dtype == torch.float32
    op = form.operands(q, k, v, hidden)
    assert op.q.shape == (2, 5, 6, form.key_dim)
    assert op.k.shape == (2, 5, 2, form.key_dim) and op.v.shape == (2, 5, 2, form.value_dim)
    assert {x.dtype for x in op if x is not None} == {torch.float32}
    assert (op.log_decay is None) == ("gated" not in form.rule)
    if op.log_decay is not None:
        assert op.log_decay.shape == ((2, 5, 2, 8) if form.decay_per_key else (2, 5, 2)) and (op.log_decay <= 0).all()
    assert (op.beta is None) == ("delta" not in form.rule)
    if op.beta is not None:
        assert ((op.beta >= 0) & (op.beta <= 1)).all()
    assert branch(form, q, k, v, hidden).shape == (2, 5, 6, 8)


def test_jet_starts_as_gated_deltanet():
    jet, plain = make_form("jet", CONFIG), make_form("gated_deltanet", CONFIG)
    jet.start_from(STATISTICS)
    plain.start_from(STATISTICS)
    assert torch.equal(branch(jet, *inputs()), branch(plain, *inputs()))


def test_jet_learns_from_its_start():
    """Gradients reach W2 and the bias at once, and W1 after W2's first step."""
    form, data = make_form("jet", CONFIG), inputs()
    branch(form, *data).square().sum().backward()
    assert form.tap_weight.grad.abs().max() > 0 and form.tap_bias.grad.abs().min(-1).values.min() > 0
    with torch.no_grad():
        form.tap_weight -= 0.1 * form.tap_weight.grad
    branch(form, *data).square().sum().backward()
    assert form.tap_down.weight.grad.abs().max() > 0


def test_jet_taps_are_those_of_the_paper():
    """K = W2 silu(W1 h) + b for each tap, kv head and channel, in a loop of float64 scalars."""
    form, hidden = randomised("jet"), inputs()[3]
    taps = form.taps(hidden)
    h = hidden[1, 3].double()
    inner = form.tap_down.weight.double() @ h
    inner = inner / (1 + torch.exp(-inner))
    for tap in range(4):
        for head in range(2):
            for channel in range(8):
                row = head * 8 + channel
                expected = form.tap_weight[tap, row].double() @ inner + form.tap_bias[tap, row].double()
                torch.testing.assert_close(taps[1, 3, tap, head, channel].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_hedgehog_is_the_quadratic_form_normalised(scale):
    """Against phi(q) phi(k)^T, masked and divided by its row sums, float64. At scale 20 features are all but one-hot,
    so that the normaliser gets small."""
    torch.manual_seed(0)
    form = make_form("hedgehog", CONFIG)
    with torch.no_grad():
        for p in (form.query_map, form.key_map):
            p.add_(0.2 * torch.randn_like(p))
        form.out_gain.uniform_(0.5, 1.5)
    q, k, v = (scale * torch.randn(1, 40, h, 8) for h in (6, 2, 2))
    ours = branch(form, q, k, v, torch.zeros(1, 40, 24))
    for head in range(6):
        kv = head // 3
        x = q[0, :, head].double() @ form.query_map[head].double()
        y = k[0, :, kv].double() @ form.key_map[kv].double()
        weights = sum(torch.softmax(s * x, -1) @ torch.softmax(s * y, -1).T for s in (1, -1)).tril()
        truth = weights @ v[0, :, kv].double() / weights.sum(-1, keepdim=True) * form.out_gain[head].double()
        torch.testing.assert_close(ours[0, :, head].double(), truth, rtol=1e-4, atol=1e-4 * scale)


def test_hedgehog_of_a_row_without_tokens_is_zero():
    form = randomised("hedgehog")
    assert not form.readout(torch.zeros(1, 6, 9), torch.zeros(1, 24)).any()


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
def test_start_weighs_the_rest_as_the_teacher_does(name):
    form = make_form(name, CONFIG)
    form.start_from(STATISTICS)
    torch.testing.assert_close(form.rest(torch.zeros(6, 8)).logit.detach(), STATISTICS.rest_logit)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "hedgehog"])
def test_readout_has_the_teachers_size(name):
    form = make_form(name, CONFIG)
    form.start_from(STATISTICS)
    out = form.readout(100 * torch.randn(4, 6, 8), torch.zeros(4, 24))
    torch.testing.assert_close(out.square().mean(-1).sqrt(), STATISTICS.output_rms.expand(4, 6), rtol=1e-4, atol=1e-5)


def test_hedgehog_starts_as_a_mean_of_values():
    """Its output has the values' scale: whatever the teacher's size, equal values come out as they are."""
    form = make_form("hedgehog", CONFIG)
    form.start_from(STATISTICS)
    q, k, _, hidden = inputs()
    value = torch.randn(8)
    torch.testing.assert_close(branch(form, q, k, value.expand(2, 5, 2, 8), hidden), value.expand(2, 5, 6, 8))


@pytest.mark.parametrize("name", FORMS)
def test_two_ranks_are_halves_of_the_whole(name):
    """SHARD says how a tensor-parallel engine cuts parameters; the halves have to compute the whole's heads."""
    whole = randomised(name)
    half = FormConfig(24, 3, 1, 8, 16)
    q, k, v, hidden = inputs()

    def heads_output(form, q, k, v):
        rest = form.rest(branch(form, q, k, v, hidden))
        return window_attention(q, k, v, window=form.config.window, rest=rest)[0]

    mixed = heads_output(whole, q, k, v)
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
        ours = heads_output(part, q[:, :, heads], k[:, :, kv], v[:, :, kv])
        torch.testing.assert_close(ours, mixed[:, :, heads])


@pytest.mark.parametrize("name", FORMS)
def test_parameters_stay_float32_under_another_default_dtype(name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        form = make_form(name, CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in form.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "recurrent", "conv"),
    [("gla", 8 * 8, None), ("gated_deltanet", 8 * 8, None), ("jet", 8 * 8, 3 * 2 * 8), ("hedgehog", 16 * 9, None)],
)
def test_state_of_one_sequence(name, recurrent, conv):
    spec = make_form(name, CONFIG).state_spec(torch.bfloat16)
    size = {part: math.prod(s.shape) * s.dtype.itemsize for part, s in spec.items()}
    expected = {"recurrent": 2 * recurrent * 4, "window_k": 16 * 2 * 8 * 2, "window_v": 16 * 2 * 8 * 2}
    assert size == expected | ({} if conv is None else {"conv": conv * 2})


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="accepted are gated_deltanet, gla, jet, hedgehog"):
        make_form("mamba", CONFIG)
