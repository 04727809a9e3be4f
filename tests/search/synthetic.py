"""Scorers and costs with a known answer: each swap has a planted harm, the score falls with the sum.

`PlantedEvaluator` and `NoisyEvaluator` know the answer; `SyntheticScorer` makes a `LayoutScorer` of either: it deals
items into parts, remembers in the ledger, and counts layer-forwards as a scorer does that runs shared beginnings once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.hybrid.layout import Layout, full, replaced
from dtr_deploy.search.ledger import Ledger, Trial, TrialKey, TrialResult
from dtr_deploy.search.objective import Estimate, LayoutScore, Screening
from dtr_deploy.search.problem import Candidate
from dtr_deploy.tasks.base import TaskScore
from dtr_deploy.throughput.measure import Comparison
from dtr_deploy.throughput.performance import Performance

WORKLOAD = Workload(4096, 512)


class Truth(Protocol):
    """Knows the answer: scores of all items of a split, and a screening of `screen_rows` sequences."""

    layers: int
    candidates: Sequence[Candidate]
    weights: tuple[float, ...]
    screen_rows: int

    def score(self, layout: Layout, split: str) -> list[TaskScore]: ...

    def screen(self, layout: Layout) -> Screening: ...


def swaps(layout: Layout) -> list[Candidate]:
    return [Candidate(layer, form) for layer, form in enumerate(layout) if form is not None]


class PlantedEvaluator:
    """Two tasks. `harm[candidate]` = (items lost of "labels", items lost of "recall") when that layer is replaced
    alone.

    Losses of layers add, item by item: the first so many items turn from 1 to 0. `seen[candidate]` is what screening
    shows (kl, recall margin lost); by default the true harm.
    """

    weights = (1.0, 1.0)
    screen_rows = 100

    def __init__(
        self,
        layers: int,
        harm: Mapping[tuple[int, str], tuple[int, int]],
        items: int = 1000,
        seen: Mapping[tuple[int, str], tuple[float, float]] | None = None,
        confirm_factor: float = 1.0,
        test_factor: float = 1.0,
        interaction: Callable[[Layout], int] | None = None,
    ) -> None:
        self.layers, self.items = layers, items
        self.factor = {"search": 1.0, "confirm": confirm_factor, "test": test_factor}
        self.harm = {Candidate(*key): value for key, value in harm.items()}
        self.seen = {Candidate(*key): value for key, value in (seen or {}).items()}
        self.interaction = interaction
        self.candidates: Sequence[Candidate] = list(self.harm)

    def score(self, layout: Layout, split: str) -> list[TaskScore]:
        lost = np.sum([self.harm[c] for c in swaps(layout)], axis=0) if replaced(layout) else np.zeros(2)
        if self.interaction is not None:
            lost = lost + self.interaction(layout)
        lost = lost * self.factor[split]
        return [self._task(name, split, int(n)) for name, n in zip(("labels", "recall"), lost, strict=True)]

    def screen(self, layout: Layout) -> Screening:
        shown = [self.seen.get(c, (self.harm[c][0] / self.items, self.harm[c][1] / self.items)) for c in swaps(layout)]
        kl, margin = np.sum(shown, axis=0) if shown else (0.0, 0.0)
        return Screening(layout, float(kl), 10.0 + float(kl), {"recall": -1.0 - float(margin)})

    def _task(self, name: str, split: str, lost: int) -> TaskScore:
        lost = min(max(lost, 0), self.items)
        items = np.ones(self.items)
        items[:lost] = 0
        return TaskScore(name, split, items, items - 1.0 - lost / 7)


class NoisyEvaluator:
    """One task as real ones behave: items of every difficulty, layouts that disagree on items by chance.

    A layout's harm is the sum of its swaps' harms and of an interaction between each pair of replaced neighbours. Item
    i is right if `ease_i - sensitivity_i * harm + jitter(layout, i) > 0`, so `true_score` is an expectation that can be
    computed on as many items as one likes. Screening shows the harm with an error of its own.
    """

    weights = (1.0,)

    def __init__(
        self,
        seed: int,
        layers: int = 30,
        forms: Sequence[str] = ("gated_deltanet", "gla"),
        items: int = 128,
        screen_rows: int = 14,
        scale: float = 0.06,
        interaction: float = 0.03,
        jitter: float = 0.3,
        screen_error: float = 0.4,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.seed, self.layers, self.items, self.screen_rows = seed, layers, items, screen_rows
        self.jitter, self.screen_error = jitter, screen_error
        self.candidates: Sequence[Candidate] = [Candidate(layer, form) for layer in range(layers) for form in forms]
        per_layer = scale * rng.lognormal(0.0, 1.0, layers)
        self.harm = {c: float(per_layer[c.layer] * rng.lognormal(0.0, 0.3)) for c in self.candidates}
        self.pairs = interaction * rng.lognormal(0.0, 1.0, layers)
        self.shown = {c: float(h * rng.lognormal(0.0, screen_error)) for c, h in self.harm.items()}

    def harm_of(self, layout: Layout) -> float:
        alone = sum(self.harm[change] for change in swaps(layout))
        return alone + sum(self.pairs[i] for i in range(1, self.layers) if layout[i] and layout[i - 1])

    def score(self, layout: Layout, split: str) -> list[TaskScore]:
        margins = self._margins(layout, split, self.items)
        return [TaskScore("labels", split, (margins > 0).astype(float), margins)]

    def true_score(self, layout: Layout) -> float:
        """On 20,000 items that no strategy sees. Its own error is 0.3 points; of a difference, far less."""
        return float((self._margins(layout, "population", 20_000) > 0).mean())

    def screen(self, layout: Layout) -> Screening:
        interactions = self.harm_of(layout) - sum(self.harm[change] for change in swaps(layout))
        kl = sum(self.shown[change] for change in swaps(layout)) + interactions
        return Screening(layout, kl, 10.0 + kl)

    def _margins(self, layout: Layout, split: str, items: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, len(split), ord(split[0])))
        ease, sensitivity = rng.logistic(2.0, 1.0, items), rng.lognormal(0.0, 0.5, items)
        own = int(hashlib.sha256(f"{self.seed}/{split}/{layout}".encode()).hexdigest()[:12], 16)
        jitter = self.jitter * np.sqrt(replaced(layout) / self.layers)
        return ease - sensitivity * self.harm_of(layout) + jitter * np.random.default_rng(own).normal(size=items)


class SyntheticScorer:
    """A `LayoutScorer` over a truth. `calls` lists what was computed, (kind, layout, split), once a trial.

    attributable: estimates are the truth's own screenings and first parts, and cost nothing.
    """

    def __init__(self, truth: Truth, ledger: Ledger, parts: int = 4, attributable: bool = False) -> None:
        self.truth, self.ledger, self.parts, self.attributable = truth, ledger, parts, attributable
        self.layers, self.candidates = truth.layers, sorted(truth.candidates)
        self.calls: list[tuple[str, Layout, str]] = []
        self._spent: dict[TrialKey, Trial] = {}
        self._kept: dict[tuple[str, int], Layout] = {}

    @property
    def spent_trials(self) -> int:
        return len(self._spent)

    @property
    def spent_seconds(self) -> float:
        return sum(trial.seconds for trial in self._spent.values())

    @property
    def spent_layer_forwards(self) -> int:
        return sum(trial.layer_forwards for trial in self._spent.values())

    def score(self, layout: Layout, split: str = "search", parts: int | None = None) -> LayoutScore:
        return self.score_many([layout], split, parts)[0]

    def score_many(
        self, layouts: Sequence[Layout], split: str = "search", parts: int | None = None
    ) -> list[LayoutScore]:
        dealt = [self._part(layouts, split, part) for part in range(self.parts if parts is None else parts)]
        scores = []
        for index, layout in enumerate(layouts):
            tasks = [_joined([part[index][task] for part in dealt]) for task in range(len(self.truth.weights))]
            scores.append(LayoutScore(layout, split, tuple(tasks), self.truth.weights))
        return scores

    def attribute_many(
        self,
        start: Layout,
        layouts: Sequence[Layout],
        priced: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Estimate]:
        assert self.attributable, "asked for what this scorer cannot do"
        assert all(sum(a != b for a, b in zip(start, layout, strict=True)) <= 1 for layout in layouts)
        self.calls += [("attribution", layout, "search") for layout in layouts]
        dealt = SyntheticScorer(self.truth, Ledger(":memory:"), self.parts)
        scores = dealt.score_many(layouts, parts=1) if priced else [None] * len(layouts)
        return [Estimate(self.truth.screen(layout), score) for layout, score in zip(layouts, scores, strict=True)]

    def screen(self, layout: Layout) -> Screening:
        return self.screen_many([layout])[0]

    def screen_many(self, layouts: Sequence[Layout]) -> list[Screening]:
        keys = [TrialKey("screen", layout, "search", "synthetic") for layout in layouts]

        def compute(layout: Layout) -> TrialResult:
            shown = self.truth.screen(layout)
            return TrialResult({"kl": shown.kl, "perplexity": shown.perplexity, "recall": dict(shown.recall)})

        trials = self._trials(keys, compute, self.truth.screen_rows, ("screen", 0))
        return [
            Screening(layout, trial.scalars["kl"], trial.scalars["perplexity"], trial.scalars["recall"])
            for layout, trial in zip(layouts, trials, strict=True)
        ]

    def decide(self, layout: Layout, status: str, split: str = "search") -> None:
        for part in range(self.parts):
            self.ledger.set_status(TrialKey("score", layout, split, str(part)), status)  # type: ignore[arg-type]

    def _part(self, layouts: Sequence[Layout], split: str, part: int) -> list[list[TaskScore]]:
        """The tasks of each layout on every `parts`-th item from `part` on."""

        def compute(layout: Layout) -> TrialResult:
            tasks = self.truth.score(layout, split)
            arrays = {f"{n}.items": task.per_item[part :: self.parts] for n, task in enumerate(tasks)}
            arrays |= {f"{n}.margins": task.margins[part :: self.parts] for n, task in enumerate(tasks)}
            return TrialResult({"tasks": [task.task for task in tasks]}, arrays)

        keys = [TrialKey("score", layout, split, str(part)) for layout in layouts]
        rows = sum(len(task.per_item[part :: self.parts]) for task in self.truth.score(full(self.layers), split))
        return [
            [
                TaskScore(name, split, trial.arrays[f"{n}.items"], trial.arrays[f"{n}.margins"])
                for n, name in enumerate(trial.scalars["tasks"])
            ]
            for trial in self._trials(keys, compute, rows, (split, part))
        ]

    def _trials(
        self, keys: Sequence[TrialKey], compute: Callable[[Layout], TrialResult], rows: int, place: tuple[str, int]
    ) -> list[Trial]:
        """Of each key; those that are missing run together as a tree, from the layout kept of the call before."""
        missing = [key.layout for key in dict.fromkeys(keys) if self.ledger.find(key) is None]
        forwards = self._tree(missing, place)
        trials = []
        for key in keys:
            if self.ledger.find(key) is None:
                self.calls.append((key.kind, key.layout, key.split))
            work = TrialResult({}, {}, rows * forwards.get(key.layout, 0))

            def run(key: TrialKey = key, work: TrialResult = work) -> TrialResult:
                return compute(key.layout)._replace(layer_forwards=work.layer_forwards)

            trial = self.ledger.memoised(key, run)
            self._spent.setdefault(key, trial)
            trials.append(trial)
        return trials

    def _tree(self, layouts: Sequence[Layout], place: tuple[str, int]) -> dict[Layout, int]:
        """Layers that each layout is the first of the call to run."""
        kept = self._kept.get(place)
        seen = set() if kept is None else {kept[: n + 1] for n in range(len(kept) - 1)}
        forwards = {}
        for layout in layouts:
            beginnings = {layout[: n + 1] for n in range(len(layout))} - seen
            forwards[layout] = len(beginnings)
            seen |= beginnings
        if layouts:
            self._kept[place] = max(layouts, key=lambda one: sum(_shared(one, other) for other in layouts))
        return forwards


class LinearCost:
    """Time falls by `saving` of the backbone's for each replaced layer. Keeps what it was asked to measure.

    base: seconds to the first token, seconds a further token. layer_mib: cache of a layer with full attention; replaced
    ones have none.
    """

    def __init__(
        self,
        saving: float = 0.02,
        ratio: Callable[[Layout], float] | None = None,
        base: tuple[float, float] = (2.0, 3.0 / 511),
        layer_mib: int = 10,
    ) -> None:
        self.ratio = ratio or (lambda layout: 1.0 - saving * replaced(layout))
        self.base, self.layer_mib = base, layer_mib
        self.measured: list[Layout] = []

    def predicted(self, layout: Layout) -> Performance:
        ratio = self.ratio(layout)
        cache = (self.layer_mib << 20) * (len(layout) - replaced(layout))
        return Performance(1.0 / ratio, self.base[0] * ratio, self.base[1] * ratio, cache)

    def performance(self, layout: Layout) -> Performance:
        return self.predicted(layout)

    def measure(self, layout: Layout) -> Comparison:
        self.measured.append(layout)
        ratio, first, later = self.ratio(layout), self.base[0], 511 * self.base[1]
        base = Throughput("fake", "fp32", WORKLOAD, 1, first, later, first + later)
        hybrid = Throughput("fake", "fp32", WORKLOAD, 1, first * ratio, later * ratio, (first + later) * ratio)
        return Comparison(layout, base, hybrid, ratio, ratio, 1.0 / ratio)

    def to_dict(self) -> dict[str, object]:
        return {"fake": True}


def _shared(one: Layout, other: Layout) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _joined(parts: Sequence[TaskScore]) -> TaskScore:
    items, margins = (np.concatenate([getattr(part, name) for part in parts]) for name in ("per_item", "margins"))
    return TaskScore(parts[0].task, parts[0].split, items, margins)
