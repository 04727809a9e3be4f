"""Labelled files: splits, prompts, and scores against a loop over rows and labels."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import SPLITS
from dtr_deploy.tasks.local_file import LabelledFile
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import RequestScores
from tests.tasks.reference import TOLERANCE, sums
from tests.tiny import tiny_backbone, tiny_hybrid, tiny_tokenizer

REVIEWS = Path(__file__).parents[2] / "recipes" / "data" / "reviews"
WORDS = ("dull", "bright", "slow", "sharp", "warm", "cold", "long", "short")


def write(folder: Path, counts: dict[str, int], labels: tuple[str, ...] = ("neg", "pos"), prompt: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for name, count in counts.items():
        rows = [
            {"id": f"{name}-{i}", "text": f"a {WORDS[i % 8]} film {i}", "label": labels[i % len(labels)]}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if prompt:
        (folder / "task.yaml").write_text(prompt)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "films", {"train": 20, "validation": 31, "test": 9})


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("make", [tiny_backbone, tiny_hybrid], ids=["backbone", "hybrid"])
def test_scores_equal_a_loop_over_rows_and_labels(folder: Path, make: object, shots: int) -> None:
    model, tokenizer = make(), tiny_tokenizer()  # type: ignore[operator]
    task = LabelledFile("films", tokenizer, folder, shots=shots, batch_tokens=400)
    score = task.score(model, "search")
    rows = task.rows("search")
    preamble = ""
    if shots:
        # Every prompt starts with the same examples; take them from the first and check the form on their own words.
        text = tokenizer.decode(task.requests("search")[0].context)
        preamble = text[: text.rindex("a ")]
        assert preamble.count("\nLabel: ") == shots and preamble.endswith("\n\n")
        assert task.batches("search")[0].shared > 30
    for row, hit, margin in zip(rows, score.per_item, score.margins, strict=True):
        context = tuple(tokenizer(f"{preamble}{row['text']}\nLabel:")["input_ids"])
        values = sums(model, [Request(context, tuple(tokenizer(f" {label}")["input_ids"])) for label in ("neg", "pos")])
        right = ("neg", "pos").index(row["label"])
        assert hit == (values[right] > values[1 - right])
        assert margin == pytest.approx(values[right] - np.logaddexp(*values), abs=TOLERANCE)


def test_splits_are_disjoint_and_balanced(folder: Path) -> None:
    task = LabelledFile("films", tiny_tokenizer(), folder)
    ids = {split: [row["id"] for row in task.rows(split)] for split in SPLITS}
    assert sorted(ids["search"] + ids["confirm"]) == sorted(f"validation-{i}" for i in range(31))
    assert sorted(ids["test"]) == [f"test-{i}" for i in range(9)]
    for split in SPLITS:
        for start in (4, 8):
            counts = Counter(row["label"] for row in task.rows(split)[:start])
            assert abs(counts["neg"] - counts["pos"]) <= 2


def test_items_takes_the_start_of_a_split(folder: Path) -> None:
    whole = LabelledFile("films", tiny_tokenizer(), folder)
    part = LabelledFile("films", tiny_tokenizer(), folder, items=6)
    assert part.rows("confirm") == whole.rows("confirm")[:6]
    assert len(part.requests("confirm")) == 12
    assert LabelledFile("films", tiny_tokenizer(), folder, items=500).rows("test") == whole.rows("test")


def test_the_seed_decides_everything(folder: Path) -> None:
    def prints(seed: int) -> list[str]:
        task = LabelledFile("films", tiny_tokenizer(), folder, shots=2, seed=seed)
        return [task.fingerprint(split) for split in SPLITS]

    assert prints(0) == prints(0)
    assert not set(prints(0)) & set(prints(1))


def test_a_changed_label_changes_the_fingerprint(folder: Path) -> None:
    before = LabelledFile("films", tiny_tokenizer(), folder).fingerprint("test")
    path = folder / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # Swapping two rows' labels leaves every prompt, and so every token, as it was.
    rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert LabelledFile("films", tiny_tokenizer(), folder).fingerprint("test") != before


def test_the_prompt_file_decides_the_words(tmp_path: Path) -> None:
    prompt = 'template: "Film {id}: {text}."\nanswers: {neg: " bad", pos: " good"}\n'
    folder = write(tmp_path / "films", {"validation": 4, "test": 4}, prompt=prompt)
    tokenizer = tiny_tokenizer()
    request = LabelledFile("films", tokenizer, folder).requests("test")[0]
    text = tokenizer.decode(request.context + request.continuation)
    assert text.startswith("Film test-") and text.endswith(". bad")


def test_a_single_file_is_dealt_out_to_three_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "films", {"all": 24}, labels=("x", "y", "z")) / "all.jsonl"
    task = LabelledFile("films", tiny_tokenizer(), path, shots=3)
    ids = [row["id"] for split in SPLITS for row in task.rows(split)]
    assert len(ids) == len(set(ids)) == 21
    for split in SPLITS:
        counts = Counter(row["label"] for row in task.rows(split))
        assert sorted(counts) == ["x", "y", "z"] and set(counts.values()) <= {2, 3}
    preamble = tiny_tokenizer().decode(task.requests("test")[0].context)
    assert all(preamble.count(f"\nLabel: {label}") == 1 for label in "xyz")
    for row in (row for split in SPLITS for row in task.rows(split)):
        assert row["text"] + "\nLabel: " not in preamble  # no item is an example


def test_the_reviews_come_with_their_prompt() -> None:
    task = LabelledFile("reviews", tiny_tokenizer(), REVIEWS, items=20)
    assert [len(task.rows(split)) for split in SPLITS] == [20, 20, 20]
    assert len(LabelledFile("reviews", tiny_tokenizer(), REVIEWS).rows("search")) == 600
    text = tiny_tokenizer().decode(task.requests("search")[0].context)
    assert text.startswith("Review: ") and text.endswith("\nSentiment:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "test.jsonl").unlink(), r"test\.jsonl: no such file"),
        (lambda f: (f / "test.jsonl").write_text("{}\n"), r"no field 'label'"),
        (lambda f: (f / "test.jsonl").write_text('{"text": "a"\n'), r"test\.jsonl:1: not JSON"),
        (lambda f: (f / "test.jsonl").write_text("\n"), r"test\.jsonl: holds no rows"),
        (lambda f: (f / "task.yaml").write_text("templat: x\n"), r"unknown key 'templat'; known are template"),
        (lambda f: (f / "task.yaml").write_text("answers: {neg: a}\n"), r"no words for the label 'pos'"),
        (lambda f: (f / "task.yaml").write_text("answers: 3\n"), r"answers: must be a mapping"),
        (lambda f: (f / "task.yaml").write_text("a: [\n"), r"task\.yaml: not YAML"),
    ],
)
def test_bad_folders_are_named(folder: Path, change: object, message: str) -> None:
    change(folder)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        LabelledFile("films", tiny_tokenizer(), folder)


def test_bad_options_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no folder or \.jsonl file"):
        LabelledFile("films", tiny_tokenizer(), tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"must have 21 rows or more for 21 shots"):
        LabelledFile("films", tiny_tokenizer(), folder, shots=21)
    with pytest.raises(UsageError, match="metric 'f2' is not known"):
        LabelledFile("films", tiny_tokenizer(), folder, metric="f2")
    (folder / "task.yaml").write_text('template: "{title}"\n')
    with pytest.raises(UsageError, match=r"template: 'title' cannot be filled; a row has id, text, label"):
        LabelledFile("films", tiny_tokenizer(), folder).requests("search")


def test_calibrated_accuracy_does_not_see_a_preference_for_one_label(folder: Path) -> None:
    plain = LabelledFile("films", tiny_tokenizer(), folder)
    calibrated = LabelledFile("films", tiny_tokenizer(), folder, metric="calibrated_accuracy")
    right = np.array([row["label"] == "pos" for row in plain.rows("search")])
    evidence = np.where(right, 1.0, -1.0) * np.where(np.arange(len(right)) % 5 == 4, -0.5, 1.0)  # every fifth is wrong
    for preference in (0.0, 3.0):
        by_label = np.stack([np.zeros_like(evidence), evidence + preference], 1) - 7.0
        scores = RequestScores(by_label.ravel(), np.zeros(by_label.size, bool), np.ones(by_label.size, int))
        wanted = ((evidence > evidence.mean()) == right).astype(float)
        np.testing.assert_array_equal(calibrated.interpret("search", scores).per_item, wanted)
        plain_accuracy = right.mean() if preference else wanted.mean()  # a strong preference answers one label always
        assert plain.interpret("search", scores).mean == pytest.approx(plain_accuracy)
    assert plain.fingerprint("search") != calibrated.fingerprint("search")
