"""Scores through the cache and the ledger equal those of the whole model, and are computed once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import full
from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.layout_search import recall_screen
from dtr_deploy.recipe_sections import Screen
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.scorer import ModelEvaluator, Scorer, models_hash
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.needle import Needle
from tests.search.test_forward import LAYERS, WINDOW, make_twins
from tests.tiny import tiny_backbone, tiny_tokenizer

LAYOUT = ("gla", None, None, "gated_deltanet", None)
# Log-probabilities of a float32 model with other batch masks: rounding only.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone(layers=LAYERS)


@pytest.fixture(scope="module")
def twins(backbone):
    return make_twins(backbone)


@pytest.fixture(scope="module")
def held_out():
    return torch.randint(3, 512, (6, 40), generator=torch.Generator().manual_seed(5))


def make_evaluator(backbone, twins, held_out, border_bytes=1 << 30, seed=0) -> ModelEvaluator:
    tokenizer = tiny_tokenizer()
    tasks = [Needle("needle", tokenizer, lengths=(400, 500), items=3, seed=seed, weight=2.0)]
    recall = [Needle("recall screen", tokenizer, lengths=(400,), items=2, seed=1)]
    return ModelEvaluator(backbone, twins, WINDOW, tasks, Divergence(held_out[:4]), recall, "hash", border_bytes)


@pytest.mark.parametrize("border_bytes", [0, 2_000_000, 1 << 30])
def test_scores_equal_the_whole_model(backbone, twins, held_out, border_bytes):
    evaluator = make_evaluator(backbone, twins, held_out, border_bytes)
    scorer = Scorer(evaluator, Ledger(":memory:"))
    scorer.score(full(LAYERS))
    whole = make_hybrid(backbone, LAYOUT, WINDOW, twins)
    for split in ("search", "confirm"):
        ours, theirs = scorer.score(LAYOUT, split).tasks[0], evaluator.tasks[0].score(whole, split)
        np.testing.assert_allclose(ours.margins, theirs.margins, atol=TOLERANCE)
        np.testing.assert_array_equal(ours.per_item, theirs.per_item)
        assert ours.strata == theirs.strata == ("400",) * 3 + ("500",) * 3
    assert evaluator.kept_bytes <= border_bytes


def test_screening_equals_the_whole_model(backbone, twins, held_out):
    evaluator = make_evaluator(backbone, twins, held_out)
    screening = Scorer(evaluator, Ledger(":memory:")).screen(LAYOUT)
    whole = make_hybrid(backbone, LAYOUT, WINDOW, twins)
    divergence = Divergence(held_out[:4])
    divergence.reference(backbone)
    assert screening.kl == pytest.approx(divergence.score(whole).mean_kl, abs=TOLERANCE)
    assert screening.perplexity == pytest.approx(divergence.perplexity(whole), rel=TOLERANCE)
    assert screening.recall == {
        "recall screen": pytest.approx(evaluator.recall[0].score(whole, "search").mean_margin, abs=TOLERANCE)
    }
    assert screen(evaluator, full(LAYERS)).kl == pytest.approx(0.0, abs=1e-6)


def screen(evaluator, layout):
    return Scorer(evaluator, Ledger(":memory:")).screen(layout)


def test_bfloat16_products_keep_float32_hidden_states_and_an_exact_reference(backbone, twins, held_out):
    def evaluator(precision):
        return ModelEvaluator(backbone, twins, WINDOW, [], Divergence(held_out[:4]), [], "hash", precision=precision)

    exact, mixed = evaluator("float32"), evaluator("bfloat16")
    assert exact.fingerprint("screen", "search") != mixed.fingerprint("screen", "search")
    # The teacher is compared with itself in the same arithmetic, so rounding does not count as divergence.
    assert screen(mixed, full(LAYERS)).kl == pytest.approx(0.0, abs=1e-6)
    kl, rounded = screen(exact, LAYOUT).kl, screen(mixed, LAYOUT).kl
    assert rounded != kl and rounded == pytest.approx(kl, rel=0.1)  # bfloat16 keeps 8 bits of each product's factors
    hidden = next(mixed._screening.hidden(LAYOUT))
    assert hidden.dtype == torch.float32


def test_a_trial_is_computed_once_and_every_copy_is_equal(backbone, twins, held_out, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = Scorer(make_evaluator(backbone, twins, held_out), ledger)
        score, screening = first.score(LAYOUT), first.screen(LAYOUT)
        assert first.spent_trials == 2 and first.spent_layer_forwards > 0
    evaluator = make_evaluator(backbone, twins, held_out)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        second = Scorer(evaluator, ledger)
        again = second.score(LAYOUT)
        assert second.screen(LAYOUT) == screening
        for ours, theirs in zip(again.tasks, score.tasks, strict=True):
            np.testing.assert_array_equal(ours.margins, theirs.margins)
            np.testing.assert_array_equal(ours.per_item, theirs.per_item)
        assert not evaluator._runs and evaluator._screening is None  # nothing was run
        assert second.spent_layer_forwards == first.spent_layer_forwards
        assert second.spent_seconds == first.spent_seconds


def test_keys_change_with_what_a_score_depends_on(backbone, twins, held_out):
    evaluator, other = make_evaluator(backbone, twins, held_out), make_evaluator(backbone, twins, held_out, seed=1)
    assert evaluator.fingerprint("score", "search") != other.fingerprint("score", "search")
    assert evaluator.fingerprint("score", "search") != evaluator.fingerprint("score", "confirm")
    changed = {key: dict(weights) for key, weights in twins.items()}
    name = next(name for name in changed[2, "gla"] if name.startswith("form."))
    changed[2, "gla"][name] = changed[2, "gla"][name] + 1e-3
    assert models_hash("b", twins, 16) == models_hash("b", dict(reversed(twins.items())), 16)
    assert len({models_hash("b", twins, 16), models_hash("b", changed, 16), models_hash("b", twins, 32)}) == 3


def test_tasks_that_generate_get_a_whole_model(backbone, twins, held_out):
    seen = []

    class Generating(Needle):
        resumable = False

        def score(self, model, split, forward_hidden=None):
            seen.append(getattr(model.config, "dtr", None))
            return super().score(model, split, forward_hidden)

    task = Generating("needle", tiny_tokenizer(), lengths=(400,), items=2)
    evaluator = ModelEvaluator(backbone, twins, WINDOW, [task], Divergence(held_out[:4]), [], "hash")
    scorer = Scorer(evaluator, Ledger(":memory:"))
    scorer.score(full(LAYERS))
    scorer.score(LAYOUT)
    assert seen[0] is None and seen[1]["forms"] == list(LAYOUT)


def test_recall_is_screened_even_if_the_recipe_does_not_score_it():
    recipe = SimpleNamespace(search=SimpleNamespace(screen=Screen(recall_items=2, recall_length=600)), seed=0)
    tasks = recall_screen(recipe, SimpleNamespace(tokenizer=tiny_tokenizer()))
    task = next(task for task in tasks if isinstance(task, Needle))
    assert task.lengths == (600,)
    scored = Needle("recall", tiny_tokenizer(), lengths=(600,), items=2, seed=0)
    assert task.fingerprint("search") != scored.fingerprint("search")  # ranked on other prompts than it is scored on


LAYOUTS = [full(LAYERS), LAYOUT, ("gla", None, None, None, None), ("gla", None, "jet", None, None), LAYOUT]


def test_parts_add_up_to_the_whole_and_are_computed_once(backbone, twins, held_out):
    whole = ModelEvaluator(
        backbone, twins, WINDOW, [needle(8)], Divergence(held_out[:2]), [], "hash", precision="float32", parts=1
    )
    dealt = ModelEvaluator(backbone, twins, WINDOW, [needle(8)], Divergence(held_out[:2]), [], "hash", parts=4)
    ledger = Ledger(":memory:")
    scorer = Scorer(dealt, ledger)
    assert scorer.parts == 4
    half = scorer.score(LAYOUT, parts=2).tasks[0]
    assert half.strata.count("400") == half.strata.count("500") == 4 and len(ledger.trials("score")) == 2
    three = scorer.score(LAYOUT, parts=3).tasks[0]
    all_parts = scorer.score(LAYOUT).tasks[0]
    assert len(ledger.trials("score")) == 4 and scorer.spent_trials == 1
    assert scorer.spent_layer_forwards == sum(trial.layer_forwards for trial in ledger.trials("score"))
    at_once = Scorer(whole, Ledger(":memory:")).score(LAYOUT).tasks[0]
    np.testing.assert_allclose(all_parts.margins, at_once.margins, atol=TOLERANCE)
    np.testing.assert_array_equal(all_parts.per_item, at_once.per_item)
    assert all_parts.strata == at_once.strata
    assert {*half.margins} < {*three.margins} < {*all_parts.margins}  # nested, bit for bit
    assert scorer.score(LAYOUT, "confirm").tasks[0].per_item.size == 16
    scorer.decide(LAYOUT, "committed")
    assert {trial.status for trial in ledger.trials("score") if trial.key.split == "search"} == {"committed"}
    with pytest.raises(UsageError, match="1 to 4"):
        scorer.score(LAYOUT, parts=5)


def needle(items: int) -> Needle:
    return Needle("needle", tiny_tokenizer(), lengths=(400, 500), items=items)


def test_layouts_scored_together_equal_layouts_scored_apart_and_cost_less(backbone, twins, held_out):
    together, apart = (
        Scorer(make_evaluator(backbone, twins, held_out, border_bytes=0), Ledger(":memory:")) for _ in range(2)
    )
    for many, one in zip(together.score_many(LAYOUTS, parts=2), LAYOUTS, strict=True):
        alone = apart.score(one, parts=2)
        assert many.layout == one
        np.testing.assert_allclose(many.tasks[0].margins, alone.tasks[0].margins, atol=TOLERANCE)
    for many, one in zip(together.screen_many(LAYOUTS), LAYOUTS, strict=True):
        assert many.kl == pytest.approx(apart.screen(one).kl, abs=TOLERANCE)
    assert together.spent_trials == apart.spent_trials == 8  # four distinct layouts, scored and screened
    assert together.spent_layer_forwards < 0.8 * apart.spent_layer_forwards


def test_work_shared_by_layouts_is_divided_among_them_without_loss(backbone, twins, held_out):
    evaluator, ledger = make_evaluator(backbone, twins, held_out, border_bytes=0), Ledger(":memory:")
    Scorer(evaluator, ledger).score_many(LAYOUTS, parts=1)
    run = sum(runs.forward.layer_forwards for runs in evaluator._runs.values())
    trials = ledger.trials("score")
    assert sum(trial.layer_forwards for trial in trials) == run
    # full has five layers of its own. The other three share layers 0 and 1, two of them layer 2 as well.
    own = {trial.key.layout: trial.layer_forwards for trial in trials}
    assert own[full(LAYERS)] == pytest.approx(run * 5 / (5 + 1 + 1 + 2 + 3 + 3), abs=1)


def test_a_kill_between_layouts_loses_only_what_was_not_finished(backbone, twins, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr("dtr_deploy.search.model_evaluator.LAYOUTS_AT_ONCE", 2)
    path = tmp_path / "ledger.sqlite"
    killed = make_evaluator(backbone, twins, held_out)
    score, calls = killed._task_runs, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(killed, "_task_runs", dies)
    with Ledger(path) as ledger, pytest.raises(KeyboardInterrupt):
        Scorer(killed, ledger).score_many(LAYOUTS, parts=1)
    with Ledger(path) as ledger:
        assert len(ledger.trials("score")) == 2
        scorer = Scorer(make_evaluator(backbone, twins, held_out), ledger)
        assert len(scorer.score_many(LAYOUTS, parts=1)) == len(LAYOUTS)
        assert len(ledger.trials("score")) == 4
