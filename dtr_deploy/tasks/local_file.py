"""Classification of labelled rows in jsonl files, by the log-likelihood of the label words.

A folder holds `validation.jsonl` (its two halves are the search and the confirm split), `test.jsonl`, `train.jsonl`
(for few-shot examples) and, optionally, `task.yaml`:

    template: "Review: {text}\\nSentiment:"     # fields of a row in braces; default "{text}\\nLabel:"
    label: label                               # field with the right label
    answers: {positive: " positive", negative: " negative"}   # label -> what the model should write; default " LABEL"
    separator: "\\n\\n"                          # between few-shot examples

Instead of a folder, one file `NAME.jsonl` (with `NAME.yaml` beside it as its task.yaml): its rows are dealt out to the
three splits, after the few-shot examples.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import SPLITS, Split, TaskScore
from dtr_deploy.tasks.request_task import RequestTask, log_softmax
from dtr_deploy.tasks.requests import Request, encode_pairs
from dtr_deploy.tasks.scoring import BATCH_TOKENS, RequestScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
ACCURACY, CALIBRATED = "accuracy", "calibrated_accuracy"
METRICS = (ACCURACY, CALIBRATED)
_PROMPT_KEYS = ("template", "label", "answers", "separator")


class LabelledFile(RequestTask):
    """Score of an item: 1 if the right label's words are the most likely of all labels' (sum of log-probabilities).

    metric "calibrated_accuracy" first subtracts from each label's log-probability its mean over the split (Batch
    Calibration, Zhou et al., arXiv 2309.17249), which needs no right answers. A prompt's preference for one label says
    nothing of what the model knows of an item, yet it moves plain zero-shot accuracy by more than a layer's swap does.

    Margin: log-probability of the right label among the labels, nats (a proper scoring rule: minus cross-entropy).
    path: a folder or a .jsonl file, see above. Search and confirm are disjoint halves of validation, each with the
    labels in the same proportions; `items` takes the first so many of a split, again in those proportions. The few-shot
    examples are the same for all items. shots None takes all rows there are to take examples from.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        path: str | Path,
        *,
        shots: int | None = 0,
        items: int | None = None,
        metric: str = "accuracy",
        seed: int = 0,
        weight: float = 1.0,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        super().__init__(name, tokenizer, weight, batch_tokens)
        if metric not in METRICS:
            raise UsageError(
                f"task {name!r}: metric {metric!r} is not known for files; use {', '.join((*METRICS, 'exact_match'))}"
            )
        if (shots is not None and shots < 0) or (items is not None and items < 2):
            raise UsageError(f"task {name!r}: shots must be >= 0 and items >= 2, got {shots} and {items}")
        self.path = Path(path)
        if not self.path.exists():
            raise UsageError(f"task {name!r}: file: no folder or .jsonl file {path}")
        self.prompt_path = self.path / "task.yaml" if self.path.is_dir() else self.path.with_suffix(".yaml")
        self.prompt = _read_prompt(self.prompt_path)
        self.metric = metric
        self._rng_seed = f"{name}/{seed}"
        self._items = items
        examples, self._rows = self._deal(shots)
        self.answers = self._read_answers()
        self.labels = sorted(self.answers)
        self._shots = self._written(examples)

    def rows(self, split: Split) -> list[Row]:
        """The rows of a split, in the order of its scores."""
        return self._rows[split][: self._items]

    def make_requests(self, split: Split) -> list[Request]:
        """Row-major: the labels of the first row, in sorted order, then of the next."""
        return self._ask(self.rows(split), self._shots)

    def accepts(self, split: Split, item: int, text: str) -> bool:
        """Whether generated `text` begins with the words of item number `item`'s label."""
        rows = self.rows(split)
        answer = self.answers[self._label(rows[item % len(rows)])].strip()
        return re.match(rf"{re.escape(answer)}(?!\w)", text.strip()) is not None

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """See the class."""
        hits, margins = self._judge(self.rows(split), scores.log_probs.reshape(-1, len(self.labels)))
        return TaskScore(self.name, split, hits, margins)

    def item_strata(self, split: Split) -> Sequence[str]:
        """The label of each row: parts of a split have them in the same proportions."""
        return [self._label(row) for row in self.rows(split)]

    def meaning(self, split: Split) -> list[str]:
        """The metric and the right labels."""
        return [self.metric, *(self._label(row) for row in self.rows(split))]

    def _ask(self, rows: Sequence[Row], shots: Sequence[str]) -> list[Request]:
        """Every label of every row, after the examples."""
        preamble = "".join(shots)
        pairs = [(preamble + self._fill(row), self.answers[label]) for row in rows for label in self.labels]
        return encode_pairs(self.tokenizer, pairs)

    def _judge(self, rows: Sequence[Row], by_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hits and margins [rows] of log-probabilities [rows, labels]."""
        if self.metric == CALIBRATED:
            by_label = by_label - by_label.mean(0)
        right = np.array([self.labels.index(self._label(row)) for row in rows])
        margins = log_softmax(by_label)[np.arange(len(right)), right]
        return (by_label.argmax(1) == right).astype(float), margins

    def _deal(self, shots: int | None) -> tuple[list[Row], dict[str, list[Row]]]:
        """Few-shot examples, and the rows of each split. shots None: all rows of a folder's train.jsonl, or half of a
        single file's."""
        if self.path.is_dir():
            source, least = self.path / "train.jsonl", shots
            examples = self._balanced(_read_rows(source), "train")[:shots] if shots != 0 else []
            halves = self._balanced(_read_rows(self.path / "validation.jsonl"), "validation", hands=2)
            test = self._balanced(_read_rows(self.path / "test.jsonl"), "test")
            splits = {"search": halves[0::2], "confirm": halves[1::2], "test": test}
        else:
            source = self.path
            rows = self._balanced(_read_rows(source), "train")
            shots = len(rows) // 2 if shots is None else shots
            least = shots + len(SPLITS)
            examples, rest = rows[:shots], rows[shots:]
            thirds = self._balanced(rest, "rest", hands=3)
            splits = {"search": thirds[0::3], "confirm": thirds[1::3], "test": thirds[2::3]}
        for split, rows in splits.items():
            if not rows:
                raise UsageError(f"task {self.name!r}: {self.path}: too few rows for the split {split}")
        if shots is not None and len(examples) < shots:
            raise UsageError(f"task {self.name!r}: shots: {source} must have {least} rows or more for {shots} shots")
        return examples, splits

    def _balanced(self, rows: list[Row], purpose: str, hands: int = 1) -> list[Row]:
        """Seeded shuffle; its start, and each of `hands` it is dealt to in turn, has the labels in proportion."""
        by_label: dict[str, list[Row]] = {}
        for row in rows:
            by_label.setdefault(self._label(row), []).append(row)
        placed: list[tuple[float, int, Row]] = []
        for group, label in enumerate(sorted(by_label)):
            members = by_label[label]
            random.Random(f"{self._rng_seed}/{purpose}/{label}").shuffle(members)
            # As many rows of a label as there are hands stand together, so that each hand gets one of them.
            placed += [((rank // hands + 0.5) / len(members), group, row) for rank, row in enumerate(members)]
        return [row for _, _, row in sorted(placed, key=lambda entry: entry[:2])]

    def _read_answers(self) -> dict[str, str]:
        labels = {self._label(row) for rows in self._rows.values() for row in rows}
        if self.prompt["answers"] is None:
            return {label: f" {label}" for label in labels}
        answers = {str(label): str(answer) for label, answer in self.prompt["answers"].items()}
        if unknown := sorted(labels - set(answers)):
            raise UsageError(f"{self.prompt_path}: answers: no words for the label {unknown[0]!r}")
        return answers

    def _written(self, examples: Sequence[Row]) -> list[str]:
        """Each example as it stands in a prompt, in a random order."""
        shuffled = random.Random(f"{self._rng_seed}/order").sample(list(examples), len(examples))
        for row in shuffled:
            if self._label(row) not in self.answers:
                raise UsageError(f"{self.path}: an example's label {self._label(row)!r} is in no other row")
        return [self._fill(row) + self.answers[self._label(row)] + self.prompt["separator"] for row in shuffled]

    def _fill(self, row: Row) -> str:
        try:
            return self.prompt["template"].format_map(row)
        except (KeyError, IndexError, ValueError) as error:
            raise UsageError(
                f"{self.prompt_path}: template: {error} cannot be filled; a row has {', '.join(row)}"
            ) from error

    def _label(self, row: Row) -> str:
        field = self.prompt["label"]
        if field not in row:
            raise UsageError(f"{self.path}: a row has no field {field!r} (the label); it has {', '.join(row)}")
        return str(row[field])


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file (a labelled folder holds train, validation and test .jsonl)")
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}:{number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UsageError(f"{path}:{number}: must be a JSON object, one a line")
            rows.append(row)
    if not rows:
        raise UsageError(f"{path}: holds no rows")
    return rows


def _read_prompt(path: Path) -> dict[str, Any]:
    prompt: dict[str, Any] = {"template": "{text}\nLabel:", "label": "label", "answers": None, "separator": "\n\n"}
    if not path.exists():
        return prompt
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(given, dict):
        raise UsageError(f"{path}: must hold keys {', '.join(_PROMPT_KEYS)}")
    for key, value in given.items():
        if key not in _PROMPT_KEYS:
            raise UsageError(f"{path}: unknown key {key!r}; known are {', '.join(_PROMPT_KEYS)}")
        kind = dict if key == "answers" else str
        if not isinstance(value, kind):
            raise UsageError(f"{path}: {key}: must be {'a mapping from label to words' if kind is dict else 'a text'}")
    return prompt | given
