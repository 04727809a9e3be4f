"""An lm-evaluation-harness task (name, group or task YAML) as a `Task`: a score a sample on three disjoint splits.

Prompts, answers, filters and metrics are lm-eval's; the splits are ours. Where a task has both validation and test
documents, the halves of validation are search and confirm and test is test; where it has one of them only, a seeded
shuffle deals its documents out to the three in turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dtr_deploy.errors import DtrError, UsageError
from dtr_deploy.tasks.base import ForwardHidden, Split, TaskScore, check_split
from dtr_deploy.tasks.generation import Drafts
from dtr_deploy.tasks.request_task import RequestTask, log_softmax
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import BATCH_TOKENS, RequestScores, ScoringBatch, fingerprint

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_UNITS = ("word_perplexity", "byte_perplexity")
_NO_LIMIT = 10**9  # tokenizers without a known length say 1e30


class LmEvalTask(RequestTask):
    """Score of an item: the metric's value for that document (must be a number in lm-eval, higher = better).

    metric: a metric of the task, or "metric,filter" as lm-eval prints it; None or "accuracy" means acc if the task has
        it, else its first metric. `word_perplexity` and `byte_perplexity` become the geometric mean
        probability a word or byte, exp(log p / units), so that higher is better and the mean over documents means
        something.
    Margin: multiple choice: log-probability of the right answer among the answers; log-likelihood tasks: of the text, a
        token; generation: the score itself. Nats.
    Strata: subtasks, when `spec` names a group.
    The test split is in lm-eval's own order, so that few-shot examples, drawn document after document, are those that
    lm-eval draws for the same documents (`lm_eval_check`).
    shots: overrides the task's own number of examples. items: at most so many documents a split, over all subtasks.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        spec: str,
        *,
        shots: int | None = None,
        items: int | None = None,
        metric: str | None = None,
        seed: int = 0,
        weight: float = 1.0,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        super().__init__(name, tokenizer, weight, batch_tokens)
        if items is not None and items < 1:
            raise UsageError(f"task {name!r}: items must be >= 1, got {items}")
        own_limit = getattr(tokenizer, "model_max_length", None)
        self.max_length = max_length or (own_limit if own_limit is not None and own_limit < _NO_LIMIT else None)
        self.spec, self.shots, self.seed = spec, shots, seed
        self._items = items
        self._metric, _, self._filter = (metric or "").partition(",")
        self._tasks = _load(name, spec, shots)
        self._documents: dict[str, list[tuple[str, int, Any]]] = {}
        self._instances: dict[str, list[list[Instance]]] = {}
        self._owners: dict[str, list[int]] = {}
        self._drafts: Drafts = {}
        self.resumable = all(task.OUTPUT_TYPE != "generate_until" for task in self._tasks.values())

    @property
    def subtasks(self) -> dict[str, Any]:
        """lm-eval's own task objects, by name."""
        return self._tasks

    def documents(self, split: Split) -> list[tuple[str, int, Any]]:
        """`(subtask, index in its documents, document)` of each item, in the order of the scores."""
        if check_split(split) in self._documents:
            return self._documents[split]
        share = None if self._items is None else -(-self._items // len(self._tasks))
        chosen = []
        for subtask, task in self._tasks.items():
            chosen += [(subtask, index, doc) for index, doc in self._deal(subtask, task, split, share)]
        self._documents[split] = chosen[: self._items]
        return self._documents[split]

    def make_requests(self, split: Split) -> list[Request]:
        """Requests of all instances, document by document; `_owners` remembers which instance each belongs to."""
        from lm_eval.api.model import TemplateLM

        from dtr_deploy.tasks.lm_eval_adapter import RequestEncoder

        encoder = RequestEncoder(self.tokenizer, self.max_length)

        class Pairs(TemplateLM):
            """lm-eval's own rule for where a context ends, without a model."""

            eot_token_id = encoder.prefix_token_id

            def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
                return encoder.encode(string, add_special_tokens)

            def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
                return [encoder.cut(context, continuation) for _, context, continuation in requests]

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
                return [encoder.windows(instance.args[0]) for instance in requests]

            def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
                raise NotImplementedError("generation has no likelihood requests")

        pairs, requests, owners = Pairs(), [], []
        flat = [instance for group in self._split_instances(split) for instance in group]
        for owner, instance in enumerate(flat):
            if instance.request_type == "loglikelihood":
                made = pairs.loglikelihood([instance], disable_tqdm=True)
            else:
                made = pairs.loglikelihood_rolling([instance])[0]
            requests += made
            owners += [owner] * len(made)
        self._owners[split] = owners
        return requests

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """See the class."""
        groups = self._split_instances(split)
        flat = [instance for group in groups for instance in group]
        log_probs = np.zeros(len(flat))
        np.add.at(log_probs, self._owners[split], scores.log_probs)
        lengths = np.bincount(self._owners[split], weights=scores.lengths, minlength=len(flat))
        greedy = np.ones(len(flat), dtype=bool)
        np.logical_and.at(greedy, self._owners[split], scores.greedy)
        responses = [
            (float(value), bool(hit)) if instance.request_type == "loglikelihood" else float(value)
            for instance, value, hit in zip(flat, log_probs, greedy, strict=True)
        ]
        return self._evaluate(split, responses, (log_probs / np.maximum(lengths, 1)).tolist())

    def request_items(self, split: Split) -> np.ndarray:
        """See `RequestTask`: a document's instances may have several requests each."""
        self.requests(split)  # makes the owners
        groups = self._split_instances(split)
        document = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        return document[np.array(self._owners[split])]

    def item_strata(self, split: Split) -> Sequence[str]:
        """The subtask of each document."""
        return [name for name, _, _ in self.documents(split)]

    def batches(self, split: Split) -> list[ScoringBatch]:
        """See `Task.batches`. Raises `UsageError` for tasks that generate (`resumable` is False)."""
        self._require_resumable()
        return super().batches(split)

    def read(self, split: Split, hidden_per_batch: Iterable[Tensor], lm_head: Callable[[Tensor], Tensor]) -> TaskScore:
        """See `Task.read`."""
        self._require_resumable()
        return super().read(split, hidden_per_batch, lm_head)

    def score(self, model: Any, split: Split, forward_hidden: ForwardHidden | None = None) -> TaskScore:
        """See `Task.score`."""
        if self.resumable:
            return super().score(model, split, forward_hidden)
        from dtr_deploy.tasks.lm_eval_adapter import DtrLM

        lm = DtrLM(
            model, self.tokenizer, max_length=self.max_length, forward_hidden=forward_hidden, drafts=self._drafts
        )
        flat = [instance for group in self._split_instances(split) for instance in group]
        responses: list[Any] = [None] * len(flat)
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            chosen = [index for index, instance in enumerate(flat) if instance.request_type == kind]
            if chosen:
                results = getattr(lm, kind)([flat[index] for index in chosen], disable_tqdm=True)
                for index, result in zip(chosen, results, strict=True):
                    responses[index] = result
        return self._evaluate(split, responses, None)

    def fingerprint(self, split: Split) -> str:
        """See `Task.fingerprint`."""
        if self.resumable:
            return super().fingerprint(split)
        prompts = [repr(instance.args) for group in self._split_instances(split) for instance in group]
        return fingerprint([], type(self).__name__, split, *self.meaning(split), *prompts)

    def meaning(self, split: Split) -> list[str]:
        """Metric, filter, documents and right answers."""
        answers = [
            f"{name}/{index}/{self._tasks[name].doc_to_target(doc)}" for name, index, doc in self.documents(split)
        ]
        return [self._metric, self._filter, *answers]

    def _require_resumable(self) -> None:
        if not self.resumable:
            raise UsageError(
                f"task {self.name!r}: generates text, which cannot be scored from cached layers; use score()"
            )

    def _deal(self, subtask: str, task: Any, split: Split, limit: int | None) -> list[tuple[int, Any]]:
        """At most `limit` documents of one subtask's split, each with its index in lm-eval's own order."""
        if task.has_validation_docs() and task.has_test_docs():
            docs, hands = task.test_docs() if split == "test" else task.validation_docs(), 2
            place = {"search": 0, "confirm": 1, "test": None}[split]
        else:
            docs, hands = task.eval_docs, 3
            place = {"search": 0, "confirm": 1, "test": 2}[split]
        order = list(range(len(docs)))
        random.Random(f"lm_eval/{subtask}/{self.seed}").shuffle(order)
        mine = (order if place is None else order[place::hands])[:limit]
        if split == "test":
            mine.sort()
        if not mine:
            raise UsageError(f"task {self.name!r}: {subtask} has {len(docs)} documents, too few for the split {split}")
        return [(index, docs[index]) for index in mine]

    def _split_instances(self, split: Split) -> list[list[Instance]]:
        """Instances of each document, made once."""
        if split in self._instances:
            return self._instances[split]
        groups = []
        for task in self._tasks.values():
            task.set_fewshot_seed(self.seed)
        for subtask, index, doc in self.documents(split):
            task = self._tasks[subtask]
            context = task.fewshot_context(
                doc,
                num_fewshot=task.config.num_fewshot or 0,
                system_instruction=None,
                apply_chat_template=False,
                fewshot_as_multiturn=False,
                chat_template=None,
                gen_prefix=task.doc_to_prefix(doc),
            )
            made = task.construct_requests(
                doc=doc,
                ctx=context,
                metadata=(subtask, index, task.config.repeats),
                apply_chat_template=False,
                chat_template=None,
            )
            groups.append(made if isinstance(made, list) else [made])
        self._instances[split] = groups
        return groups

    def _evaluate(self, split: Split, responses: Sequence[Any], per_token: Sequence[float] | None) -> TaskScore:
        """Filters and metrics of lm-eval over one response an instance."""
        groups, documents = self._split_instances(split), self.documents(split)
        flat = [instance for group in groups for instance in group]
        for instance, response in zip(flat, responses, strict=True):
            # Repeats exist for sampling; likelihoods and greedy texts repeat themselves.
            instance.resps = [response] * (instance.repeats or 1)
            instance.filtered_resps = {}
        for name, task in self._tasks.items():
            task._instances = [instance for instance in flat if instance.task_name == name]
            if task._instances:
                task.apply_filters()
        values, margins, first = [], [], 0
        for (name, _, doc), group in zip(documents, groups, strict=True):
            task = self._tasks[name]
            value = self._metric_value(task, doc, group)
            values.append(value)
            if task.OUTPUT_TYPE == "multiple_choice":
                margins.append(_choice_margin(task, doc, [response[0] for response in responses[first:][: len(group)]]))
            else:
                margins.append(value if per_token is None else per_token[first])
            first += len(group)
        strata = tuple(name for name, _, _ in documents) if len(self._tasks) > 1 else ()
        return TaskScore(self.name, split, np.array(values), np.array(margins), strata)

    def _metric_value(self, task: Any, doc: Any, group: list[Instance]) -> float:
        chosen = self.chosen_filter(list(group[0].filtered_resps))
        return self.value(task, task.process_results(doc, [instance.filtered_resps[chosen] for instance in group]))

    def chosen_filter(self, filters: Sequence[str]) -> str:
        """Of a document's filters, in lm-eval's order, the one that is scored. Raises `UsageError` if it has none."""
        chosen = self._filter or filters[0]
        if chosen not in filters:
            raise UsageError(f"task {self.name!r}: metric: no filter {chosen!r}; it has {', '.join(filters)}")
        return chosen

    def value(self, task: Any, results: Mapping[str, Any]) -> float:
        """The score among a document's `results` as lm-eval's `process_results` gives them. Raises `UsageError`."""
        metric = self._metric
        if metric in ("", "accuracy") and metric not in results:
            metric = "acc" if "acc" in results else next(iter(results))
        value = results.get(metric)
        if metric in _UNITS and isinstance(value, tuple):
            return float(np.exp(value[0] / max(1, value[1])))
        if isinstance(value, bool | int | float | np.number) and task.higher_is_better().get(metric, True):
            return float(value)
        usable = [
            key
            for key, entry in results.items()
            if key in _UNITS
            or (isinstance(entry, bool | int | float | np.number) and task.higher_is_better().get(key, True))
        ]
        raise UsageError(
            f"task {self.name!r}: metric {metric!r} gives no score a sample where higher is better; "
            f"use one of {', '.join(usable) or 'another task'}"
        )


def _load(name: str, spec: str, shots: int | None) -> dict[str, Any]:
    """Leaf tasks of `spec` by name, with the number of examples settled."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"task {name!r}: lm_eval: the package lm-eval is not installed ({error})") from error
    is_file = spec.endswith((".yaml", ".yml"))
    if is_file and not Path(spec).is_file():
        raise UsageError(f"task {name!r}: lm_eval: no file {spec}")
    manager = TaskManager(include_defaults=not is_file)
    if not is_file and spec not in manager.all_tasks:
        raise UsageError(f"task {name!r}: lm_eval: {spec!r} is neither a task nor a group of lm-eval nor a YAML file")
    try:
        tasks = manager.load([spec])["tasks"]
    except DtrError:
        raise
    except Exception as error:  # a task may run any code of its own, and datasets raises what its file systems raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"task {name!r}: lm_eval: {spec} could not be loaded ({reason})") from error
    for task in tasks.values():
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
    return dict(tasks)


def _choice_margin(task: Any, doc: Any, log_probs: list[float]) -> float:
    """Log-probability of the right choice among the choices (of the best right one where there are several)."""
    choices = task.doc_to_choice(doc) if hasattr(task, "doc_to_choice") else doc["choices"]
    if hasattr(task, "multiple_input") and task.multiple_input:
        gold = task.doc_to_text(doc)
    elif hasattr(task, "doc_to_choice"):
        gold = task.doc_to_target(doc)
    else:
        gold = doc["gold"]
    golds = [choices.index(g) if isinstance(g, str) else int(g) for g in (gold if isinstance(gold, list) else [gold])]
    # Mutual-information metrics append the unconditional likelihoods: the choices' own come first.
    return float(log_softmax(np.asarray(log_probs[: len(choices)]))[golds].max())
