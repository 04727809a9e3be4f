"""Hidden states from kept borders equal those of the whole hybrid model, and cost only the layers they must."""

import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.search.forward import LayerPool, PrefixForward
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import hidden_states, plan_batches
from tests.tiny import randomise_forms, tiny_backbone

LAYERS, WINDOW = 5, 16
FORMS = ("gated_deltanet", "gla", "jet", "hedgehog")
# Same modules, shapes and masks, but the model may take another SDPA path for an all-ones mask: float32 rounding.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def make_twins(backbone):
    """Random twins of every layer and form, as distillation writes them."""
    twins = {}
    for number, form in enumerate(FORMS):
        layout = (*(form,) * (LAYERS - 1), None), (None, *(form,) * (LAYERS - 1))
        for part in layout:
            hybrid = randomise_forms(make_hybrid(backbone, part, WINDOW), seed=number)
            for layer, name in enumerate(part):
                if name is not None:
                    twins[layer, form] = hybrid.model.layers[layer].self_attn.state_dict()
    return twins


def requests(shared: int, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    prefix = tuple(torch.randint(3, 512, (shared,), generator=generator).tolist())
    made = []
    for length in (70, 41, 40, 23, 9, 3):
        rest = tuple(torch.randint(3, 512, (length,), generator=generator).tolist())
        made.append(Request(prefix + rest, (7, 8)))
    return made


LAYOUTS = [
    (None, None, None, None, None),
    (None, None, None, None, "gla"),
    (None, None, "gated_deltanet", None, "gla"),
    (None, None, "gated_deltanet", None, "gla"),
    ("gla", None, "gated_deltanet", None, None),
    ("gla", "gated_deltanet", "gated_deltanet", "gla", None),
    (None, None, None, "gated_deltanet", None),
    ("jet", None, "hedgehog", "jet", None),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shared", [0, 50])
@pytest.mark.parametrize("stride", [0, 1, 2])
def test_equals_the_whole_model(family, shared, stride):
    backbone = tiny_backbone(family, layers=LAYERS)
    twins = make_twins(backbone)
    batches = plan_batches(requests(shared), pad_token_id=0, batch_tokens=150)
    assert len(batches) > 1 and batches[0].shared == shared
    forward = PrefixForward(LayerPool(backbone, twins, WINDOW), batches, stride)
    for layout in LAYOUTS:
        model = make_hybrid(backbone, layout, WINDOW, twins) if any(layout) else backbone
        expected = list(hidden_states(model, batches))
        for batch, ours, theirs in zip(batches, forward.hidden(layout), expected, strict=True):
            real = batch.attention_mask[:, batch.shared :].bool()  # what padding computes is never read
            torch.testing.assert_close(ours[real], theirs[real], **TOLERANCE)


def test_kept_borders_do_not_change_a_bit():
    """A result may not depend on which layout ran before: a resumed search starts with nothing kept."""
    backbone = tiny_backbone(layers=LAYERS)
    batches = plan_batches(requests(0), pad_token_id=0)
    pool = LayerPool(backbone, make_twins(backbone), WINDOW)
    warm = PrefixForward(pool, batches, 1)
    for layout in LAYOUTS:
        fresh = PrefixForward(pool, batches, 1)
        for ours, theirs in zip(warm.hidden(layout), fresh.hidden(layout), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("stride", "layers_run"), [(0, [5, 5, 5, 5]), (1, [5, 1, 3, 1]), (2, [5, 1, 3, 1])])
def test_runs_only_what_changed(stride, layers_run):
    backbone = tiny_backbone(layers=LAYERS)
    batches = plan_batches([Request((5, 6, 7), (8,))], pad_token_id=0)
    forward = PrefixForward(LayerPool(backbone, make_twins(backbone), WINDOW), batches, stride)
    ran = []
    for layout in LAYOUTS[:4]:
        before = forward.layer_forwards
        list(forward.hidden(layout))
        ran.append(forward.layer_forwards - before)
    assert ran == layers_run


def test_an_abandoned_run_leaves_nothing_wrong_behind():
    backbone = tiny_backbone(layers=LAYERS)
    batches = plan_batches(requests(0), pad_token_id=0, batch_tokens=150)
    pool = LayerPool(backbone, make_twins(backbone), WINDOW)
    forward = PrefixForward(pool, batches, 1)
    list(forward.hidden(LAYOUTS[0]))
    next(forward.hidden(LAYOUTS[5]))  # the first batch only
    expected = list(PrefixForward(pool, batches, 0).hidden(LAYOUTS[1]))
    for ours, theirs in zip(forward.hidden(LAYOUTS[1]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_memory_is_what_was_announced():
    backbone = tiny_backbone(layers=LAYERS)
    batches = plan_batches(requests(0), pad_token_id=0)
    forward = PrefixForward(LayerPool(backbone, make_twins(backbone), WINDOW), batches, 1)
    list(forward.hidden(LAYOUTS[0]))
    # The embeddings are cheap to make again and not kept: one border less than layers.
    assert forward.kept_bytes == PrefixForward.border_bytes(batches, backbone.config) * (LAYERS - 1) // LAYERS
    forward.forget()
    assert forward.kept_bytes == 0


def test_the_backbone_is_shared_and_not_modified():
    backbone = tiny_backbone(layers=LAYERS)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    pool = LayerPool(backbone, make_twins(backbone), WINDOW)
    list(PrefixForward(pool, plan_batches(requests(0), pad_token_id=0)).hidden(LAYOUTS[5]))
    twin = pool.layers[1]["gla"]
    assert twin.mlp is backbone.model.layers[1].mlp
    assert type(backbone.model.layers[1].self_attn).__name__ == "LlamaAttention"
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_a_layout_without_twin_is_refused():
    backbone = tiny_backbone(layers=LAYERS)
    twins = make_twins(backbone)
    del twins[3, "gla"]
    pool = LayerPool(backbone, twins, WINDOW)
    with pytest.raises(UsageError, match="layer 3, form 'gla'"):
        pool.choose((None, None, None, "gla", None))
    with pytest.raises(UsageError, match="4 entries"):
        pool.choose((None,) * 4)
