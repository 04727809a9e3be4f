"""The unit of likelihood scoring: the tokens of a context and of the continuation whose log-probability is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """log p(continuation | context), both as token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise ValueError("a request needs at least one token of context and one of continuation")

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens a model has to read: the last one of the continuation is predicted only."""
        return self.context + self.continuation[:-1]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> list[Request]:
    """Requests for `(context, continuation)` texts, with the tokens that a user's whole text would have.

    The joined text is tokenised and cut after the context's tokens. Trailing spaces of a context go to the
    continuation, since most vocabularies hold " word" as one token (both as in lm-evaluation-harness). Where the
    tokenizer merges across the border or appends tokens of its own, the two parts are tokenised apart.
    """
    if not pairs:
        return []
    trimmed = [(context.rstrip(" "), context[len(context.rstrip(" ")) :] + answer) for context, answer in pairs]
    contexts = _encode(tokenizer, [context for context, _ in trimmed])
    wholes = _encode(tokenizer, [context + answer for context, answer in trimmed])
    requests = []
    for (_, answer), context, whole in zip(trimmed, contexts, wholes, strict=True):
        if whole[: len(context)] == context and len(whole) > len(context):
            continuation = whole[len(context) :]
        else:
            continuation = tokenizer(answer, add_special_tokens=False)["input_ids"]
        requests.append(Request(tuple(context), tuple(continuation)))
    return requests


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Contexts repeat over the answers: each text is tokenised once. Whether it fits is the scorer's business.
    distinct = list(dict.fromkeys(texts))
    encoded = tokenizer(distinct, verbose=False)["input_ids"]
    table = dict(zip(distinct, encoded, strict=True))
    return [table[text] for text in texts]
