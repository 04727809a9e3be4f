"""Greedy answers against transformers' own `generate`, token by token."""

import numpy as np
import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.generation import GeneratedAnswers, Stop, greedy_tokens
from dtr_deploy.tasks.local_file import LabelledFile
from dtr_deploy.tasks.needle import Needle
from tests.tasks.reference import token_log_probs
from tests.tiny import FAMILIES, tiny_backbone, tiny_hybrid, tiny_tokenizer

FORMS = ("gated_deltanet", "gla", "jet", "hedgehog")
PROMPTS = [tuple(range(20 + 7 * i, 20 + 7 * i + length)) for i, length in enumerate((40, 3, 17, 17, 70))]


def generated(model, prompt, stop):
    """transformers' answer, end included."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=stop.max_tokens,
        do_sample=False,
        stop_strings=list(stop.texts) or None,
        tokenizer=stop.tokenizer if stop.texts else None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_equals_generate(family, form):
    model = tiny_backbone(family) if form is None else tiny_hybrid(family, (None, form, form, None), window=16)
    free = Stop.of(model, tiny_tokenizer(), (), 12)
    expected = [generated(model, prompt, free) for prompt in PROMPTS]
    assert greedy_tokens(model, PROMPTS, free, batch_tokens=100) == expected
    begun = [tokens[: index % 3] for index, tokens in enumerate(expected)]
    assert greedy_tokens(model, PROMPTS, free, begun=begun) == expected


def test_stops_where_generate_stops():
    model, tokenizer = tiny_backbone(), tiny_tokenizer()
    longest = generated(model, PROMPTS[0], Stop.of(model, tokenizer, (), 12))
    text = tokenizer.decode(longest[4:6])  # two tokens that do come
    stop = Stop.of(model, tokenizer, (text,), 12)
    expected = generated(model, PROMPTS[0], stop)
    assert len(expected) < 12
    (written,) = greedy_tokens(model, PROMPTS[:1], stop)
    assert written == expected
    assert text not in stop.text(written) and tokenizer.decode(written).startswith(stop.text(written))
    # An end-of-text token ends an answer and is no part of its text.
    ending = Stop(tokenizer, frozenset({longest[3]}), (), 12)
    (written,) = greedy_tokens(model, PROMPTS[:1], ending)
    assert written == longest[: longest.index(longest[3]) + 1]
    assert ending.text(written) == tokenizer.decode(written[:-1])


def test_a_prompt_that_does_not_fit_is_refused():
    model = tiny_backbone()
    with pytest.raises(UsageError, match="8192"):
        greedy_tokens(model, [(5,) * 8190], Stop.of(model, tiny_tokenizer(), (), 12))


def test_generated_answers_are_accepted_by_the_task_itself(tmp_path):
    model, tokenizer = tiny_backbone(), tiny_tokenizer()
    task = GeneratedAnswers(Needle("needle", tokenizer, lengths=(400, 500), items=2))
    score = task.score(model, "search")
    assert score.strata == ("400", "400", "500", "500") and not task.resumable
    for item, request in enumerate(task.requests("search")):
        written = generated(model, request.context, task.stop(model, "search"))
        text = tokenizer.decode(written).split("\n")[0]
        assert score.per_item[item] == task.accepts("search", item, text)
        values, _ = token_log_probs(model, request)
        assert score.margins[item] == pytest.approx(np.mean(values), abs=1e-4)
    lines = [f'{{"text": "row {row}", "label": "{("good", "bad")[row % 2]}"}}\n' for row in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    labelled = GeneratedAnswers(LabelledFile("rows", tokenizer, tmp_path / "rows.jsonl"))
    right = {tokenizer.decode(request.continuation) for request in labelled.requests("search")}
    assert right == {" good", " bad"} and len(labelled.requests("search")) == 8
    assert labelled.fingerprint("search") != task.fingerprint("search")
