"""Many-shot classification: prompts filled to a length, the same rows at each, and scores equal to single forwards."""

import json
from pathlib import Path

import numpy as np
import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import SPLITS
from dtr_deploy.tasks.many_shot import ManyShot
from tests.tasks.reference import TOLERANCE, sums
from tests.tiny import tiny_hybrid, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LENGTHS = (200, 400)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train", "validation", "test"):
        rows = [{"text": f"{name} {'x' * (i % 7)} {i}", "label": "ab"[i % 2]} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_prompts_are_filled_with_the_same_examples_for_the_same_rows(folder: Path) -> None:
    task = ManyShot("t", TOKENIZER, folder, lengths=LENGTHS, items=4)
    for split in SPLITS:
        requests = task.requests(split)
        assert len(requests) == len(LENGTHS) * 4 * 2
        texts = [TOKENIZER.decode(request.context) for request in requests]
        short, long = texts[:8], texts[8:]
        counts = task.shots(split)
        assert [text.count("train ") for text in texts] == [counts[200]] * 8 + [counts[400]] * 8
        assert [text.split("\n\n")[-1] for text in short] == [text.split("\n\n")[-1] for text in long]
        prefix = short[0].rsplit("\n\n", 1)[0]
        assert all(text.startswith(prefix) for text in texts)
        for length, part in zip(LENGTHS, (requests[:8], requests[8:]), strict=True):
            sizes = [len(request.context) + len(request.continuation) for request in part]
            assert length - 40 < max(sizes) <= length  # an example has at most 31 bytes, and bytes are tokens
    rows = {task.requests(split)[0].context[-20:] for split in SPLITS}
    assert len(rows) == 3


def test_scores_equal_one_forward_an_answer(folder: Path) -> None:
    model, task = tiny_hybrid(window=16), ManyShot("t", TOKENIZER, folder, lengths=LENGTHS, items=4)
    score = task.score(model, "confirm")
    totals = np.array(sums(model, task.requests("confirm"))).reshape(8, 2)
    right = [task.labels.index(row["label"]) for row in task.rows("confirm")] * 2
    assert score.per_item.tolist() == [
        float(total.argmax() == label) for total, label in zip(totals, right, strict=True)
    ]
    margins = [total[label] - np.logaddexp.reduce(total) for total, label in zip(totals, right, strict=True)]
    assert score.margins == pytest.approx(margins, abs=TOLERANCE)
    assert score.strata == ("200",) * 4 + ("400",) * 4


def test_calibration_is_of_each_length_alone(folder: Path) -> None:
    model, task = (
        tiny_hybrid(window=16),
        ManyShot("t", TOKENIZER, folder, lengths=LENGTHS, items=4, metric="calibrated_accuracy"),
    )
    totals = np.array(sums(model, task.requests("search"))).reshape(2, 4, 2)
    centred = (totals - totals.mean(1, keepdims=True)).reshape(8, 2)
    right = [task.labels.index(row["label"]) for row in task.rows("search")] * 2
    expected = [float(total.argmax() == label) for total, label in zip(centred, right, strict=True)]
    assert task.score(model, "search").per_item.tolist() == expected


def test_generated_text_has_to_begin_with_the_label(folder: Path) -> None:
    task = ManyShot("t", TOKENIZER, folder, lengths=LENGTHS, items=4)
    label = task.rows("search")[1]["label"]
    for item in (1, 5):  # the same row at both lengths
        assert task.accepts("search", item, f" {label}") and task.accepts("search", item, f" {label}. Text")
        assert not task.accepts("search", item, f" {label}{label}") and not task.accepts("search", item, "")


def test_a_single_file_gives_half_of_its_rows_as_examples(folder: Path) -> None:
    task = ManyShot("t", TOKENIZER, folder / "train.jsonl", lengths=[200], items=4)
    examples = set(TOKENIZER.decode(task.requests("search")[0].context).split("\n\n")[:-1])
    rows = {row["text"] for split in SPLITS for row in task.rows(split)}
    assert examples and not any(row in example for row in rows for example in examples)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (20, r"'t': lengths: 20 tokens cannot hold an example and the longest row, use \d+ or more"),
        (9000, r"'t': lengths: 9000 tokens take more examples than .* has \(60 examples, \d+ tokens\)"),
    ],
)
def test_impossible_lengths_are_refused(folder: Path, length: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ManyShot("t", TOKENIZER, folder, lengths=[length], items=4).requests("search")
