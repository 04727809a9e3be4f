"""Packed layers against the float32 model: equal with float32 products, no worse than autocast with bfloat16 ones."""

from itertools import pairwise

import pytest
import torch

from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.search.forward import LayerPool, PrefixForward
from dtr_deploy.search.layer_runs import ModuleRuns
from dtr_deploy.search.packed_runs import PackedRuns
from dtr_deploy.tasks.scoring import hidden_states, plan_batches
from dtr_kernels.compiled.causal import causal_attention_packed
from tests.search.test_forward import FORMS, LAYERS, WINDOW, make_twins, requests
from tests.tiny import tiny_backbone

LAYOUTS = [
    (None,) * LAYERS,
    *((form,) * (LAYERS - 1) + (None,) for form in FORMS),
    ("jet", None, "hedgehog", "gla", None),
]
# Both round the factors of each product to 8 bits, 2^-9 relative, some hundred times a pass; they round at the same
# places but not all the same numbers, so the sums of errors differ. Autocast's own error is the unit.
NO_WORSE = 1.3


def error(hidden, exact, batches):
    """Relative RMS error over real tokens."""
    difference = scale = 0.0
    for batch, ours, theirs in zip(batches, hidden, exact, strict=True):
        real = batch.attention_mask[:, batch.shared :].bool()
        difference += float((ours[real] - theirs[real]).square().sum())
        scale += float(theirs[real].square().sum())
    return (difference / scale) ** 0.5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shared", [0, 50])
def test_rounds_no_worse_than_autocast(family, shared):
    backbone = tiny_backbone(family, layers=LAYERS)
    twins = make_twins(backbone)
    pool = LayerPool(backbone, twins, WINDOW)
    narrow = pool.runs(torch.bfloat16)
    assert isinstance(narrow, PackedRuns) and pool.runs(torch.bfloat16) is narrow
    batches = plan_batches(requests(shared), pad_token_id=0, batch_tokens=150)
    assert batches[0].shared == shared
    ours, autocast = (
        PrefixForward(pool, batches, 1, runs=runs)
        for runs in (narrow, ModuleRuns(backbone, pool.layers, WINDOW, torch.bfloat16))
    )
    for layout in LAYOUTS:
        model = make_hybrid(backbone, layout, WINDOW, twins) if any(layout) else backbone
        exact = list(hidden_states(model, batches))
        mine, theirs = error(ours.hidden(layout), exact, batches), error(autocast.hidden(layout), exact, batches)
        assert 0 < mine < NO_WORSE * theirs + 1e-3, (layout, mine, theirs)
        assert mine < 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shared", [0, 50])
def test_float32_products_are_the_models_own(family, shared):
    backbone = tiny_backbone(family, layers=LAYERS)
    twins = make_twins(backbone)
    pool = LayerPool(backbone, twins, WINDOW)
    runs = pool.runs(torch.float32)
    assert isinstance(runs, PackedRuns)
    batches = plan_batches(requests(shared), pad_token_id=0, batch_tokens=150)
    for layout in LAYOUTS:
        model = make_hybrid(backbone, layout, WINDOW, twins) if any(layout) else backbone
        exact = list(hidden_states(model, batches))
        # Float32 rounding, amplified by four random layers; bfloat16 products are a hundred times further off.
        assert error(PrefixForward(pool, batches, 1).hidden(layout), exact, batches) < 3e-4, layout
    held = runs._mlps[0].down.parts[0][0]
    assert held.data_ptr() == backbone.model.layers[0].mlp.down_proj.weight.data_ptr()  # no copy


def test_layouts_side_by_side_and_kept_borders_change_rounding_only():
    backbone = tiny_backbone(layers=LAYERS)
    pool = LayerPool(backbone, make_twins(backbone), WINDOW)
    batches = plan_batches(requests(0), pad_token_id=0)
    forward = PrefixForward(pool, batches, 1, torch.bfloat16)
    for _ in range(2):
        for index, number, hidden in forward.hidden_many(LAYOUTS):
            alone = list(PrefixForward(pool, batches, 0, torch.bfloat16).hidden(LAYOUTS[index]))[number]
            # The same sums in the same order but for how products are cut into blocks: float32 accumulation.
            torch.testing.assert_close(hidden, alone, rtol=2e-2, atol=2e-2)


def test_weights_are_converted_once_and_mlps_shared_by_forms():
    backbone = tiny_backbone(layers=LAYERS)
    pool = LayerPool(backbone, make_twins(backbone), WINDOW)
    narrow = pool.runs(torch.bfloat16)
    assert not narrow._mlps  # nothing before it is needed
    batches = plan_batches(requests(0), pad_token_id=0)
    for _ in range(2):
        list(PrefixForward(pool, batches, 0, torch.bfloat16).hidden_many(LAYOUTS[:3]))
    assert len(narrow._mlps) == LAYERS and len(narrow._projections) == LAYERS + 2 * (LAYERS - 1)
    assert narrow._mlps[0].down.parts[0][0].dtype == torch.bfloat16


def test_other_products_and_weights_take_the_modules():
    backbone = tiny_backbone(layers=LAYERS)
    assert PackedRuns.fits(backbone, torch.float32) and PackedRuns.fits(backbone, torch.bfloat16)
    assert not PackedRuns.fits(backbone, torch.float16)
    assert not PackedRuns.fits(backbone.bfloat16(), torch.bfloat16)


@pytest.mark.parametrize("cached", [0, 37])
def test_packed_causal_attention_is_softmax_over_everything_before(cached):
    generator = torch.Generator().manual_seed(0)
    lengths, heads, group, dim = [1, 300, 17, 64], 2, 3, 32
    tokens = sum(lengths)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = random(tokens, heads * group, dim), random(tokens, heads, dim), random(tokens, heads, dim)
    past = (random(cached, heads, dim), random(cached, heads, dim)) if cached else (None, None)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    out = causal_attention_packed(q, k, v, cu_seqlens=borders, scale=0.2, past_k=past[0], past_v=past[1])
    for first, last in pairwise(borders):
        keys, values = (
            torch.cat([x[0:0] if p is None else p, x[first:last]]).double().repeat_interleave(group, 1)
            for x, p in ((k, past[0]), (v, past[1]))
        )
        logits = 0.2 * torch.einsum("qhd,khd->hqk", q[first:last].double(), keys)
        seen = torch.arange(len(keys))[None] <= torch.arange(last - first)[:, None] + cached
        expected = torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), values)
        torch.testing.assert_close(out[first:last].double(), expected, rtol=1e-5, atol=1e-5)
