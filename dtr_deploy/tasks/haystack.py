"""Base of the synthetic recall tasks: facts hidden in filler text, and a question about one of them at the end.

The conventions are RULER's (Hsieh et al., arXiv 2404.06654, github.com/NVIDIA/RULER): prompts filled to a length in
tokens, facts at spread depths, a question after the text and the beginning of its answer already written, exact match.
Filler is RULER's repeated sentences or, since repetition is easy to skip, real prose, as in RULER's essays and in
BABILong (Kuratov et al., arXiv 2406.10149).
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import SPLITS, Split, TaskScore
from dtr_deploy.tasks.corpus import load_corpus
from dtr_deploy.tasks.request_task import RequestTask
from dtr_deploy.tasks.requests import Request, encode_pairs
from dtr_deploy.tasks.scoring import BATCH_TOKENS, RequestScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
DEFAULT_LENGTHS = (1024, 2048)
DEFAULT_ITEMS = 16

# Prose comes in pieces of at most this many words: the steps in which a prompt is fitted to its length.
_PIECE_WORDS = 16
# Words are common nouns, so that a key is a token or two and says nothing about its number.
_NOUNS = """
apple river stone table window garden candle forest mountain bridge pencil basket horse tiger piano violin castle island
ocean desert lemon pepper silver copper rocket planet mirror ladder hammer blanket button carpet dragon feather guitar
helmet jacket kettle lantern magnet needle orange pillow rabbit saddle tunnel turtle valley wagon whistle anchor bottle
camera dinner engine flower hotel ladle market
"""
WORDS = tuple(_NOUNS.split())


@dataclass(frozen=True)
class Puzzle:
    """facts: (depth in 0 .. 1, text) in the order of their depths; question and answer follow the whole text."""

    facts: tuple[tuple[float, str], ...]
    question: str
    answer: str


class Haystack(RequestTask):
    """`items` prompts at each of `lengths`, `confirm_items` (None: as many) on the splits that are scored only a few
    times, confirm and test; every split has its own facts and depths.

    Score of an item: 1 if each token of the answer is the argmax given those before it (so greedy decoding would write
    it), else 0. Margin: mean log-probability of the answer's tokens, nats a token. Strata: the lengths.

    A prompt with its answer holds at most `length` tokens, and fewer than one sentence of filler less. The depths of
    what is asked are spread evenly with jitter, so that few items still cover the whole haystack.

    filler: None for five sentences over and over, or a text to take prose from: whatever `load_corpus` takes (a .txt,
        .md, .jsonl or .parquet file, a folder of such, `pydoc`). Each item begins at another place of it.
    Raises `UsageError` naming the task and the key; a length that cannot hold the facts is found when prompts are made.
    """

    kind: str
    """The recipe's name for it."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lengths: Sequence[int] = DEFAULT_LENGTHS,
        items: int = DEFAULT_ITEMS,
        confirm_items: int | None = None,
        filler: str | None = None,
        seed: int = 0,
        weight: float = 1.0,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        super().__init__(name, tokenizer, weight, batch_tokens)
        if items < 1 or (confirm_items is not None and confirm_items < 1) or not lengths:
            raise UsageError(
                f"task {name!r}: needs items >= 1, confirm_items >= 1 and at least one length, "
                f"got {items}, {confirm_items} and {list(lengths)}"
            )
        self.lengths = tuple(lengths)
        later = items if confirm_items is None else confirm_items
        self.items: dict[Split, int] = {"search": items, "confirm": later, "test": later}
        self.filler = filler
        self.seed = seed

    @abstractmethod
    def pose(self, rng: random.Random, depth: float) -> Puzzle:
        """One item; what is asked lies at `depth` (0 .. 1)."""

    def accepts(self, split: Split, item: int, text: str) -> bool:
        """Whether generated `text` answers item number `item`: its first word or number is the answer."""
        found = re.search(r"\w+", text)
        answer = self.tokenizer.decode(self.requests(split)[item].continuation)
        return found is not None and found.group() == answer.strip()

    def make_requests(self, split: Split) -> list[Request]:
        """Length-major: all items of the first length, then of the next."""
        prose = self._prose(split)
        requests = []
        for length in self.lengths:
            rng = random.Random(f"{self.kind}/{self.seed}/{split}/{length}")
            for item in range(self.items[split]):
                puzzle = self.pose(rng, (item + rng.random()) / self.items[split])
                first = rng.randrange(len(prose)) if self.filler else 0
                requests.append(self._fit(length, puzzle, [*prose[first:], *prose[:first]]))
        return requests

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """See the class."""
        strata = tuple(str(length) for length in self.lengths for _ in range(self.items[split]))
        return TaskScore(self.name, split, scores.greedy.astype(float), scores.log_probs / scores.lengths, strata)

    def _prose(self, split: Split) -> list[str]:
        """Pieces of filler, as many as the longest prompt needs or a cycle of them."""
        if self.filler is None:
            return list(FILLER)
        longest = max(self.lengths)
        try:
            # A seed of its own for each split: documents come in another order. Twice what one prompt takes, so that
            # prompts that begin at different places differ.
            seed = len(SPLITS) * self.seed + SPLITS.index(split)
            corpus = load_corpus([self.filler], self.tokenizer, tokens=2 * longest, sequence_length=longest, seed=seed)
        except UsageError as error:
            raise UsageError(f"task {self.name!r}: filler: {error}") from None
        return pieces("\n".join(self.tokenizer.batch_decode(corpus.train.tolist(), skip_special_tokens=True)))

    def _fit(self, length: int, puzzle: Puzzle, prose: Sequence[str]) -> Request:
        """The longest prompt of at most `length` tokens, answer included."""
        cycle = len(FILLER)
        tokens = {count: self._encode(count, puzzle, prose) for count in (0, cycle, 2 * cycle)}
        size = {count: len(request.inputs) + 1 for count, request in tokens.items()}
        if size[0] > length:
            raise UsageError(
                f"task {self.name!r}: lengths: {length} tokens cannot hold a {self.kind}, use {size[0]} or more"
            )
        per_cycle = size[2 * cycle] - size[cycle]
        count = max(0, (length - size[0]) * cycle // per_cycle)
        request = self._encode(count, puzzle, prose)
        # The estimate is off by what tokens differ between sentences and at the borders: walk to the exact count.
        while (excess := len(request.inputs) + 1 - length) > 0:
            count -= max(1, excess * count // (2 * length))
            request = self._encode(count, puzzle, prose)
        while len((longer := self._encode(count + 1, puzzle, prose)).inputs) + 1 <= length:
            count, request = count + 1, longer
        return request

    def _encode(self, count: int, puzzle: Puzzle, prose: Sequence[str]) -> Request:
        sentences = [prose[index % len(prose)] for index in range(count)]
        text, placed = "", 0
        for depth, fact in puzzle.facts:
            before = int(depth * (count + 1))
            text += " ".join(sentences[placed:before]) + fact
            placed = before
        prompt = text + " ".join(sentences[placed:]) + puzzle.question
        return encode_pairs(self.tokenizer, [(prompt, f" {puzzle.answer}")])[0]


def pieces(text: str) -> list[str]:
    """Sentences and lines of `text`; long ones in parts of at most 16 words."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        words = sentence.split()
        found += [" ".join(words[start : start + _PIECE_WORDS]) for start in range(0, len(words), _PIECE_WORDS)]
    return found


def mean_by_length(score: TaskScore) -> dict[int, float]:
    """Exact match at each length of a recall task's score."""
    return {int(length): mean for length, mean in score.by_stratum().items()}


def mean_margin_by_length(score: TaskScore) -> dict[int, float]:
    """Mean margin (nats a token) at each length of a recall task's score."""
    names = np.asarray(score.strata)
    return {int(length): float(score.margins[names == length].mean()) for length in dict.fromkeys(score.strata)}
