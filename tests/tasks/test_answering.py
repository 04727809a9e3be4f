"""Answers by likelihood and by generation, from one pass over each prompt, against a task's own score and transformers'
`generate`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.answering import answer, tokens_read
from dtr_deploy.tasks.generation import EXTRA_TOKENS
from dtr_deploy.tasks.many_shot import ManyShot
from dtr_deploy.tasks.multi_key import MultiKey
from tests.tasks.reference import TOLERANCE
from tests.tiny import tiny_backbone, tiny_hybrid, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODELS = pytest.mark.parametrize("make", [tiny_backbone, lambda: tiny_hybrid(window=16)], ids=["base", "hybrid"])


@pytest.fixture
def many_shot(tmp_path: Path) -> ManyShot:
    for name in ("train", "validation", "test"):
        rows = [{"text": f"{name} {'x' * (i % 7)} {i}", "label": ("yes", "no")[i % 2]} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ManyShot("shots", TOKENIZER, tmp_path, lengths=(200, 300), items=4)


def multi_key() -> MultiKey:
    return MultiKey("keys", TOKENIZER, lengths=(500, 620), items=2, keys=3)


class Counting:
    """A model that counts the tokens it reads in calls of more than one token."""

    def __init__(self, model: Any) -> None:
        self.model, self.read = model, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def base_model(self, **arguments: Any) -> Any:
        size = arguments["input_ids"].numel()
        self.read += size if size > 1 else 0
        return self.model.base_model(**arguments)


@MODELS
@pytest.mark.parametrize("kind", ["multi_key", "many_shot"])
def test_likelihoods_are_the_tasks_own_score(make: Any, kind: str, many_shot: ManyShot) -> None:
    model, task = make(), many_shot if kind == "many_shot" else multi_key()
    found, expected = answer(task, model, "search").likelihood, task.score(model, "search")
    assert found.per_item.tolist() == expected.per_item.tolist() and found.strata == expected.strata
    assert found.margins == pytest.approx(expected.margins, abs=TOLERANCE)


@MODELS
def test_texts_are_what_transformers_generates(make: Any) -> None:
    model, task = make(), multi_key()
    answers = answer(task, model, "search")
    for request, text in zip(task.requests("search"), answers.texts, strict=True):
        allowed = len(request.continuation) + EXTRA_TOKENS
        ids = torch.tensor([request.context])
        written = model.generate(ids, max_new_tokens=allowed, do_sample=False, attention_mask=torch.ones_like(ids))
        assert text == TOKENIZER.decode(written[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


def test_what_prompts_share_is_read_once(many_shot: ManyShot) -> None:
    model, seen = Counting(tiny_backbone()), []
    answer(many_shot, model, "search", lambda done, tokens: seen.append((done, tokens)))
    contexts = [request.context for request in many_shot.requests("search")][::2]
    assert [done for done, _ in seen] == list(range(1, 9)) and seen[-1][1] == tokens_read(many_shot, "search")
    # Answers of several tokens are read besides, one call an answer.
    answers = sum(len(request.continuation) - 1 for request in many_shot.requests("search"))
    assert model.read <= seen[-1][1] + answers
    # Two lengths, each with its examples read once and four rows of at most 40 bytes.
    assert seen[-1][1] <= 200 + 300 + 8 * 40 < sum(map(len, contexts))


def test_a_line_end_and_the_end_of_text_stop_generation() -> None:
    """A model that is made to write: token 10 of the vocabulary's alphabet, then an end."""
    backbone, task = tiny_backbone(), multi_key()
    newline = TOKENIZER("\n", add_special_tokens=False)["input_ids"][0]
    letter = TOKENIZER("7", add_special_tokens=False)["input_ids"][0]
    for end, text in ((newline, "7"), (TOKENIZER.eos_token_id, "7")):
        writes = iter([token for _ in task.requests("search") for token in (letter, end)])
        model = Scripted(backbone, writes)
        assert answer(task, model, "search").texts == (text,) * 4


class Scripted(Counting):
    """Its output embedding says, when asked for one token at a time, what the script says next."""

    def __init__(self, model: Any, writes: Any) -> None:
        super().__init__(model)
        self.writes = writes

    def get_output_embeddings(self) -> Any:
        def logits(states: torch.Tensor) -> torch.Tensor:
            out = self.model.lm_head(states)
            if len(states) == 1:
                out[0, next(self.writes)] = 1e6
            return out

        return logits


def test_right_answers_score_one_and_others_none() -> None:
    task = multi_key()
    backbone = tiny_backbone()
    scripts = [list(request.continuation) for request in task.requests("search")]
    end = TOKENIZER.eos_token_id
    right = Scripted(backbone, iter([token for script in scripts for token in (*script, end)]))
    assert answer(task, right, "search").generation.per_item.tolist() == [1.0] * 4
    cut = Scripted(backbone, iter([token for script in scripts for token in (*script[:-1], end)]))
    assert answer(task, cut, "search").generation.per_item.tolist() == [0.0] * 4


def test_a_prompt_without_room_for_its_answer_is_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=610))
    with pytest.raises(UsageError, match=r"'keys': a prompt and its answer of \d+ tokens do not fit .* of 610"):
        answer(multi_key(), model, "search")
