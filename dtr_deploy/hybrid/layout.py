"""A layout says, for each layer, what replaces its attention: an entry, or None for full attention.

An entry is a form's name, "gla", or "FORM@WINDOW", "gla@256", where the layer's softmax window differs from the one
that holds for the rest. Whoever handles whole layouts treats entries as names; `parse_entry` takes them apart.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dtr_deploy.errors import UsageError

Layout = tuple[str | None, ...]

FULL, LINEAR = "full_attention", "linear_attention"
LARGEST_WINDOW = 4096
ENTRY = re.compile(r"(?P<form>[^@]+)(@(?P<window>0|[1-9]\d*))?")


class Entry(NamedTuple):
    """A form and the tokens of its softmax branch, 0 for none."""

    form: str
    window: int


def parse_entry(entry: str, window: int) -> Entry:
    """ "gla" -> (gla, `window`), "gla@256" -> (gla, 256). Whether the form exists is for `make_form` to say.

    Raises UsageError, one line, for anything else and for named windows above `LARGEST_WINDOW`.
    """
    found = ENTRY.fullmatch(entry)
    named = int(found["window"]) if found and found["window"] else None
    if found is None or (named or 0) > LARGEST_WINDOW:
        raise UsageError(
            f"{entry!r} is no entry of a layout: accepted are FORM and FORM@WINDOW with 0 to {LARGEST_WINDOW} tokens"
        )
    return Entry(found["form"], window if named is None else named)


def format_entry(form: str, own: int, window: int) -> str:
    """The entry of a layer whose window is `own`, among layers with `window`: the inverse of `parse_entry`."""
    return form if own == window else f"{form}@{own}"


def entries(layout: Iterable[str | None], window: int) -> tuple[Entry | None, ...]:
    """Form and window of each layer, None for full attention. window: of entries that name none."""
    return tuple(None if entry is None else parse_entry(entry, window) for entry in layout)


def windows(layout: Iterable[str | None], window: int) -> tuple[int, ...]:
    """The windows in use, ascending, 0 left out."""
    return tuple(sorted({entry.window for entry in entries(layout, window) if entry is not None} - {0}))


def full(layers: int) -> Layout:
    """The unreplaced backbone."""
    return (None,) * layers


def swap(layout: Layout, layer: int, form: str | None) -> Layout:
    """`layout` with one layer changed."""
    if not 0 <= layer < len(layout):
        raise UsageError(f"layer {layer} is out of range: the model has layers 0 to {len(layout) - 1}")
    return (*layout[:layer], form, *layout[layer + 1 :])


def replaced(layout: Iterable[str | None]) -> int:
    """Number of layers that are not full attention."""
    return sum(form is not None for form in layout)


def counts(layout: Iterable[str | None]) -> dict[str, int]:
    """Layers per entry, full attention left out, in the order of names."""
    return dict(sorted(Counter(form for form in layout if form is not None).items()))


def layer_types(layout: Iterable[str | None]) -> list[str]:
    """transformers' `layer_types` of a layout."""
    return [FULL if form is None else LINEAR for form in layout]


def describe(layout: Sequence[str | None]) -> str:
    """One line for people: '20 of 30 linear (gated_deltanet 20), full attention in 0, 3-5, 18'."""
    forms = ", ".join(f"{form} {n}" for form, n in counts(layout).items())
    kept = [i for i, form in enumerate(layout) if form is None]
    return (
        f"{replaced(layout)} of {len(layout)} linear"
        + (f" ({forms})" if forms else "")
        + f", full attention in {ranges(kept) or 'none'}"
    )


def ranges(numbers: Sequence[int]) -> str:
    """[0, 3, 4, 5, 18] -> '0, 3-5, 18'."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
