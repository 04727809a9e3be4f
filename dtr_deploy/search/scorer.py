"""Scores of layouts, each computed once and remembered in the ledger, part by part.

`Scorer` is what a search talks to: it knows keys, the ledger and what has been spent. What a score takes is behind
`Evaluator`; `ModelEvaluator` is the real one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.search.evaluator import ATTRIBUTION, SCORE, SCREEN, Evaluator, Finished
from dtr_deploy.search.ledger import Ledger, Status, Trial, TrialKey, TrialResult
from dtr_deploy.search.model_evaluator import ModelEvaluator, models_hash
from dtr_deploy.search.objective import Estimate, LayoutScore, Screening
from dtr_deploy.search.problem import BatchProgress
from dtr_deploy.tasks.base import Split

__all__ = ["Evaluator", "ModelEvaluator", "Scorer", "models_hash"]


class Scorer:
    """An evaluator with a memory. Every result it returns was read from the ledger, also the first time, and each
    layout's result is on the disk before the next layouts are begun.

    The ledger has one row for each layout and part, with the raw results of that part's requests. `spent_*` count each
    row once, whether it was computed now or by an earlier run of the same search; a layout scored on one split is one
    trial however many parts it took.
    """

    def __init__(self, evaluator: Evaluator, ledger: Ledger) -> None:
        self.evaluator, self.ledger = evaluator, ledger
        self.layers, self.candidates = evaluator.layers, sorted(evaluator.candidates)
        self._spent: dict[TrialKey, Trial] = {}

    @property
    def parts(self) -> int:
        """Equal, stratified parts that the search split's items are dealt into."""
        return self.evaluator.parts("search")

    @property
    def spent_trials(self) -> int:
        return len({(key.kind, key.layout, key.split) for key in self._spent})

    @property
    def spent_seconds(self) -> float:
        return sum(trial.seconds for trial in self._spent.values())

    @property
    def spent_layer_forwards(self) -> int:
        return sum(trial.layer_forwards for trial in self._spent.values())

    def score(self, layout: Layout, split: Split = "search", parts: int | None = None) -> LayoutScore:
        """Scores of all tasks on the items of the first `parts` parts of a split; None: on all items."""
        return self.score_many([layout], split, parts)[0]

    def score_many(
        self, layouts: Sequence[Layout], split: Split = "search", parts: int | None = None
    ) -> list[LayoutScore]:
        """`score` of each, in order. Layouts are run together, so that what they have in common is computed once."""
        dealt = self.evaluator.parts(split)
        wanted = dealt if parts is None else parts
        if not 1 <= wanted <= dealt:
            raise UsageError(f"parts: must be 1 to {dealt} on the split {split}, got {parts}")
        pairs = [(layout, part) for part in range(wanted) for layout in layouts]
        inputs = [self.evaluator.fingerprint(SCORE, split, part) for part in range(wanted)]
        keys = [TrialKey(SCORE, layout, split, inputs[part]) for layout, part in pairs]
        scalars = [{"part": part, "parts": dealt} for _, part in pairs]
        trials = self._trials(keys, lambda some: self.evaluator.score([pairs[n] for n in some], split), scalars)
        scores = []
        for number, layout in enumerate(layouts):
            mine = trials[number :: len(layouts)]
            tasks = self.evaluator.interpret(split, [(trial.arrays, trial.scalars) for trial in mine])
            scores.append(LayoutScore(layout, split, tuple(tasks), self.evaluator.weights))
        return scores

    def screen(self, layout: Layout) -> Screening:
        """Cheap scores for ranking."""
        return self.screen_many([layout])[0]

    def screen_many(self, layouts: Sequence[Layout]) -> list[Screening]:
        """`screen` of each, in order, run together as in `score_many`."""
        inputs = self.evaluator.fingerprint(SCREEN, "search")
        keys = [TrialKey(SCREEN, layout, "search", inputs) for layout in layouts]
        trials = self._trials(keys, lambda some: self.evaluator.screen([layouts[n] for n in some]))
        return [self.evaluator.screening(key.layout, trial.scalars) for key, trial in zip(keys, trials, strict=True)]

    @property
    def attributable(self) -> bool:
        """Whether `attribute_many` can do the tasks at hand, and is cheaper than trying."""
        return self.evaluator.attributable

    def attribute_many(
        self, start: Layout, layouts: Sequence[Layout], priced: bool, progress: BatchProgress | None = None
    ) -> list[Estimate]:
        """Estimates of layouts that differ from `start` in one layer, or not at all, by one pass back through it.

        priced: also of their scores on the first part of the search split.
        """
        inputs = hashlib.sha256(f"{self.evaluator.fingerprint(ATTRIBUTION, 'search')}/{start}/{priced}".encode())
        keys = [TrialKey(ATTRIBUTION, layout, "search", inputs.hexdigest()) for layout in layouts]
        trials = self._trials(
            keys, lambda some: self.evaluator.attribute(start, [layouts[n] for n in some], priced, progress)
        )
        found = []
        for layout, trial in zip(layouts, trials, strict=True):
            score = None
            if priced:
                tasks = self.evaluator.interpret("search", [(trial.arrays, trial.scalars)])
                score = LayoutScore(layout, "search", tuple(tasks), self.evaluator.weights)
            found.append(Estimate(self.evaluator.screening(layout, trial.scalars), score))
        return found

    def decide(self, layout: Layout, status: Status, split: Split = "search") -> None:
        """Note in the ledger what became of a scored layout, on all of its parts."""
        for part in range(self.evaluator.parts(split)):
            inputs = self.evaluator.fingerprint(SCORE, split, part)
            self.ledger.set_status(TrialKey(SCORE, layout, split, inputs), status)

    def _trials(
        self,
        keys: Sequence[TrialKey],
        compute: Callable[[Sequence[int]], Iterable[Finished]],
        scalars: Sequence[dict[str, int]] = (),
    ) -> list[Trial]:
        """The trial of each key. compute: of those keys (by number) that the ledger has none of. scalars: more to keep
        with each."""
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        missing = [number for key, number in reversed(first.items()) if self.ledger.find(key) is None]
        if missing:
            for done in compute(missing):
                number = missing[done.number]
                more = scalars[number] if scalars else {}
                result = TrialResult({**done.scalars, **more}, done.arrays, done.layer_forwards)
                self.ledger.record(keys[number], result, done.seconds)
        found = []
        for key in keys:
            trial = self.ledger.find(key)
            assert trial is not None, f"the evaluator left out {key.layout}"
            self._spent.setdefault(key, trial)
            found.append(trial)
        return found
