"""Attribution against numerical derivatives of the whole model in float64, whose attention is moved step by step."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dtr_deploy.hybrid.layout import full, swap
from dtr_deploy.hybrid.model import make_hybrid, make_twin
from dtr_deploy.search.attribution import Attribution, pieces
from dtr_deploy.search.attribution_runs import changed
from dtr_deploy.search.forward import LayerPool
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.model_evaluator import ModelEvaluator
from dtr_deploy.search.scorer import Scorer
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.needle import Needle
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import plan_batches
from tests.search.test_forward import LAYERS, WINDOW, make_twins
from tests.tiny import tiny_backbone, tiny_tokenizer

HYBRID = ("gla", None, None, "gated_deltanet", None)
SWAPS = [(0, "gla"), (0, None), (2, "gated_deltanet"), (3, None), (4, "gla")]
STEP = 1e-2  # norms are in float32 whatever the model is in: a smaller one drowns in rounding
GENERATOR = torch.Generator().manual_seed(3)
CONTEXTS = [tuple(torch.randint(8, 500, (n,), generator=GENERATOR).tolist()) for n in (21, 14)]
REQUESTS = [  # two of one row, one of several tokens, one of a shorter row
    Request(CONTEXTS[0], (9,)),
    Request(CONTEXTS[0], (11,)),
    Request(CONTEXTS[1], (12, 30, 7)),
]


@pytest.fixture(scope="module")
def world():
    backbone = tiny_backbone(layers=LAYERS)
    twins = {key: {n: w.double() for n, w in weights.items()} for key, weights in make_twins(backbone).items()}
    backbone = backbone.double()
    return SimpleNamespace(backbone=backbone, twins=twins, pool=LayerPool(backbone, twins, WINDOW))


def moved(world, layout, layer: int, form: str | None, step: float):
    """The hybrid of `layout` whose attention in `layer` answers `step` of the way to what `form` would answer."""
    model = make_hybrid(world.backbone, layout, WINDOW, world.twins)
    block = world.backbone.model.layers[layer].self_attn
    other = block if form is None else make_twin(block, world.backbone.config, layer, form, WINDOW, world.twins)

    def move(module, arguments, options, output):
        if step == 0:
            return output
        hook.remove()  # `other` may be the module itself
        options = options | {"attention_mask": None}
        answer = other(*arguments, **options)[0]
        return (output[0] + step * (answer - output[0]), *output[1:])

    hook = model.model.layers[layer].self_attn.register_forward_hook(move, with_kwargs=True)
    return model, hook


@torch.no_grad()
def log_odds(world, layout, layer, form, step) -> list[list[float]]:
    """Of each token of each request."""
    found = []
    for request in REQUESTS:
        model, hook = moved(world, layout, layer, form, step)
        logits = model(torch.tensor([request.inputs]), use_cache=False).logits[0].double()
        hook.remove()
        first, odds = len(request.context) - 1, []
        for place, token in enumerate(request.continuation):
            p = logits[first + place].softmax(-1)[token].item()
            odds.append(math.log(p / (1 - p)))
        found.append(odds)
    return found


@pytest.mark.parametrize("layout", [full(LAYERS), HYBRID])
def test_log_odds_change_as_the_numerical_derivative_says(world, layout) -> None:
    swaps = [change for change in SWAPS if layout[change[0]] != change[1]]
    batches = plan_batches(REQUESTS, 0)
    found = Attribution(world.pool, torch.float32, world.backbone.lm_head).answers(
        layout, swaps, batches, len(REQUESTS)
    )
    now = log_odds(world, layout, 0, None, 0.0)
    before = [sum(-math.log1p(math.exp(-z)) for z in odds) for odds in now]
    np.testing.assert_allclose(found.before.numpy(), before, rtol=1e-6)
    for number, (layer, form) in enumerate(swaps):
        up, down = (log_odds(world, layout, layer, form, sign * STEP) for sign in (1, -1))
        for request, odds in enumerate(now):
            slope = sum((a - b) / (2 * STEP) for a, b in zip(up[request], down[request], strict=True))
            expected = sum(-math.log1p(math.exp(-(z + slope / len(odds)))) for z in odds)
            change = found.after[number, request].item() - before[request]
            assert change == pytest.approx(expected - before[request], rel=1e-2, abs=1e-3)
    assert (found.after - found.before).abs().max(0).values.min() > 0.05  # so the comparison says something


@torch.no_grad()
def divergence_at(world, divergence, layout, layer, form, step) -> float:
    model, hook = moved(world, layout, layer, form, step)
    # One row after another in one batch: the hook is good for one call.
    score = divergence.score(model).mean_kl
    hook.remove()
    return score


def test_divergence_changes_as_the_numerical_derivatives_say(world) -> None:
    ids = torch.randint(8, 500, (6, 25), generator=torch.Generator().manual_seed(1))
    divergence = Divergence(ids, every=2)
    divergence.reference(world.backbone)
    attribution = Attribution(world.pool, torch.float32, world.backbone.lm_head)

    def estimate(layout, swaps, samples):
        return attribution.divergences(layout, swaps, divergence.batches(), divergence.teacher_reads(), samples)

    swaps = [(0, "gla"), (2, "gated_deltanet"), (4, "gla")]
    found = estimate(full(LAYERS), swaps, 150)
    assert found.before == pytest.approx(0.0, abs=1e-9)
    for number, (layer, form) in enumerate(swaps):
        step = 0.02
        up, down = (divergence_at(world, divergence, full(LAYERS), layer, form, sign * step) for sign in (1, -1))
        # 6 rows and 150 draws: a standard error of 5%.
        assert found.second[number].item() == pytest.approx((up + down) / 2 / step**2, rel=0.2)
        assert abs(found.first[number].item()) < 1e-6

    swaps = [(0, None), (2, "gated_deltanet")]
    found = estimate(HYBRID, swaps, 1)
    assert found.before == pytest.approx(divergence_at(world, divergence, HYBRID, 0, None, 0.0), rel=1e-4)
    for number, (layer, form) in enumerate(swaps):
        up, down = (divergence_at(world, divergence, HYBRID, layer, form, sign * 1e-3) for sign in (1, -1))
        # A quotient of differences of float32 norms, see STEP.
        assert found.first[number].item() == pytest.approx((up - down) / 2e-3, rel=1e-2, abs=1e-5)
    assert found.layer_forwards == 6 * (LAYERS + LAYERS * (1 + 2 * 2))


def test_long_shared_beginnings_are_not_for_attribution() -> None:
    beginning = tuple(range(8, 200))
    shared = [Request((*beginning, n), (5,)) for n in range(300, 310)]
    assert not Attribution.fits(plan_batches(shared, 0))
    assert Attribution.fits(plan_batches(REQUESTS, 0))
    assert not Attribution.fits(plan_batches([Request(CONTEXTS[0], (n,)) for n in range(10, 20)], 0))


def test_pieces_say_the_same_with_less_padding(world) -> None:
    batches = plan_batches(REQUESTS, 0)
    split = pieces(batches, tokens=20)
    assert len(split) == 2 and [batch.input_ids.shape for batch in split] == [(1, 21), (1, 16)]
    attribution = Attribution(world.pool, torch.float32, world.backbone.lm_head)
    whole, apart = (attribution.answers(full(LAYERS), SWAPS[:1], some, len(REQUESTS)) for some in (batches, split))
    torch.testing.assert_close(whole.before, apart.before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.after, apart.after, rtol=1e-4, atol=1e-4)


def test_changed_finds_the_one_layer() -> None:
    assert changed(HYBRID, HYBRID) is None
    assert changed(HYBRID, swap(HYBRID, 0, None)) == (0, None)
    with pytest.raises(ValueError, match="attribution is for one"):
        changed(HYBRID, full(LAYERS))


def test_estimates_of_a_start_are_its_scores_and_are_kept() -> None:
    backbone = tiny_backbone(layers=LAYERS)
    twins, tokenizer = make_twins(backbone), tiny_tokenizer()
    held_out = torch.randint(3, 512, (3, 40), generator=torch.Generator().manual_seed(5))
    tasks = [Needle("needle", tokenizer, lengths=(400,), items=8, seed=0)]
    recall = [Needle("recall screen", tokenizer, lengths=(400,), items=2, seed=1)]
    evaluator = ModelEvaluator(backbone, twins, WINDOW, tasks, Divergence(held_out, every=3), recall, "hash", parts=4)
    ledger = Ledger(":memory:")
    scorer = Scorer(evaluator, ledger)
    assert scorer.attributable
    layouts = [HYBRID, *(swap(HYBRID, layer, form) for layer, form in ((0, None), (2, "gla"), (3, "gla")))]
    start, *others = scorer.attribute_many(HYBRID, layouts, priced=True)
    screening, score = scorer.screen(HYBRID), scorer.score(HYBRID, parts=1)
    assert start.screening.kl == pytest.approx(screening.kl, rel=1e-3)
    assert start.screening.recall["recall screen"] == pytest.approx(screening.recall["recall screen"], abs=1e-3)
    assert start.score is not None and start.score.margin == pytest.approx(score.margin, abs=1e-3)
    assert len({estimate.screening.kl for estimate in others}) == len(others)
    assert all(estimate.score is not None and estimate.score.margin != start.score.margin for estimate in others)

    again = Scorer(evaluator, ledger)
    evaluator._attribution_runs = None  # type: ignore[method-assign,assignment]  # must not be wanted
    kept, *_ = again.attribute_many(HYBRID, layouts, priced=True)
    assert kept.screening == start.screening and kept.score is not None and kept.score.margin == start.score.margin
    assert len(ledger.trials(kind="attribution")) == len(layouts)
    assert scorer.attribute_many(HYBRID, layouts[:0], priced=False) == []
