"""Where models lie. A machine without a GPU has one that refuses mixed operands (`other_device`), for the rest the
CPU is the oracle: the same numbers wherever layers are."""

import numpy as np
import pytest
import torch

from dtr_deploy.distill.heal import HealSettings, heal
from dtr_deploy.distill.stage import distill, load_twins
from dtr_deploy.distill.trainer import DistillSettings
from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid import placement
from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.hybrid.placement import bring_back, choose, device_map, on_cpu, place_like, spread
from dtr_deploy.search.model_evaluator import ModelEvaluator
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.needle import Needle
from tests.other_device import MixedDevices, other_device
from tests.tiny import FAMILIES, tiny_backbone, tiny_tokenizer

HERE = {"": "cpu"}
THERE = {"": "other:0"}
BOTH = {
    "model.embed_tokens": "other:0",
    "model.layers.0": "other:0",
    "model.layers.1": "cpu",
    "model.layers.2": "other:0",
    "model.layers.3": "cpu",
    "model.norm": "cpu",
    "lm_head": "other:0",
}
PLACES = [THERE, BOTH]
FORMS = ("gated_deltanet", "gla")
LAYOUT = ("gated_deltanet", None, "gla", None)


@pytest.fixture(autouse=True)
def _device():
    with other_device():
        yield


def backbone_on(where, family="llama"):
    backbone = tiny_backbone(family)
    if len(where) == 1:
        bring_back(backbone, where[""])
    else:
        spread(backbone, where)
    return backbone


def tokens(rows=6, length=32):
    return torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model):
    return model(tokens().to(model.device)).logits


def close(ours, theirs):
    # float32 summed in another order: a few hundred roundings of the largest value.
    torch.testing.assert_close(ours.to("cpu"), theirs, rtol=1e-4, atol=max(1e-4, 5e-5 * theirs.abs().max().item()))


def test_the_devices_of_these_tests_refuse_what_a_gpu_refuses():
    here, there = torch.ones(3), torch.ones(3, device="other:0")
    assert there.device == torch.device("other:0") and (there + there).device == there.device
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there.add_(here)):
        with pytest.raises(MixedDevices):
            mixed()
    moved = there.to("cpu")
    there.add_(1)
    assert moved.tolist() == [1, 1, 1] and there.to("cpu").tolist() == [2, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", PLACES)
def test_a_model_answers_the_same_wherever_its_layers_lie(family, where):
    expected = logits(tiny_backbone(family))
    backbone = backbone_on(where, family)
    answer = logits(backbone)
    assert answer.device == torch.device(where.get("lm_head", "other:0"))
    close(answer, expected)
    hybrid = make_hybrid(tiny_backbone(family), LAYOUT, 8)
    moved = make_hybrid(backbone, LAYOUT, 8)
    for layer in (0, 2):  # start values are drawn
        moved.model.layers[layer].self_attn.form.load_state_dict(hybrid.model.layers[layer].self_attn.form.state_dict())
    close(logits(moved), logits(hybrid))
    written = [m.generate(tokens(2, 12).to(m.device), max_new_tokens=6, do_sample=False) for m in (moved, hybrid)]
    assert torch.equal(written[0].to("cpu"), written[1])


def test_a_model_comes_back_and_no_hook_stays():
    backbone, expected = backbone_on(BOTH), logits(tiny_backbone())
    copied = on_cpu(backbone)
    assert copied is not backbone and backbone.model.layers[0].self_attn.q_proj.weight.device.type == "other"
    close(logits(copied), expected)
    bring_back(backbone)
    assert {p.device.type for p in backbone.parameters()} == {"cpu"} and on_cpu(backbone) is backbone
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    assert torch.equal(logits(backbone), expected)


def test_a_model_is_put_where_another_lies():
    for where in (HERE, *PLACES):
        model, other = tiny_backbone(), backbone_on(where)
        place_like(model, other)
        assert [p.device for p in model.parameters()] == [p.device for p in other.parameters()]
        close(logits(model), logits(tiny_backbone()))


@pytest.mark.parametrize("where", PLACES)
def test_twins_are_trained_and_healed_the_same_wherever_layers_lie(tmp_path, where):
    settings = DistillSettings(tokens=256, precision="float32")

    def train(backbone, folder):
        result = distill(backbone, tokens(), tokens(4), FORMS, [0, 1, 2, 3], 8, settings, folder)
        twins = load_twins(result.files)
        healing = HealSettings(tokens=128, precision="float32")
        healed = heal(backbone, twins, 8, tokens(), healing, folder / "healed")
        return result.reports, twins, healed.divergences, load_twins(healed.files)

    expected = train(tiny_backbone(), tmp_path / "here")
    reports, twins, divergences, healed = train(backbone_on(where), tmp_path / "there")
    # Layers that are not on the CPU do without its fused teacher and compiled kernels: sums in another order, and Adam
    # makes a small gradient's sign a whole step.
    for ours, theirs in zip(reports, expected[0], strict=True):
        assert ours.trained.relative_error == pytest.approx(theirs.trained.relative_error, rel=1e-3)
        assert ours.window_only.relative_error == pytest.approx(theirs.window_only.relative_error, rel=1e-3)
    np.testing.assert_allclose(divergences, expected[2], rtol=1e-3)
    for found, wanted in ((twins, expected[1]), (healed, expected[3])):
        for key in wanted:
            for name, tensor in wanted[key].items():
                torch.testing.assert_close(found[key][name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("where", PLACES)
def test_layouts_are_scored_screened_and_priced_the_same_wherever_layers_lie(tmp_path, where):
    tokenizer = tiny_tokenizer()
    result = distill(
        tiny_backbone(), tokens(), tokens(4), FORMS, [0, 1, 2, 3], 8,
        DistillSettings(tokens=128, precision="float32"), tmp_path,
    )  # fmt: skip
    twins = load_twins(result.files)
    layouts = [LAYOUT, (None, "gla", "gated_deltanet", None), (None,) * 4]
    swaps = [("gla", None, None, None), (None, None, "gated_deltanet", None)]

    def evaluate(backbone):
        needle = Needle("needle", tokenizer, lengths=(200,), items=2)
        evaluator = ModelEvaluator(backbone, twins, 8, [needle], Divergence(tokens(4)), [needle], "")
        scored = evaluator.score([(layout, 0) for layout in layouts], "test")
        scores = {done.number: done.arrays["0.log_probs"] for done in scored}
        screened = {done.number: done.scalars["kl"] for done in evaluator.screen(layouts)}
        priced = {done.number: done.scalars["kl"] for done in evaluator.attribute((None,) * 4, swaps, False)}
        return scores, screened, priced

    for ours, theirs in zip(evaluate(backbone_on(where)), evaluate(tiny_backbone()), strict=True):
        assert ours.keys() == theirs.keys()
        for number in theirs:
            np.testing.assert_allclose(ours[number], theirs[number], rtol=1e-3, atol=1e-4)


def test_checkpointing_heals_to_the_same_bit(tmp_path):
    twins = load_twins(
        distill(tiny_backbone(), tokens(), tokens(4), FORMS, [0, 1, 2], 8, DistillSettings(tokens=64), tmp_path).files
    )
    found = [
        heal(tiny_backbone(), twins, 8, tokens(), HealSettings(tokens=128, checkpointing=on), tmp_path / str(on))
        for on in (False, True)
    ]
    assert found[0].divergences == found[1].divergences
    first, second = (load_twins(one.files) for one in found)
    assert all(torch.equal(t, second[key][name]) for key, twin in first.items() for name, t in twin.items())


def gpus(monkeypatch, *free):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], free[number]))


def test_the_device_is_chosen_by_what_is_there(monkeypatch):
    gpus(monkeypatch)
    assert choose("auto", 100) == choose("cpu", 100) == "cpu"
    for wrong, message in (("cuda", "no GPU"), ("spread", "no GPU"), ("tpu", "accepted are auto, cpu")):
        with pytest.raises(UsageError, match=message):
            choose(wrong, 100)
    gpus(monkeypatch, 500, 1000)
    assert choose("auto", 600) == "cuda:1" and choose("auto", 601) == "spread" and choose("cpu", 1) == "cpu"
    assert choose("cuda", 10_000) == "cuda:0" and choose("cuda:1", 1) == "cuda:1"
    with pytest.raises(UsageError, match="2 GPUs"):
        choose("cuda:2", 1)


def test_layers_are_dealt_evenly_and_what_does_not_fit_stays_on_the_cpu():
    backbone = tiny_backbone()
    layer = sum(p.nbytes for p in backbone.model.layers[0].parameters())
    embedding = backbone.model.embed_tokens.weight.nbytes
    even = device_map(backbone, {0: 100 * layer, 1: 100 * layer})
    assert {str(even[f"model.layers.{i}"]) for i in range(4)} == {"cuda:0", "cuda:1"}
    short = device_map(backbone, {0: embedding + int(1.5 * layer), 1: int(1.5 * layer)})
    assert str(short["model.layers.3"]) == "cpu"
    # Every part that `spread` moves finds its place.
    for where in (even, short):
        assert all(placement._of(name, where) is not None for name in placement._parts(backbone))
