"""Hidden states from kept borders equal those of the whole hybrid model, and cost only the layers they must."""

import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.search.forward import LayerPool, PrefixForward
from dtr_deploy.search.layer_runs import ModuleRuns
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


def by_modules(pool: LayerPool, batches, stride: int) -> PrefixForward:
    """With padding, and to the last digit: packed layers have tests of their own (test_packed_runs.py)."""
    return PrefixForward(pool, batches, stride, runs=ModuleRuns(pool.backbone, pool.layers, WINDOW, torch.float32))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shared", [0, 50])
@pytest.mark.parametrize("stride", [0, 1, 2])
def test_equals_the_whole_model(family, shared, stride):
    backbone = tiny_backbone(family, layers=LAYERS)
    twins = make_twins(backbone)
    batches = plan_batches(requests(shared), pad_token_id=0, batch_tokens=150)
    assert len(batches) > 1 and batches[0].shared == shared
    forward = by_modules(LayerPool(backbone, twins, WINDOW), batches, stride)
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


@pytest.mark.parametrize("shared", [0, 50])
@pytest.mark.parametrize(("stride", "together"), [(0, 16), (1, 16), (2, 3)])
def test_many_layouts_equal_each_alone(shared, stride, together, monkeypatch):
    monkeypatch.setattr("dtr_deploy.search.forward.LAYOUTS_AT_ONCE", together)
    backbone = tiny_backbone(layers=LAYERS)
    batches = plan_batches(requests(shared), pad_token_id=0, batch_tokens=150)
    pool = LayerPool(backbone, make_twins(backbone), WINDOW)
    forward, alone = PrefixForward(pool, batches, stride), PrefixForward(pool, batches, 0)
    for layouts in (LAYOUTS, LAYOUTS[4:], LAYOUTS[:2]):  # the second and third time something is kept
        seen = {(index, number): hidden for index, number, hidden in forward.hidden_many(layouts)}
        assert len(seen) == len(layouts) * len(batches)
        for index, layout in enumerate(layouts):
            for number, theirs in enumerate(alone.hidden(layout)):
                real = batches[number].attention_mask[:, batches[number].shared :].bool()
                torch.testing.assert_close(seen[index, number][real], theirs[real], **TOLERANCE)


def test_what_layouts_share_is_run_once():
    backbone = tiny_backbone(layers=LAYERS)
    batches = plan_batches([Request((5, 6, 7), (8,)), Request((9, 6, 7), (8,))], pad_token_id=0)
    forward = PrefixForward(LayerPool(backbone, make_twins(backbone), WINDOW), batches, 0)
    swaps = [tuple("gla" if layer == swapped else None for layer in range(LAYERS)) for swapped in range(LAYERS)]
    list(forward.hidden_many(swaps))
    # Layer l is run unswapped (if a swap is still to come), swapped, and once for each swap before it.
    assert forward.layer_forwards == 2 * (sum(layer + 2 for layer in range(LAYERS - 1)) + LAYERS)
    assert sum(forward.shares) == pytest.approx(forward.layer_forwards)
    assert forward.shares[0] > forward.shares[-1]


def test_rows_with_other_examples_share_what_they_have(monkeypatch):
    """Two sets of few-shot examples in one plan: each set is run once, and no row is read with the wrong one."""
    backbone = tiny_backbone(layers=LAYERS)
    both = [*requests(300, seed=1), *requests(400, seed=2)]
    batches = plan_batches(both, pad_token_id=0)
    assert sorted({batch.shared for batch in batches}) == [300, 400]
    layout = LAYOUTS[2]
    twins = make_twins(backbone)
    forward = PrefixForward(LayerPool(backbone, twins, WINDOW), batches, 1)
    expected = list(hidden_states(make_hybrid(backbone, layout, WINDOW, twins), batches))
    for _ in range(2):  # the second time from kept borders
        for batch, ours, theirs in zip(batches, forward.hidden(layout), expected, strict=True):
            real = batch.attention_mask[:, batch.shared :].bool()
            torch.testing.assert_close(ours[real], theirs[real], **TOLERANCE)
    assert forward.layer_forwards == (LAYERS + 1) * (len(both) + 2)


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
    forward = by_modules(LayerPool(backbone, make_twins(backbone), WINDOW), batches, 1)
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
        pool.check((None, None, None, "gla", None))
    with pytest.raises(UsageError, match="4 entries"):
        pool.check((None,) * 4)
