"""Answers checked from drafts against transformers' `generate`, and what checking costs."""

import numpy as np
import pytest
import torch

from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.scorer import ModelEvaluator, Scorer
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.generation import GeneratedAnswers, GenerationTask, settled
from dtr_deploy.tasks.needle import Needle
from dtr_deploy.tasks.requests import Request
from tests.search.test_forward import FORMS, LAYERS, WINDOW, make_twins
from tests.tasks.test_generation import generated
from tests.tiny import FAMILIES, tiny_backbone, tiny_tokenizer

ITEMS, NEW = 5, 8
LAYOUTS = [(None,) * LAYERS, *((None, form, None, form, None) for form in FORMS)]


class Continuations(GenerationTask):
    """Prompts of random tokens; which texts are accepted is written down, which tokens were written is remembered."""

    def __init__(self) -> None:
        super().__init__("continuations", tiny_tokenizer(), stops=("\n",), max_tokens=NEW)
        self.texts: list[str] = []

    def make_requests(self, split):
        generator = torch.Generator().manual_seed(3)
        lengths = (30, 12, 90, 31, 5)
        return [Request(tuple(torch.randint(8, 512, (n,), generator=generator).tolist()), (40, 41)) for n in lengths]

    def accepts(self, split, item, text):
        self.texts.append(text)
        return len(text) % 2 == 0


def evaluator_of(backbone, twins, task, parts=1):
    held_out = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(5))
    return ModelEvaluator(backbone, twins, WINDOW, [task], Divergence(held_out), [], "hash", parts=parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate_with_every_form(family):
    backbone = tiny_backbone(family, layers=LAYERS)
    twins = make_twins(backbone)
    task = Continuations()
    scorer = Scorer(evaluator_of(backbone, twins, task), Ledger(":memory:"))
    stop = task.stop(backbone, "search")
    for layouts in (LAYOUTS[:1], LAYOUTS, LAYOUTS[3:]):  # right answers, then the base's, then others' as drafts
        task.texts.clear()
        runs = scorer.evaluator._task_runs("score", 0, "search", 0)
        runs.run(layouts)
        for number, layout in enumerate(layouts):
            model = make_hybrid(backbone, layout, WINDOW, twins) if any(layout) else backbone
            expected = [stop.text(generated(model, r.context, stop)) for r in task.requests("search")]
            assert task.texts[ITEMS * number : ITEMS * (number + 1)] == expected
    scores = scorer.score_many(LAYOUTS)
    for layout, score in zip(LAYOUTS, scores, strict=True):
        model = make_hybrid(backbone, layout, WINDOW, twins) if any(layout) else backbone
        theirs = task.score(model, "search")
        np.testing.assert_array_equal(score.tasks[0].per_item, theirs.per_item)
        np.testing.assert_allclose(score.tasks[0].margins, theirs.margins, atol=1e-3)


def test_a_draft_that_holds_costs_one_pass():
    backbone = tiny_backbone(layers=LAYERS)
    evaluator = evaluator_of(backbone, make_twins(backbone), Continuations())
    runs = evaluator._task_runs("score", 0, "search", 0)
    first = runs.run(LAYOUTS[:1])[0]
    again = runs.run(LAYOUTS[:1])[0]
    np.testing.assert_array_equal(first.arrays["greedy"], again.arrays["greedy"])
    # Two rows an item (the right answer and the draft), the longest prompt once for both, and no cached decoding.
    assert again.layer_forwards == (2 * ITEMS + 1) * LAYERS
    assert first.layer_forwards > again.layer_forwards - LAYERS * ITEMS


def test_generated_answers_can_be_dealt():
    backbone = tiny_backbone(layers=LAYERS)
    task = GeneratedAnswers(Needle("needle", tiny_tokenizer(), lengths=(400,), items=6))
    scorer = Scorer(evaluator_of(backbone, make_twins(backbone), task, parts=3), Ledger(":memory:"))
    assert scorer.parts == 3
    layout = LAYOUTS[1]
    half, whole = scorer.score(layout, parts=1).tasks[0], scorer.score(layout).tasks[0]
    assert half.per_item.size == 2 and whole.per_item.size == 6 and {*half.margins} < {*whole.margins}


def test_settled_is_the_answer_up_to_the_first_that_differs():
    def reached(tokens):
        return tokens[-1] == 9

    assert settled((1, 2, 3), (1, 2, 3), reached) == [1, 2, 3]
    assert settled((1, 2, 3), (1, 5, 3), reached) == [1, 5]
    assert settled((1, 2, 3), (4, 2, 3), reached) == [4]
    assert settled((1, 9, 3), (1, 9, 3), reached) == [1, 9]
