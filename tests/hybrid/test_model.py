"""The hybrid model against a float64 loop written from the equations; against itself only where modes must agree."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import describe, full
from dtr_deploy.hybrid.model import load_hybrid, make_hybrid, save_hybrid
from dtr_kernels.forms import FORMS
from tests.tiny import FAMILIES, tiny_backbone, tiny_hybrid, tiny_tokenizer

MIXED = (None, "gated_deltanet", "gla", "gated_deltanet")
OTHERS = (None, "jet", "hedgehog", "jet")
LAYOUTS = pytest.mark.parametrize("layout", [MIXED, OTHERS], ids=["deltanet-gla", "jet-hedgehog"])


def tokens(batch, length, seed=0):
    return torch.randint(8, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


def rope(x, theta):
    """x [T,H,D], rotated by position, the halves convention."""
    length, dim = x.shape[0], x.shape[-1]
    angle = torch.outer(torch.arange(length).double(), theta ** (-torch.arange(0, dim, 2).double() / dim))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def linear_layer_from_equations(mixer, hidden, theta):
    """One mixer over hidden [T,hidden] in float64, token by token, without any code of the package's operator."""
    w = {name: p.double() for name, p in mixer.state_dict().items()}
    c = mixer.sizes
    heads = lambda name, n: (  # noqa: E731
        hidden @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))
    ).unflatten(-1, (n, c.head_dim))
    q, k, v = heads("q_proj", c.num_heads), heads("k_proj", c.num_kv_heads), heads("v_proj", c.num_kv_heads)
    if "q_norm.weight" in w:
        eps = mixer.q_norm.variance_epsilon
        rms = lambda x, g: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * g  # noqa: E731
        q, k = rms(q, w["q_norm.weight"]), rms(k, w["k_norm.weight"])
    q, k = rope(q, theta), rope(k, theta)
    sigmoid = torch.sigmoid
    name = mixer.form.name
    group, dim, out = c.num_heads // c.num_kv_heads, c.head_dim, []
    state = torch.zeros(c.num_kv_heads, dim, dim, dtype=torch.float64)
    unit = lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    silu = lambda x: x / (1 + torch.exp(-x))  # noqa: E731
    for t in range(len(hidden)):
        h, value = hidden[t], v[t]
        if name == "jet":
            taps = w["form.tap_weight"] @ silu(w["form.tap_down.weight"] @ h) + w["form.tap_bias"]
            taps = taps.view(4, c.num_kv_heads, dim)
            value = sum(taps[3 - back] * v[t - back] for back in range(min(4, t + 1)))
        if name in ("gated_deltanet", "jet"):
            rate = torch.log1p(torch.exp(w["form.decay_proj.weight"] @ h + w["form.decay_proj.bias"]))
            decay = torch.exp(-w["form.decay_log_rate"].exp() * rate)[:, None, None]
            beta = sigmoid(w["form.beta_proj.weight"] @ h + w["form.beta_proj.bias"])
            key, query = unit(k[t]), unit(q[t])
            state = decay * state
            read = torch.einsum("hkv,hk->hv", state, key)
            state = state + torch.einsum("hk,hv->hkv", key, beta[:, None] * (value - read))
        elif name == "gla":
            logit = w["form.decay_up.weight"] @ (w["form.decay_down.weight"] @ h) + w["form.decay_up.bias"]
            decay = sigmoid(logit).pow(1 / 16).view(c.num_kv_heads, dim, 1)
            key, query = k[t], q[t]
            state = decay * state + torch.einsum("hk,hv->hkv", key, value)
        if name == "hedgehog":
            # No state at all: the weights of every token seen so far, and their mean of values.
            x = torch.einsum("hd,hdf->hf", q[t], w["form.query_map"])
            y = torch.einsum("jhd,hdf->jhf", k[: t + 1], w["form.key_map"]).repeat_interleave(group, 1)
            weights = sum(torch.einsum("hf,jhf->hj", (s * x).softmax(-1), (s * y).softmax(-1)) for s in (1, -1))
            mean = weights / weights.sum(-1, keepdim=True)
            linear = torch.einsum("hj,jhd->hd", mean, v[: t + 1].repeat_interleave(group, 1)) * w["form.out_gain"]
        else:
            linear = torch.einsum("hkv,hk->hv", state.repeat_interleave(group, 0), query) / dim**0.5
            linear = linear / (linear.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["form.out_gain"]
        if c.window:
            first = max(0, t - c.window + 1)
            keys, values = (x[first : t + 1].repeat_interleave(group, 1) for x in (k, v))
            weights = (torch.einsum("hd,jhd->hj", q[t], keys) / dim**0.5).exp()
            outside = w["form.rest_logit"].exp()[:, None]
            total = weights.sum(-1, keepdim=True) + outside
            linear = (torch.einsum("hj,jhd->hd", weights, values) + outside * linear) / total
        out.append(linear.flatten())
    return torch.stack(out) @ w["o_proj.weight"].T


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixer_equals_its_equations(family, form, window):
    model = tiny_hybrid(family, (None, form), window, group=3)
    mixer = model.model.layers[1].self_attn
    hidden = torch.randn(1, 90, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    where = model.model.rotary_emb(hidden, torch.arange(90)[None])
    with torch.no_grad():
        ours = mixer(hidden, where)[0][0].double()
        truth = linear_layer_from_equations(mixer, hidden[0].double(), model.config.rope_parameters["rope_theta"])
    # float32 against float64 over 90 steps
    assert ((ours - truth).abs().max() / truth.abs().max()).item() < 2e-5


def test_windows_of_their_own_reach_their_layers():
    """Every entry's window, and the recipe's for the entry that names none, against the equations with that window."""
    model = tiny_hybrid("llama", ("gated_deltanet@5", "gla@0", None, "jet@2", "hedgehog", "gated_deltanet@40"), 16)
    hidden = torch.randn(1, 60, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    where = model.model.rotary_emb(hidden, torch.arange(60)[None])
    for layer, window in {0: 5, 1: 0, 3: 2, 4: 16, 5: 40}.items():
        mixer = model.model.layers[layer].self_attn
        assert mixer.sizes.window == window
        with torch.no_grad():
            ours = mixer(hidden, where)[0][0].double()
            truth = linear_layer_from_equations(mixer, hidden[0].double(), model.config.rope_parameters["rope_theta"])
        assert ((ours - truth).abs().max() / truth.abs().max()).item() < 2e-5, layer


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_replaced_is_the_backbone(family):
    backbone = tiny_backbone(family)
    hybrid = make_hybrid(backbone, full(4), 64)
    ids = tokens(2, 50)
    assert torch.equal(hybrid(ids).logits, backbone(ids).logits)


@LAYOUTS
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_calls_equal_one_call(family, layout):
    model, ids = tiny_hybrid(family, layout), tokens(2, 150)
    whole = model(ids).logits
    first = model(ids[:, :100], use_cache=True)
    cache = first.past_key_values
    parts = [first.logits, *(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in
                             ((100, 101), (101, 103), (103, 149), (149, 150)))]  # fmt: skip
    # logits have a standard deviation of about 5; float32 sums in another order
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-4)


@LAYOUTS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [0, 64])
def test_padded_batch_equals_single_rows(side, window, layout):
    model, ids = tiny_hybrid("llama", layout, window), tokens(4, 90)
    lengths, total = (90, 7, 66, 2), 90
    padded, mask = torch.zeros(4, total, dtype=torch.long), torch.zeros(4, total, dtype=torch.long)
    for row, n in enumerate(lengths):
        where = slice(total - n, total) if side == "left" else slice(0, n)
        padded[row, where], mask[row, where] = ids[row, :n], 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, :n]).logits[0]
        # Logits reach 20, and half a unit in the last place of the embeddings moves a first token's by up to 3.4e-4.
        torch.testing.assert_close(logits[row, mask[row].bool()], alone, rtol=0, atol=1e-3)


@LAYOUTS
@pytest.mark.parametrize("window", [0, 64])
def test_states_of_a_right_padded_batch_are_those_of_its_last_tokens(window, layout):
    """Two prompts of unequal length in one call, then more tokens for both: as if each were alone."""
    model, ids = tiny_hybrid("qwen2", layout, window), tokens(3, 60)
    lengths, first, more = (50, 2, 21), 50, 5
    mask = (torch.arange(first)[None] < torch.tensor(lengths)[:, None]).long()
    cache = model(ids[:, :first] * mask, attention_mask=mask, use_cache=True).past_key_values
    positions = torch.tensor(lengths)[:, None] + torch.arange(more)
    mask = torch.cat([mask, torch.ones(3, more, dtype=torch.long)], 1)
    later = model(ids[:, first : first + more], attention_mask=mask, position_ids=positions, past_key_values=cache)
    for row, n in enumerate(lengths):
        alone = model(torch.cat([ids[row : row + 1, :n], ids[row : row + 1, first : first + more]], 1)).logits[0]
        torch.testing.assert_close(later.logits[row], alone[n:], rtol=0, atol=2e-4)


@LAYOUTS
def test_generate_in_a_left_padded_batch_equals_single_runs(layout):
    model, ids = tiny_hybrid("qwen2", layout), tokens(2, 80)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.long), ids[1:, :50]], 1)
    batch, mask = torch.cat([ids[:1], padded]), torch.ones(2, 80, dtype=torch.long)
    mask[1, :30] = 0
    settings = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)
    together = model.generate(batch, attention_mask=mask, **settings)[:, 80:]
    assert torch.equal(together[0], model.generate(ids[:1], **settings)[0, 80:])
    assert torch.equal(together[1], model.generate(ids[1:, :50], **settings)[0, 50:])


@LAYOUTS
def test_beam_search_reorders_states(layout):
    """Each beam's score has to be what the model gives its tokens without a cache."""
    model, ids = tiny_hybrid("llama", layout), tokens(1, 40)
    out = model.generate(
        ids, max_new_tokens=6, num_beams=4, num_return_sequences=4, do_sample=False, eos_token_id=None,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    logprobs = model(out.sequences).logits.log_softmax(-1)[:, 39:-1]
    sums = logprobs.gather(-1, out.sequences[:, 40:, None]).squeeze(-1).sum(-1)
    torch.testing.assert_close(out.sequences_scores, sums, rtol=0, atol=2e-3)


@LAYOUTS
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_model(family, layout, tmp_path):
    model, ids = tiny_hybrid(family, layout), tokens(1, 70)
    save_hybrid(model, tiny_tokenizer(), tmp_path)
    loaded, tokenizer = load_hybrid(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert tokenizer.decode(tokenizer("review")["input_ids"]) == "review"
    assert [p.name for p in tmp_path.glob("*.safetensors")] and not list(tmp_path.glob("*.bin"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@LAYOUTS
def test_form_parameters_stay_float32_in_bfloat16(layout, tmp_path):
    save_hybrid(tiny_hybrid("llama", layout), None, tmp_path)
    model, _ = load_hybrid(tmp_path, torch.bfloat16)
    dtypes = {".form." in name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_backbone_is_not_changed_by_its_hybrid():
    backbone, ids = tiny_backbone("qwen3"), tokens(1, 20)
    before = backbone(ids).logits
    make_hybrid(backbone, MIXED, 64)
    assert torch.equal(backbone(ids).logits, before)


def test_twin_weights_are_used():
    backbone = tiny_backbone("qwen2")
    donor = make_hybrid(tiny_backbone("qwen2", seed=5), (None, "gla", None, None), 64)
    weights = donor.model.layers[1].self_attn.state_dict()
    hybrid = make_hybrid(backbone, (None, "gla", None, None), 64, {(1, "gla"): weights})
    for name, tensor in hybrid.model.layers[1].self_attn.state_dict().items():
        assert torch.equal(tensor, weights[name])
    with pytest.raises(UsageError, match="no distilled twin for layer 2"):
        make_hybrid(backbone, (None, None, "gla", None), 64, {(1, "gla"): weights})


@pytest.mark.parametrize("form", FORMS)
def test_state_does_not_grow_with_the_context(form):
    model = tiny_hybrid("llama", (None, form), 64)
    bytes_at = []
    for length in (100, 1000):
        layer = model(tokens(1, length), use_cache=True).past_key_values.layers[1]
        bytes_at.append(sum(s.nbytes for s in layer.recurrent_states.values() if s is not None))
    assert bytes_at[0] == bytes_at[1]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (("gla",) * 4, "at least one has to keep full attention"),
        ((None, "gla"), "layout has 2 entries, the model has 4 layers"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layout, message):
    with pytest.raises(UsageError, match=message):
        make_hybrid(tiny_backbone(), layout, 64)


def test_a_folder_that_is_no_hybrid_is_refused(tmp_path):
    tiny_backbone().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no key 'dtr'"):
        load_hybrid(tmp_path)


def test_layout_in_words():
    assert describe((None, "gla", "gla", None, None, "gated_deltanet")) == (
        "3 of 6 linear (gated_deltanet 1, gla 2), full attention in 0, 3-4"
    )
