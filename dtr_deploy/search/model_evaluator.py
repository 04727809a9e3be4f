"""What a layout's score and screening take: a backbone, its twins, the tasks and a text to compare with the teacher on.

Results are raw (what each request's log-probability was) and of parts of a split, so that `Scorer` can keep them, add
to them and have the whole interpreted here as if it had been computed at once.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dtr_deploy.hybrid.layout import Layout, full
from dtr_deploy.hybrid.model import Twins
from dtr_deploy.hybrid.precision import products_dtype
from dtr_deploy.search import attribution_runs
from dtr_deploy.search.attribution import Swap
from dtr_deploy.search.attribution_runs import AttributionRuns, RunUnits, Unit, UnitResult
from dtr_deploy.search.evaluator import ATTRIBUTION, SCORE, SCREEN, Finished
from dtr_deploy.search.forward import LAYOUTS_AT_ONCE, LayerPool, PrefixForward
from dtr_deploy.search.objective import Screening
from dtr_deploy.search.problem import BatchProgress, Candidate
from dtr_deploy.search.shares import (
    TEXT,
    Piece,
    Share,
    dealt,
    joined_arrays,
    of_task,
    part_of,
    pieces_of,
    summed,
    whole_piece,
)
from dtr_deploy.search.task_runs import (
    DraftRuns,
    LikelihoodRuns,
    RawResult,
    TaskRuns,
    WholeModel,
    WholeRuns,
    joined_scores,
    whole_score,
)
from dtr_deploy.tasks.base import Split, Task, TaskScore
from dtr_deploy.tasks.divergence import Divergence, DivergenceScore, join
from dtr_deploy.tasks.generation import GenerationTask
from dtr_deploy.tasks.parts import PARTS
from dtr_deploy.tasks.request_task import Part, RequestTask
from dtr_deploy.tasks.scoring import RequestScores, ScoringBatch

BORDER_BYTES = 2 << 30
"""Memory that a search may fill with hidden states between layers, over all its tasks."""

FORMAT = 2
"""Of raw results in the ledger. Higher numbers are not read by, and do not read, what came before."""


class ModelEvaluator:
    """Scores layouts of a backbone and its twins.

    Args:
        backbone: causal LM in evaluation mode; not modified.
        twins: state dictionaries of `HybridMixer` by (layer, form); each is a candidate.
        window: the twins' softmax window, tokens.
        tasks: what the score is made of, weighted by `task.weight`.
        divergence: held-out text for screening; the backbone is made its reference.
        recall: tasks whose margins on their search split are screened besides (few, short items do). Every margin a
            swap loses counts against it.
        models_hash: hash of the backbone's and the twins' weights, for the ledger's keys.
        border_bytes: memory for hidden states between layers, screening first. Where not all fit, only every second,
            third, ... border is kept.
        precision: of the products of linear layers, see `hybrid.precision`. Log-probabilities are read in float32.
        parts: into how many parts the items of the search split are dealt; fewer where a task has not as many items,
            and 1 where one of them cannot be dealt.
    """

    def __init__(
        self,
        backbone: Any,
        twins: Twins,
        window: int,
        tasks: Sequence[Task],
        divergence: Divergence,
        recall: Sequence[Task],
        models_hash: str,
        border_bytes: int = BORDER_BYTES,
        precision: str = "float32",
        parts: int = PARTS,
    ) -> None:
        self.backbone, self.tasks, self.divergence, self.recall = backbone, list(tasks), divergence, list(recall)
        self.pool = LayerPool(backbone, twins, window)
        self.products = products_dtype(precision, backbone.device.type)
        self.layers = len(self.pool.layers)
        self.candidates = sorted(Candidate(layer, form) for layer, form in twins)
        self.weights = tuple(float(task.weight) for task in tasks)
        self.models_hash = models_hash
        self.arithmetic = f"{self.products}/{type(self.pool.runs(self.products)).__name__}"
        self._head = backbone.get_output_embeddings()
        self._whole = WholeModel(self.pool, self.products)
        self._search_parts = _most_parts(self.tasks, parts)
        self._runs: dict[tuple[str, int, Split, int, tuple[int, ...] | None], TaskRuns] = {}
        self._shares: dict[tuple[Split, int], list[list[Share]]] = {}
        self._screening: PrefixForward | None = None
        self._texts: dict[tuple[int, ...], PrefixForward] = {}
        screened = [*divergence.batches(), *_search_batches(self.recall)]
        screening_bytes = PrefixForward.border_bytes(screened, backbone.config)
        search_bytes = PrefixForward.border_bytes(_search_batches(self.tasks), backbone.config)
        self.screen_stride = self._stride(screening_bytes, border_bytes)
        left = border_bytes - screening_bytes // (self.screen_stride or 1)
        self.search_stride = self._stride(search_bytes, left)
        self._fingerprints: dict[tuple[str, str, int], str] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of hidden states held between layers now."""
        texts = [*self._texts.values(), *([self._screening] if self._screening is not None else [])]
        return sum(text.kept_bytes for text in texts) + sum(runs.kept_bytes for runs in self._runs.values())

    def parts(self, split: Split) -> int:
        """See `Evaluator`: only the search split is scored in parts."""
        return self._search_parts if split == "search" else 1

    def score(self, wanted: Sequence[tuple[Layout, int]], split: Split) -> Iterator[Finished]:
        """See `Evaluator`: part after part."""
        for part in sorted({part for _, part in wanted}):
            numbers = [number for number, (_, its) in enumerate(wanted) if its == part]
            for done in self.score_part([wanted[number][0] for number in numbers], split, part):
                yield replace(done, number=numbers[done.number])

    def score_part(
        self, layouts: Sequence[Layout], split: Split, part: int, share: Share | None = None
    ) -> Iterator[Finished]:
        """`score` of layouts on one part, or on a share of it."""
        tasks = share if share is not None else [(number, None) for number in range(len(self.tasks))]

        def run(some: Sequence[Layout]) -> list[RawResult]:
            return _merged([(task, self._task_runs(SCORE, task, split, part, of).run(some)) for task, of in tasks])

        return _side_by_side(layouts, run)

    def shares(self, split: Split, part: int, most: int) -> list[Share]:
        """A part dealt among at most so many processes; none has nothing to do."""
        if (split, most) not in self._shares:
            loads = [0.0] * most
            self._shares[split, most] = [
                [share for share in dealt(self._pieces(split, number), loads) if share]
                for number in range(self.parts(split))
            ]
        return self._shares[split, most][part]

    def joined(
        self, split: Split, part: int, shares: Sequence[Share], results: Sequence[Finished], number: int
    ) -> Finished:
        """The result of a layout on a part, of that on all its shares. number: which layout it is."""
        done = summed(results, number)
        done.arrays = joined_arrays(
            shares, results, lambda task: _part(self.tasks[task], split, part, self.parts(split))
        )
        return done

    def _pieces(self, split: Split, part: int) -> list[Piece]:
        pieces: list[Piece] = []
        for number, task in enumerate(self.tasks):
            if isinstance(task, RequestTask) and _can_be_dealt(task):
                batches = task.part(split, part, self.parts(split)).batches
                make = whole_piece if isinstance(task, GenerationTask) else pieces_of
            else:
                batches, make = task.batches(split) if isinstance(task, RequestTask) else [], whole_piece
            pieces += make(number, batches, self.backbone.config.hidden_size)
        return pieces

    def interpret(
        self, split: Split, raw: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]
    ) -> list[TaskScore]:
        """See `Evaluator`."""
        scores = []
        for number, task in enumerate(self.tasks):
            arrays = [of_task(part, number) for part, _ in raw]
            if isinstance(task, RequestTask) and _can_be_dealt(task):
                parts = [task.part(split, part, self.parts(split)) for part in range(len(raw))]
                scores.append(task.interpret_items(split, joined_scores(arrays), parts))
            else:
                scores.append(whole_score(task, split, arrays[0], raw[0][1][f"{number}.strata"]))
        return scores

    def screen(self, layouts: Sequence[Layout]) -> Iterator[Finished]:
        """See `Evaluator`: divergence from the teacher, and the recall tasks' mean margins."""
        everything = self._screening_share

        def run(some: Sequence[Layout]) -> list[RawResult]:
            found = self._screen(some, everything)
            return [RawResult({}, raw.layer_forwards, self._screened(raw.arrays)) for raw in found]

        return _side_by_side(layouts, run)

    def screen_share(self, layouts: Sequence[Layout], share: Share) -> Iterator[Finished]:
        """What `joined_screen` makes a screening of."""
        return _side_by_side(layouts, lambda some: self._screen(some, share))

    def screening_shares(self, most: int) -> list[Share]:
        """As `shares`, of what is screened."""
        size = self.backbone.config.hidden_size
        pieces = pieces_of(TEXT, self.divergence.batches(), size)
        for number, task in enumerate(self.recall):
            if isinstance(task, RequestTask) and _can_be_dealt(task):
                make = whole_piece if isinstance(task, GenerationTask) else pieces_of
                pieces += make(number, task.part("search", 0, 1).batches, size)
            else:
                pieces += whole_piece(number, [], size)
        return [share for share in dealt(pieces, [0.0] * most) if share]

    def joined_screen(self, shares: Sequence[Share], results: Sequence[Finished], number: int) -> Finished:
        """As `joined`, of a screening."""
        done = summed(results, number)
        done.scalars = self._screened(
            joined_arrays(shares, results, lambda task: _part(self.recall[task], "search", 0, 1))
        )
        return done

    def screening(self, layout: Layout, scalars: Mapping[str, Any]) -> Screening:
        """See `Evaluator`."""
        return Screening(layout, scalars["kl"], scalars.get("perplexity"), scalars["recall"])

    @property
    def attributable(self) -> bool:
        """See `Evaluator`."""
        return attribution_runs.fits([part for _, part in [*self._screened_parts(), *self._priced_parts()]])

    def attribute(
        self,
        start: Layout,
        layouts: Sequence[Layout],
        priced: bool,
        progress: BatchProgress | None = None,
        run_units: RunUnits | None = None,
    ) -> Iterator[Finished]:
        """See `Evaluator`. All of them at once, that is what makes it cheap. run_units: who runs batches (this)."""
        started = time.perf_counter()
        reference = self._refer() / len(layouts) if run_units is None else 0.0
        results = self._attribution_runs().run(start, layouts, priced, progress, run_units)
        for result in results:
            result.layer_forwards += reference
            for task, part in self._screened_parts():
                log_probs = np.array(result.scalars["recall"][task.name])
                lengths = np.array([len(task.requests("search")[index].continuation) for index in part.requests])
                scores = RequestScores(log_probs, np.zeros(len(lengths), dtype=bool), lengths)
                result.scalars["recall"][task.name] = task.interpret_items("search", scores, [part]).mean_margin
        seconds = (time.perf_counter() - started) / len(layouts)
        work = np.diff(np.round(np.cumsum([result.layer_forwards for result in results])), prepend=0.0)
        for number, (result, forwards) in enumerate(zip(results, work, strict=True)):
            yield Finished(number, result.arrays, result.scalars, int(forwards), seconds)

    def attribute_unit(self, start: Layout, swaps: Sequence[Swap], unit: Unit) -> UnitResult:
        """One of the batches that `attribute` is made of."""
        self._refer()
        return self._attribution_runs().run_unit(start, swaps, unit)

    def attribution_costs(self, units: Sequence[Unit]) -> list[float]:
        """About what each takes, next to the others."""
        runs = self._attribution_runs()
        return [runs.cost(unit) for unit in units]

    def _attribution_runs(self) -> AttributionRuns:
        return AttributionRuns(
            self.pool,
            self.products,
            self._head,
            self.divergence,
            [(task.name, part) for task, part in self._screened_parts()],
            [part for _, part in self._priced_parts()],
        )

    def _screened_parts(self) -> list[tuple[Any, Any]]:
        return [(task, _first_part(task, 1)) for task in self.recall]

    def _priced_parts(self) -> list[tuple[Any, Any]]:
        return [(task, _first_part(task, self.parts("search"))) for task in self.tasks]

    def fingerprint(self, kind: str, split: Split, part: int = 0) -> str:
        """See `Evaluator`."""
        if (kind, split, part) not in self._fingerprints:
            self._fingerprints[kind, split, part] = self._fingerprint(kind, split, part)
        return self._fingerprints[kind, split, part]

    def _fingerprint(self, kind: str, split: Split, part: int) -> str:
        digest = hashlib.sha256(f"{FORMAT}/{self.models_hash}/{kind}/{split}/{self.arithmetic}".encode())
        if kind != SCORE:
            digest.update(self.divergence.fingerprint().encode())
        if kind != SCREEN:
            digest.update(f"/{part}/{self.parts(split)}".encode())
        if kind == ATTRIBUTION:
            digest.update(b"/each batch draws for itself")
        tasks = {SCORE: self.tasks, SCREEN: self.recall, ATTRIBUTION: [*self.recall, *self.tasks]}
        for task in tasks[kind]:
            digest.update(f"/{task.name}/{task.fingerprint(split)}".encode())
        return digest.hexdigest()

    @property
    def _screening_share(self) -> Share:
        """All that is screened."""
        return ((TEXT, None), *((number, None) for number in range(len(self.recall))))

    def _screen(self, layouts: Sequence[Layout], share: Share) -> list[RawResult]:
        """Arrays of a share of a screening, which `_screened` reads once they are together."""
        extra = self._refer() / len(layouts) if any(task == TEXT for task, _ in share) else 0.0

        def run(task: int, of: tuple[int, ...] | None) -> list[RawResult]:
            if task == TEXT:
                return self._text_runs(layouts, of)
            return self._task_runs(SCREEN, task, "search", 0, of).run(layouts)

        results = _merged([(task, run(task, of)) for task, of in share])
        for result in results:
            result.layer_forwards += extra
        return results

    def _text_runs(self, layouts: Sequence[Layout], batches: tuple[int, ...] | None) -> list[RawResult]:
        """Divergences on some batches of the text, or all: arrays `kl.N` and `nll.N` of batch N, of its sequences."""
        numbers = batches if batches is not None else tuple(range(len(self.divergence.batches())))
        forward = self._screening
        if batches is not None:
            if batches not in self._texts:
                some = [self.divergence.batches()[number] for number in batches]
                self._texts[batches] = PrefixForward(self.pool, some, self.screen_stride, self.products)
            forward = self._texts[batches]
        assert forward is not None
        found: list[dict[str, np.ndarray]] = [{} for _ in layouts]
        for layout, place, hidden in forward.hidden_many(layouts):
            score = self.divergence.read_batch(numbers[place], hidden, self._head)
            found[layout] |= {f"kl.{numbers[place]}": score.kl, f"nll.{numbers[place]}": score.nll}
        return [RawResult(arrays, work) for arrays, work in zip(found, forward.shares, strict=True)]

    def _screened(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Scalars of a screening, of `_screen`'s arrays of all shares."""
        text = of_task(arrays, TEXT)
        score = join(
            [DivergenceScore(text[f"kl.{n}"], text[f"nll.{n}"]) for n in range(len(self.divergence.batches()))]
        )
        recall = {
            task.name: self._recall_margin(task, of_task(arrays, number)) for number, task in enumerate(self.recall)
        }
        return {"kl": score.mean_kl, "perplexity": score.perplexity, "recall": recall}

    def _refer(self) -> int:
        """Make the backbone the divergence's reference, once; the layer-forwards that this took now."""
        if self._screening is not None:
            return 0
        # Not in __init__: a search that finds all its trials in the ledger runs no model.
        self._screening = PrefixForward(self.pool, self.divergence.batches(), self.screen_stride, self.products)
        self.divergence.reference_hidden(list(self._screening.hidden(full(self.layers))), self._head)
        return self._screening.layer_forwards

    def _recall_margin(self, task: Task, arrays: Mapping[str, np.ndarray]) -> float:
        if isinstance(task, RequestTask) and _can_be_dealt(task):
            whole = [task.part("search", 0, 1)]
            return task.interpret_items("search", joined_scores([arrays]), whole).mean_margin
        return float(arrays["margins"].mean())

    def _task_runs(
        self, kind: str, number: int, split: Split, part: int, batches: tuple[int, ...] | None = None
    ) -> TaskRuns:
        """batches: those of the part that are run; None: all."""
        key = (kind, number, split, part, batches)
        if key not in self._runs:
            task = (self.recall if kind == SCREEN else self.tasks)[number]
            # Only the search split is run often enough to keep anything for.
            stride = self.screen_stride if kind == SCREEN else self.search_stride if split == "search" else 0
            parts = 1 if kind == SCREEN else self.parts(split)

            def forward(batches: Sequence[ScoringBatch]) -> PrefixForward:
                return PrefixForward(self.pool, batches, stride, self.products)

            if isinstance(task, GenerationTask):
                items = task.part(split, part, parts)
                self._runs[key] = DraftRuns(task, split, items, forward, self._whole, self._head)
            elif isinstance(task, RequestTask) and task.resumable:
                items = task.part(split, part, parts)
                items = items if batches is None else part_of(items, batches)[0]
                self._runs[key] = LikelihoodRuns(items, forward(items.batches), self._head)
            else:
                self._runs[key] = WholeRuns(task, split, self._whole)
        return self._runs[key]

    def _stride(self, needed: int, available: int) -> int:
        """Every how many layers hidden states are kept, so that `needed` bytes of them fit; 0 if none do."""
        if available <= 0:
            return 0
        stride = math.ceil(needed / available)
        return max(1, stride) if stride < self.layers else 0


def _can_be_dealt(task: Task) -> bool:
    return isinstance(task, GenerationTask) or (isinstance(task, RequestTask) and task.resumable)


def _first_part(task: Task, parts: int) -> Part | None:
    return task.part("search", 0, parts) if isinstance(task, RequestTask) and _can_be_dealt(task) else None


def _most_parts(tasks: Sequence[Task], parts: int) -> int:
    """`parts`, or as many as every task has items for."""
    for task in tasks:
        if not (isinstance(task, RequestTask) and _can_be_dealt(task)):
            return 1
        parts = min(parts, len(task.item_strata("search")))
    return parts


def _search_batches(tasks: Sequence[Task]) -> list[ScoringBatch]:
    return [
        batch
        for task in tasks
        if isinstance(task, RequestTask) and _can_be_dealt(task)
        for batch in task.batches("search")
    ]


def _side_by_side(layouts: Sequence[Layout], run: Any) -> Iterator[Finished]:
    """Layouts run a few at a time, neighbours in the tree together, with each one's share of time and work."""
    order = sorted(range(len(layouts)), key=lambda i: [form or "" for form in layouts[i]])
    for first in range(0, len(order), LAYOUTS_AT_ONCE):
        some = order[first : first + LAYOUTS_AT_ONCE]
        started = time.perf_counter()
        results: list[RawResult] = run([layouts[index] for index in some])
        seconds = time.perf_counter() - started
        work = np.array([result.layer_forwards for result in results])
        shares = work / work.sum() if work.sum() > 0 else np.full(len(some), 1 / len(some))
        whole = np.diff(np.round(np.cumsum(work)), prepend=0.0)  # whole numbers with the same sum
        for index, result, share, forwards in zip(some, results, shares, whole, strict=True):
            yield Finished(index, result.arrays, result.scalars, int(forwards), float(seconds * share))


def _merged(by_task: Sequence[tuple[int, Sequence[RawResult]]]) -> list[RawResult]:
    """One result a layout out of one a task and layout; names begin with the task's number."""
    merged = []
    numbers = [number for number, _ in by_task]
    for results in zip(*(some for _, some in by_task), strict=True):
        named = list(zip(numbers, results, strict=True))
        arrays = {f"{n}.{name}": array for n, result in named for name, array in result.arrays.items()}
        scalars = {f"{n}.{name}": value for n, result in named for name, value in result.scalars.items()}
        merged.append(RawResult(arrays, sum(result.layer_forwards for result in results), scalars))
    return merged


def _part(task: Task, split: Split, number: int, parts: int) -> Part:
    """Of a task that can be dealt."""
    assert isinstance(task, RequestTask)
    return task.part(split, number, parts)


def models_hash(backbone_fingerprint: str, twins: Mapping[tuple[int, str], Mapping[str, Any]], window: int) -> str:
    """sha256 over a backbone's fingerprint and every twin's weights."""
    digest = hashlib.sha256(f"{backbone_fingerprint}/{window}".encode())
    for (layer, form), weights in sorted(twins.items()):
        for name, tensor in sorted(weights.items()):
            digest.update(f"/{layer}/{form}/{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()
