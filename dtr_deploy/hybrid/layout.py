"""A layout says, for each layer, which form replaces its attention; None is full attention."""

from collections import Counter
from collections.abc import Iterable, Sequence

from dtr_deploy.errors import UsageError

Layout = tuple[str | None, ...]

FULL, LINEAR = "full_attention", "linear_attention"


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
    """Layers per form, full attention left out, in the order of names."""
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
