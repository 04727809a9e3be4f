"""The prompts of the gate: which lengths, within which budget, from which text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_deploy.parity.prompts import parity_prompts, prompt_lengths


@given(
    count=st.integers(1, 100),
    max_length=st.integers(1, 9000),
    tokens=st.integers(1, 60_000),
    window=st.sampled_from([0, 8, 64]),
)
def test_lengths_keep_the_budget(count: int, max_length: int, tokens: int, window: int) -> None:
    lengths = prompt_lengths(count, max_length, tokens, [window] if window else [])
    assert len(lengths) == count and lengths == sorted(lengths)
    assert lengths[0] >= 1 and lengths[-1] <= max_length
    assert sum(lengths) <= max(tokens, count)


def test_the_default_gate_has_a_long_prompt_and_both_sides_of_every_border() -> None:
    lengths = prompt_lengths(64, 8000, 48_000, windows=[64])
    assert lengths[-1] == 8000
    assert {1, 2} <= set(lengths)
    for border in (64, 128, 256, 512, 1024, 2048, 4096):
        assert {border - 1, border, border + 1} <= set(lengths)


def test_a_small_budget_still_reaches_far_and_short() -> None:
    lengths = prompt_lengths(16, 8000, 4000)
    assert lengths[-1] == 2680 and {1, 2, 63, 64, 65} <= set(lengths)


def test_prompts_are_cut_from_the_text() -> None:
    text = list(range(10_000, 20_000))
    prompts = parity_prompts(text, 20, 3000, 9000, windows=[64])
    assert sorted(len(prompt) for prompt in prompts) == prompt_lengths(20, 3000, 9000, [64])
    for prompt in prompts:
        assert prompt == text[prompt[0] - 10_000 :][: len(prompt)]
    assert prompts == parity_prompts(text, 20, 3000, 9000, windows=[64])
    assert prompts != parity_prompts(text, 20, 3000, 9000, windows=[64], seed=1)
    assert [len(prompt) for prompt in prompts] != sorted(len(prompt) for prompt in prompts)


def test_a_short_text_is_repeated_and_an_empty_one_refused() -> None:
    (prompt,) = parity_prompts([1, 2, 3], 1, 7, 7)
    assert prompt in ([1, 2, 3, 1, 2, 3, 1], [2, 3, 1, 2, 3, 1, 2], [3, 1, 2, 3, 1, 2, 3])
    with pytest.raises(ValueError, match="no held-out text"):
        parity_prompts([], 1, 7, 7)
