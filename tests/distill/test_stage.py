"""Stage 1: what is captured is what the teacher computes, training helps, and a stop in the middle changes nothing."""

import json
import math

import pytest
import torch

from dtr_deploy.distill import files as files_module
from dtr_deploy.distill.calibrate import LONGEST, teacher_statistics
from dtr_deploy.distill.evaluate import window_only
from dtr_deploy.distill.fused_teacher import FusedTeacher
from dtr_deploy.distill.stage import distill, load_twins
from dtr_deploy.distill.teacher import attention_activations
from dtr_deploy.distill.trainer import DistillSettings
from dtr_deploy.hybrid.mixer import HybridMixer
from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.hybrid.precision import products_in
from dtr_kernels.forms import FORMS
from tests.tiny import FAMILIES, tiny_backbone

SETTINGS = DistillSettings(tokens=8 * 4 * 48, batch_size=4, warmup_steps=2, checkpoint_seconds=0.0)


def text(rows=24, length=48):
    # A learnable pattern: random walks over the vocabulary.
    steps = torch.randint(0, 5, (rows, length), generator=torch.Generator().manual_seed(0))
    return (8 + steps.cumsum(1)) % 512


def run(folder, backbone, layers=(0, 1, 2), forms=("gated_deltanet", "gla"), progress=lambda *_: None):
    return distill(backbone, text()[4:], text()[:4], forms, layers, 16, SETTINGS, folder, progress)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_the_teachers(family):
    backbone, ids = tiny_backbone(family), text(2)
    seen = attention_activations(backbone, ids, [1, 3])
    assert not backbone.model.layers[1].self_attn._forward_hooks
    hidden = backbone(ids, output_hidden_states=True).hidden_states
    for layer in (1, 3):
        block = backbone.model.layers[layer]
        torch.testing.assert_close(seen.inputs[layer], block.input_layernorm(hidden[layer]))
    # The residual stream after attention, rebuilt from what was captured, has to give the next hidden state.
    block = backbone.model.layers[1]
    after = hidden[1] + seen.outputs[1]
    torch.testing.assert_close(after + block.mlp(block.post_attention_layernorm(after)), hidden[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_products_are_no_further_from_the_teacher_than_autocasts(family):
    backbone, ids = tiny_backbone(family), text(2)
    exact = attention_activations(backbone, ids, [1, 3])
    with products_in(torch.bfloat16, "cpu"):
        autocast = attention_activations(backbone, ids, [1, 3])
    assert FusedTeacher.fits(backbone, torch.bfloat16) and not FusedTeacher.fits(backbone, torch.float16)
    narrow = FusedTeacher(backbone, [1, 3], torch.bfloat16)(ids)
    assert sorted(narrow.inputs) == sorted(narrow.outputs) == [1, 3]
    for ours, theirs, truth in (
        (narrow.inputs, autocast.inputs, exact.inputs),
        (narrow.outputs, autocast.outputs, exact.outputs),
    ):
        for layer in (1, 3):
            error, other = ((x[layer].float() - truth[layer]).norm() / truth[layer].norm() for x in (ours, theirs))
            assert 0 < error < max(1.5 * other, 1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_teacher_with_float32_products_is_the_teacher(family):
    backbone, ids = tiny_backbone(family), text(2)
    exact = attention_activations(backbone, ids, [1, 3])
    ours = FusedTeacher(backbone, [1, 3], torch.float32)(ids)
    for mine, theirs in ((ours.inputs, exact.inputs), (ours.outputs, exact.outputs)):
        for layer in (1, 3):
            # Float32 rounding over four layers whose sums run in another order.
            torch.testing.assert_close(mine[layer], theirs[layer], atol=2e-5, rtol=1e-4)


def test_statistics_of_a_teacher_whose_attention_is_known():
    """With queries of zero, attention is uniform over the past: every figure has a closed form."""
    backbone = tiny_backbone("llama")
    attention = backbone.model.layers[0].self_attn
    attention.q_proj.weight.zero_()
    mixer = HybridMixer(attention, backbone.config, "gla", 16, 0)
    length = 64
    hidden = torch.randn(2, length, 96)
    where = backbone.model.rotary_emb(hidden, torch.arange(length)[None])
    statistics = teacher_statistics(mixer, hidden, where)
    rows = torch.arange(16, length)
    # All weights are 1: the window holds exp(log 16) of them, and on average its share of the attention.
    rest = math.log(16) - torch.logit((16 / (rows + 1)).mean())
    torch.testing.assert_close(statistics.rest_logit, rest.expand(6), rtol=1e-4, atol=1e-4)
    far = [(d, 1 / (t + 1)) for t in range(length) for d in range(16, t)]  # position 0 left out: d < t
    mean = sum(d * w for d, w in far) / sum(w for _, w in far)
    torch.testing.assert_close(statistics.distance, torch.full((2,), mean), rtol=1e-4, atol=0)
    v = attention.v_proj(hidden).unflatten(-1, (2, 32))
    uniform = v.cumsum(1) / torch.arange(1, length + 1)[None, :, None, None]
    rms = uniform.square().mean((0, 1, 3)).sqrt().repeat_interleave(3)
    torch.testing.assert_close(statistics.output_rms, rms, rtol=1e-4, atol=1e-5)


def test_a_head_that_only_looks_near_gets_the_longest_memory():
    backbone = tiny_backbone("llama")
    mixer = HybridMixer(backbone.model.layers[0].self_attn, backbone.config, "gla", 32, 0)
    hidden = torch.randn(1, 24, 96)  # shorter than the window
    statistics = teacher_statistics(mixer, hidden, backbone.model.rotary_emb(hidden, torch.arange(24)[None]))
    assert (statistics.distance == LONGEST).all()


def test_window_only_control_equals_the_teacher_within_the_window():
    backbone = tiny_backbone("qwen2")
    mixer = HybridMixer(backbone.model.layers[2].self_attn, backbone.config, "gla", 64, 2)
    seen = attention_activations(backbone, text(2), [2])  # 48 tokens: the window sees everything
    torch.testing.assert_close(
        window_only(mixer, seen.inputs[2], seen.position_embeddings), seen.outputs[2], rtol=1e-4, atol=1e-4
    )


def test_training_brings_twins_closer_and_reports_it(tmp_path):
    backbone = tiny_backbone("qwen3")
    before = {n: p.clone() for n, p in backbone.state_dict().items()}
    result = run(tmp_path, backbone, forms=tuple(FORMS))
    assert {r.form for r in result.reports} == set(FORMS)
    assert {(r.layer, r.form) for r in result.reports} == set(result.files)
    for report in result.reports:
        assert report.trained.relative_error < report.start.relative_error
        assert report.no_op.relative_error == pytest.approx(1.0)
        assert report.window_only is not None
    assert all(torch.equal(p, before[n]) for n, p in backbone.state_dict().items())
    # The reported error, measured again through the assembled hybrid's own layer.
    report = next(r for r in result.reports if (r.layer, r.form) == (1, "gla"))
    hybrid = make_hybrid(backbone, (None, "gla", None, None), 16, load_twins(result.files))
    seen = attention_activations(backbone, text()[:4], [1])
    ours = hybrid.model.layers[1].self_attn(seen.inputs[1], seen.position_embeddings)[0]
    error = ((ours - seen.outputs[1]).square().sum() / seen.outputs[1].square().sum()).item()
    assert report.trained.relative_error == pytest.approx(error, rel=1e-4)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(tmp_path, at):
    whole = run(tmp_path / "whole", tiny_backbone("llama"))

    def kill(done, total, message):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny_backbone("llama"), progress=kill)
    steps = []
    again = run(tmp_path / "killed", tiny_backbone("llama"), progress=lambda done, *_: steps.append(done))
    assert len(steps) < 8 or at == 1  # it went on and did not start anew
    expected, found = load_twins(whole.files), load_twins(again.files)
    assert all(torch.equal(found[key][n], p) for key, twin in expected.items() for n, p in twin.items())
    assert [r.to_dict() for r in again.reports] == [r.to_dict() for r in whole.reports]
    assert not list((tmp_path / "killed").glob("*half_way*"))


def test_a_kill_while_writing_leaves_the_last_good_state(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", tiny_backbone("llama"), layers=(1,), forms=("gla",))
    real, calls = files_module.save_file, []

    def torn(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a file")
            raise Killed
        real(tensors, path, metadata)

    monkeypatch.setattr(files_module, "save_file", torn)
    with pytest.raises(Killed):
        run(tmp_path / "torn", tiny_backbone("llama"), layers=(1,), forms=("gla",))
    monkeypatch.setattr(files_module, "save_file", real)
    again = run(tmp_path / "torn", tiny_backbone("llama"), layers=(1,), forms=("gla",))
    key = (1, "gla")
    expected, found = load_twins(whole.files)[key], load_twins(again.files)[key]
    assert all(torch.equal(found[n], p) for n, p in expected.items())


def test_a_twin_does_not_depend_on_which_others_are_trained(tmp_path):
    backbone = tiny_backbone("llama")
    together = load_twins(run(tmp_path / "a", backbone).files)[2, "gla"]
    alone = load_twins(run(tmp_path / "b", backbone, layers=(2,), forms=("gla",)).files)[2, "gla"]
    assert all(torch.equal(together[n], p) for n, p in alone.items())


def test_finished_work_is_read_and_not_done_again(tmp_path):
    first = run(tmp_path, tiny_backbone("llama"))
    steps = []
    second = run(tmp_path, tiny_backbone("llama"), progress=lambda *a: steps.append(a))
    assert not steps and [r.to_dict() for r in second.reports] == [r.to_dict() for r in first.reports]
    assert json.loads((tmp_path / "distill.json").read_text())["tokens"] == SETTINGS.tokens
