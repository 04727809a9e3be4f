"""Recall among distractors and in steps: what is in a prompt, what is asked, and what counts as an answer."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import SPLITS
from dtr_deploy.tasks.haystack import FILLER, Haystack, pieces
from dtr_deploy.tasks.multi_key import MultiKey
from dtr_deploy.tasks.needle import Needle
from dtr_deploy.tasks.scoring import RequestScores
from dtr_deploy.tasks.variable_tracking import EXAMPLES, VariableTracking
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ALL: dict[str, type[Haystack]] = {"needle": Needle, "multi_key": MultiKey, "variable_tracking": VariableTracking}
LENGTH = 2400


def texts(task: Haystack, split: Any = "search") -> list[tuple[str, str]]:
    """(prompt, answer) of each item."""
    return [(TOKENIZER.decode(r.context), TOKENIZER.decode(r.continuation)) for r in task.requests(split)]


@pytest.mark.parametrize("kind", ALL)
def test_prompts_fill_their_length_and_splits_differ(kind: str) -> None:
    task = ALL[kind]("t", TOKENIZER, lengths=[LENGTH], items=4)
    step = max(len(sentence) for sentence in FILLER) + 1  # bytes are tokens here
    for split in SPLITS:
        for request in task.requests(split):
            assert LENGTH - step <= len(request.context) + len(request.continuation) <= LENGTH
    assert len({request.context for split in SPLITS for request in task.requests(split)}) == 12
    again = ALL[kind]("t", TOKENIZER, lengths=[LENGTH], items=4)
    assert [again.fingerprint(split) for split in SPLITS] == [task.fingerprint(split) for split in SPLITS]
    other = ALL[kind]("t", TOKENIZER, lengths=[LENGTH], items=4, seed=1)
    assert not set(other.requests("search")) & set(task.requests("search"))


def test_multi_key_hides_every_key_once_and_asks_one() -> None:
    depths = []
    for text, answer in texts(MultiKey("t", TOKENIZER, lengths=[LENGTH], items=8, keys=5)):
        facts = dict(re.findall(r"special magic number of (\w+) is (\d{7})\. Remember", text))
        assert len(facts) == 5 and len(set(facts.values())) == 5
        asked = re.search(r"Question: What is the special magic number of (\w+)\?\n.* of (\w+) is$", text)
        assert asked is not None and asked[1] == asked[2] and answer == f" {facts[asked[1]]}"
        depths.append(text.index(facts[asked[1]]) / len(text))
    assert depths == sorted(depths) and depths[0] < 0.25 and depths[-1] > 0.7


def follow(statements: str, name: str) -> str:
    """The value of `name`, by following the assignments."""
    said = dict(re.findall(r"The magic number of (\w+) is (\d+|the magic number of \w+)\.", statements))
    while not said[name].isdigit():
        name = said[name].split()[-1]
    return said[name]


@pytest.mark.parametrize("hops", [1, 2])
def test_chains_lead_to_the_answer_and_examples_are_right(hops: int) -> None:
    task = VariableTracking("t", TOKENIZER, lengths=[LENGTH], items=6, keys=3, hops=hops)
    for text, answer in texts(task):
        questions = re.findall(r"Question: What is the magic number of (\w+)\?\nAnswer: .* is ?(\d*)", text)
        assert len(questions) == EXAMPLES + 1
        for name, value in questions[:-1]:
            assert value == follow(text, name)
        assert answer == f" {follow(text, questions[-1][0])}"
        # Assignments of the haystack stand in order: a name is used after it got its value.
        haystack = text.split("\n\n", EXAMPLES)[EXAMPLES]
        values = re.findall(r"The magic number of \w+ is \d+\.", haystack)
        assigned = re.findall(r"The magic number of (\w+) is the magic number of (\w+)\.", haystack)
        assert len(values) == 3 and len(assigned) == 3 * hops
        for name, source in assigned:
            assert haystack.index(f"of {source} is") < haystack.index(f"of {name} is")


def test_prose_fills_the_prompt_in_place_of_the_sentences(tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text("\n".join(f"Line {n} of a long book says {n * n}." for n in range(800)))
    task = MultiKey("t", TOKENIZER, lengths=[LENGTH], items=3, filler=str(source))
    starts = set()
    for text, _ in texts(task):
        lines = re.findall(r"Line (\d+) of a long book says (\d+)\.", text)
        assert len(lines) > 30 and all(int(n) ** 2 == int(square) for n, square in lines)
        assert not any(sentence in text for sentence in FILLER)
        starts.add(lines[0])
    assert len(starts) == 3
    for request in task.requests("search"):
        assert LENGTH - 40 <= len(request.context) + len(request.continuation) <= LENGTH
    again = MultiKey("t", TOKENIZER, lengths=[LENGTH], items=3, filler=str(source))
    assert again.fingerprint("search") == task.fingerprint("search")
    assert task.fingerprint("search") != task.fingerprint("test")


def test_splits_that_are_scored_rarely_may_have_more_items() -> None:
    few = MultiKey("t", TOKENIZER, lengths=[LENGTH, 2 * LENGTH], items=2)
    more = MultiKey("t", TOKENIZER, lengths=[LENGTH, 2 * LENGTH], items=2, confirm_items=5)
    assert more.fingerprint("search") == few.fingerprint("search")
    for split in ("confirm", "test"):
        assert len(few.requests(split)) == 4 and len(more.requests(split)) == 10
        count = RequestScores(np.zeros(10), np.ones(10, dtype=bool), np.ones(10, dtype=int))
        assert more.interpret(split, count).by_stratum() == {str(LENGTH): 1.0, str(2 * LENGTH): 1.0}


def test_pieces_are_sentences_and_no_longer_than_said() -> None:
    assert pieces("One. Two three!\nFour") == ["One.", "Two three!", "Four"]
    assert [len(piece.split()) for piece in pieces("word " * 35)] == [16, 16, 3]


def test_generated_text_is_judged_by_its_first_word() -> None:
    task = MultiKey("t", TOKENIZER, lengths=[LENGTH], items=1)
    number = texts(task)[0][1].strip()
    for text, right in [(f" {number}.", True), (f" {number}", True), (f" {number}1", False), (f" not {number}", False)]:
        assert task.accepts("search", 0, text) is right
    assert not task.accepts("search", 0, "") and not task.accepts("search", 0, f" {number[:-1]}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiKey("t", TOKENIZER, keys=1), "'t': keys: accepted are 2 to"),
        (lambda: MultiKey("t", TOKENIZER, confirm_items=0), r"'t': needs items >= 1, confirm_items >= 1"),
        (lambda: VariableTracking("t", TOKENIZER, keys=1), r"keys, hops: accepted are 2 chains"),
        (lambda: VariableTracking("t", TOKENIZER, hops=40), r"keys, hops: .* at most \d+; got 4 and 40"),
        (
            lambda: MultiKey("t", TOKENIZER, lengths=[200]).requests("search"),
            r"200 tokens cannot hold a multi_key, use",
        ),
        (lambda: Needle("t", TOKENIZER, filler="no.txt").requests("search"), "'t': filler: .*no file or folder no.txt"),
    ],
)
def test_mistakes_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_filler_that_is_too_short_says_so(tmp_path: Path) -> None:
    source = tmp_path / "note.txt"
    source.write_text("Too short.\n")
    with pytest.raises(UsageError, match=r"'t': filler: .*too few"):
        Needle("t", TOKENIZER, lengths=[LENGTH], filler=str(source)).requests("search")
