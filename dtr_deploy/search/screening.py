"""What single swaps are ranked on: little, since every swap of every layer and form is run on all of it.

The sizes are what a ranking takes. Divergence from the teacher is compared on the same tokens, which makes 2,000 of
them enough; a swap that breaks recall loses nats of the needle's log-probability on every single prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import Task
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.needle import Needle

SEQUENCES = 4
"""Held-out sequences that divergence is read on. Four of 512 tokens: as long as one of the needles, times two."""
NEEDLES = 4
NEEDLE_LENGTH = 1024
"""Tokens of a needle prompt when the recipe's tasks do not name a length: long beyond any window, short to run."""


def screening_text(held_out: Tensor, sequences: int = SEQUENCES) -> Divergence:
    """The first `sequences` of held_out, token ids [N, T]. Raises `UsageError` if there are none."""
    if held_out.shape[0] == 0:
        raise UsageError("corpus: no text is left to compare layers on; add text")
    return Divergence(held_out[:sequences])


def screening_recall(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int, needles: int = NEEDLES
) -> list[Task]:
    """A short needle task: at the shortest length of the recipe's needle tasks, or `NEEDLE_LENGTH` if it has none.

    Recall is screened whether or not the recipe scores it: a layer that carries it is hidden from perplexity, and
    what is lost first shows last. Its numbers and depths are not those of the recipe's own needles. `max_length`: the
    model's context in tokens.
    """
    lengths = [length for task in tasks if isinstance(task, Needle) for length in task.lengths]
    length = min(lengths, default=min(NEEDLE_LENGTH, max_length))
    return [Needle("recall", tokenizer, lengths=(length,), items=needles, seed=seed + 1)]
