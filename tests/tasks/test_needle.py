"""Synthetic recall: lengths, depths, splits, and the score of a model that can be told the answer."""

import re

import numpy as np
import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import SPLITS
from dtr_deploy.tasks.haystack import FILLER, mean_by_length, mean_margin_by_length
from dtr_deploy.tasks.needle import Needle
from tests.tasks.reference import TOLERANCE, token_log_probs
from tests.tiny import tiny_backbone, tiny_hybrid, tiny_tokenizer

LENGTHS = (300, 512)


def test_scores_equal_one_forward_an_item() -> None:
    model = tiny_hybrid(window=16)
    task = Needle("recall", tiny_tokenizer(), lengths=LENGTHS, items=3, batch_tokens=900)
    score = task.score(model, "search")
    for request, hit, margin in zip(task.requests("search"), score.per_item, score.margins, strict=True):
        values, greedy = token_log_probs(model, request)
        assert hit == greedy
        assert margin == pytest.approx(np.mean(values), abs=TOLERANCE)
    assert score.strata == ("300",) * 3 + ("512",) * 3
    assert mean_by_length(score) == {300: score.per_item[:3].mean(), 512: score.per_item[3:].mean()}
    assert mean_margin_by_length(score)[512] == pytest.approx(score.margins[3:].mean())


def test_a_model_that_knows_the_numbers_scores_one() -> None:
    task = Needle("recall", tiny_tokenizer(), lengths=LENGTHS, items=2)
    batches = task.batches("search")
    # Hidden states that are one-hot of the next token, read by an output embedding that is the identity.
    oracle = []
    for batch in batches:
        hidden = torch.zeros(*batch.input_ids.shape, 512)
        hidden[batch.rows, batch.positions, batch.targets] = 30.0
        oracle.append(hidden)
    score = task.read("search", oracle, lambda hidden: hidden)
    assert score.mean == 1.0 and score.mean_margin == pytest.approx(0, abs=1e-6)
    oracle[0][:, -1] = 0  # the last digit of the first batch is forgotten
    assert task.read("search", oracle, lambda hidden: hidden).mean < 1.0


@pytest.mark.parametrize("length", [300, 512, 1000])
def test_prompts_fill_their_length(length: int) -> None:
    task = Needle("recall", tiny_tokenizer(), lengths=[length], items=8)
    longest_sentence = max(len(sentence) for sentence in FILLER) + 1  # bytes are tokens here
    for request in task.requests("search"):
        assert length - longest_sentence <= len(request.context) + len(request.continuation) <= length


def test_the_number_is_in_the_text_once_and_depths_cover_it() -> None:
    tokenizer = tiny_tokenizer()
    depths = []
    for request in Needle("recall", tokenizer, lengths=[1000], items=8).requests("confirm"):
        text, answer = tokenizer.decode(request.context), tokenizer.decode(request.continuation)
        assert re.fullmatch(r" \d{7}", answer) and text.count(answer.strip()) == 1
        depths.append(text.index(answer.strip()) / len(text))
    assert depths == sorted(depths) and depths[0] < 0.25 and depths[-1] > 0.65


def test_every_split_has_its_own_items_and_the_seed_repeats_them() -> None:
    def numbers(seed: int) -> list[tuple[int, ...]]:
        task = Needle("recall", tiny_tokenizer(), lengths=[300], items=6, seed=seed)
        return [request.continuation for split in SPLITS for request in task.requests(split)]

    assert len(set(numbers(0))) == 18
    assert numbers(0) == numbers(0) and not set(numbers(0)) & set(numbers(1))


def test_lengths_do_not_depend_on_each_other() -> None:
    both = Needle("recall", tiny_tokenizer(), lengths=LENGTHS, items=2).requests("test")
    alone = Needle("recall", tiny_tokenizer(), lengths=LENGTHS[1:], items=2).requests("test")
    assert both[2:] == alone


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match=r"lengths: 64 tokens cannot hold a needle, use \d+ or more"):
        Needle("recall", tiny_tokenizer(), lengths=[64]).requests("search")
    model = tiny_backbone()
    model.config.max_position_embeddings = 256
    with pytest.raises(UsageError, match="context of 256"):
        Needle("recall", tiny_tokenizer(), lengths=[300], items=1).score(model, "search")
    with pytest.raises(UsageError, match="at least one length"):
        Needle("recall", tiny_tokenizer(), lengths=[])
