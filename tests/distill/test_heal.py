"""Healing: the gradient it follows, what it changes, layouts it draws, and killed runs."""

import random

import pytest
import torch
from safetensors.torch import load_file

from dtr_deploy.distill.heal import HealSettings, draw_layout, heal
from dtr_deploy.hybrid.model import make_hybrid, make_twin
from tests.tiny import tiny_backbone

LAYOUT = (None, "gated_deltanet", "gla", None)
SETTINGS = HealSettings(
    tokens=12 * 48, warmup_steps=2, precision="float32", learning_rate=3e-3, form_learning_rate=3e-2
)


class Killed(Exception):
    pass


def backbone_and_twins(forms=("gated_deltanet", "gla"), window=16):
    backbone = tiny_backbone("llama", layers=4)
    twins = {}
    for layer in range(4):
        for form in forms:
            mixer = make_twin(backbone.model.layers[layer].self_attn, backbone.config, layer, form, window)
            twins[layer, form] = {name: p.detach().clone() for name, p in mixer.state_dict().items()}
    return backbone, twins


def tokens(count=6, seed=0):
    return torch.randint(0, 128, (count, 48), generator=torch.Generator().manual_seed(seed))


def divergence(backbone, hybrid, sequences):
    """KL(teacher || hybrid) a token from transformers' own logits, float64."""
    with torch.no_grad():
        log_p, log_q = (m(sequences).logits.double().log_softmax(-1) for m in (backbone, hybrid))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_the_first_step_follows_autograd_through_transformers_model(tmp_path):
    """One step without momentum or clipping moves every weight by the sign of its gradient times the rate."""
    backbone, twins = backbone_and_twins()
    sequences = tokens(1)
    settings = HealSettings(tokens=48, warmup_steps=1, precision="float32", learning_rate=1e-4, form_learning_rate=1e-3)
    result = heal(backbone, twins, 16, sequences, settings, tmp_path, LAYOUT)
    hybrid = make_hybrid(backbone, LAYOUT, 16, twins)
    assert result.divergences == [pytest.approx(divergence(backbone, hybrid, sequences), rel=1e-4)]

    mixer = hybrid.model.layers[1].self_attn
    wanted = {n: p.requires_grad_(True) for n, p in mixer.named_parameters() if n in ("o_proj.weight", "form.out_gain")}
    log_p, log_q = (m(sequences).logits.log_softmax(-1) for m in (backbone, hybrid))
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    healed = load_file(result.files[1, "gated_deltanet"])
    for name, rate in (("o_proj.weight", 1e-4), ("form.out_gain", 1e-3)):
        moved, gradient = healed[name] - twins[1, "gated_deltanet"][name], wanted[name].grad
        clear = gradient.abs() > 1e-6  # Adam's first step is the rate times g / (|g| + 1e-8)
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(moved[clear], -rate * gradient[clear].sign(), rtol=0.05, atol=0)


def test_a_healed_hybrid_is_closer_to_its_teacher_on_other_text(tmp_path):
    """Twins that could be their teachers, since their window holds a whole sequence, but for noise in W_v and W_o."""
    backbone, twins = backbone_and_twins(window=64)
    g = torch.Generator().manual_seed(0)
    for weights in twins.values():
        weights["form.rest_logit"].fill_(-10.0)
        for name in ("v_proj.weight", "o_proj.weight"):
            weights[name] += 0.5 * weights[name].std() * torch.randn(weights[name].shape, generator=g)
    settings = HealSettings(tokens=200 * 48, precision="float32", learning_rate=3e-3)
    result = heal(backbone, twins, 64, tokens(200), settings, tmp_path, LAYOUT)
    healed = {key: load_file(path) for key, path in result.files.items()}
    assert set(healed) == {(1, "gated_deltanet"), (2, "gla")}
    other = tokens(4, seed=1)
    before, after = (divergence(backbone, make_hybrid(backbone, LAYOUT, 64, w), other) for w in (twins, healed))
    assert after < 0.7 * before


def test_only_what_a_twin_passes_on_changes(tmp_path):
    backbone, twins = backbone_and_twins()
    model_before = {n: p.clone() for n, p in backbone.state_dict().items()}
    given = {key: {n: t.clone() for n, t in w.items()} for key, w in twins.items()}
    result = heal(backbone, twins, 16, tokens(), SETTINGS, tmp_path)
    for key, path in result.files.items():
        for name, weight in load_file(path).items():
            same = torch.equal(weight, given[key][name])
            assert same == name.startswith(("q_proj", "k_proj")), name
    assert all(torch.equal(p, model_before[n]) for n, p in backbone.state_dict().items())
    assert all(torch.equal(t, given[key][n]) for key, w in twins.items() for n, t in w.items())


def test_drawn_layouts_cover_layers_forms_and_counts():
    keys = [(layer, form) for layer in range(1, 8) for form in ("gated_deltanet", "gla")]
    layouts = [draw_layout(random.Random(seed), keys, 8, (0.5, 1.0)) for seed in range(300)]
    counts = [sum(form is not None for form in layout) for layout in layouts]
    assert (min(counts), max(counts)) == (4, 7)
    assert all(layout[0] is None for layout in layouts)
    seen = {(i, form) for layout in layouts for i, form in enumerate(layout) if form}
    assert seen == set(keys)
    every = [(layer, "gla") for layer in range(4)]
    assert all(None in draw_layout(random.Random(seed), every, 4, (1.0, 1.0)) for seed in range(20))


@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, layout):
    backbone, twins = backbone_and_twins()
    settings = HealSettings(tokens=10 * 48, precision="float32", checkpoint_seconds=0.0)
    whole = heal(backbone, twins, 16, tokens(), settings, tmp_path / "whole", layout)

    def die(done, total, message):
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        heal(backbone, twins, 16, tokens(), settings, tmp_path / "parts", layout, die)
    assert (tmp_path / "parts/healing.safetensors").is_file()
    again = heal(backbone, twins, 16, tokens(), settings, tmp_path / "parts", layout)
    assert again.divergences == whole.divergences
    for key, path in whole.files.items():
        ours, theirs = load_file(path), load_file(again.files[key])
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "parts/healing.safetensors").exists()
    finished = heal(backbone, twins, 16, tokens(), settings, tmp_path / "parts", layout, die)
    assert finished.divergences == whole.divergences
