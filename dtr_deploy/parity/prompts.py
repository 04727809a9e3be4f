"""The prompts of the parity gate: held-out text cut to the lengths at which serving code goes wrong.

That is one and two tokens, both sides of every chunk, block and window border, a long one, and ragged ones between, so
that batches mix short and long and a prefill is split over several calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BORDERS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Chunk sizes of the kernels, block sizes of vLLM, chunked-prefill budgets."""

LONGEST_SHARE = 0.67
"""At most this share of the token budget goes into the longest prompt."""


def prompt_lengths(count: int, max_length: int, tokens: int, windows: Sequence[int] = (), seed: int = 0) -> list[int]:
    """`count` lengths of 1 to `max_length` tokens, ascending; their sum is at most `tokens` (or `count`, if more).

    The longest one comes first, then the short ones and the borders from small to large, then random ones.
    """
    if count < 1 or max_length < 1:
        raise ValueError(f"count {count} and max_length {max_length} must be at least 1")
    # Every other prompt needs a token at least.
    longest = max(1, min(max_length, int(tokens * LONGEST_SHARE) if count > 1 else tokens, tokens - (count - 1)))
    wanted = [1, 2]
    for border in sorted({*windows, *BORDERS}):
        wanted += [border - 1, border, border + 1]
    lengths, left = [longest], tokens - longest
    for length in dict.fromkeys(wanted):
        if len(lengths) < count and 0 < length < longest and length <= left - (count - len(lengths) - 1):
            lengths.append(length)
            left -= length
    random = np.random.default_rng(seed)
    while len(lengths) < count:
        share = max(1, left // (count - len(lengths)))
        # Log-uniform with mean near the share that is left to each.
        length = int(np.exp(random.uniform(0, np.log(max(2, 2 * share)))))
        length = max(1, min(length, share, longest))
        lengths.append(length)
        left -= length
    return sorted(lengths)


def parity_prompts(
    held_out: Sequence[int], count: int, max_length: int, tokens: int, windows: Sequence[int] = (), seed: int = 0
) -> list[list[int]]:
    """Windows of `held_out` (token ids no stage trained on) at random places, of `prompt_lengths`, shuffled.

    A text shorter than a prompt is repeated. Raises ValueError if it is empty.
    """
    if not len(held_out):
        raise ValueError("no held-out text to cut prompts from")
    lengths = prompt_lengths(count, max_length, tokens, windows, seed)
    text = np.resize(np.asarray(held_out, dtype=np.int64), max(len(held_out), max(lengths)))
    random = np.random.default_rng(seed + 1)
    random.shuffle(lengths)
    starts = [int(random.integers(0, len(text) - length + 1)) for length in lengths]
    return [text[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]
