"""The lm-eval adapter and task against lm_eval's own HFLM and evaluator, on local YAML tasks. No network."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dtr_deploy.errors import ParityFailed, UsageError
from dtr_deploy.progress import QuietProgress
from dtr_deploy.report.schema import LmEvalReportRow
from dtr_deploy.tasks.base import SPLITS, Task
from dtr_deploy.tasks.lm_eval_adapter import DtrLM
from dtr_deploy.tasks.lm_eval_check import check_scores, gate, lm_eval_values
from dtr_deploy.tasks.lm_eval_task import LmEvalTask
from tests.tiny import tiny_backbone, tiny_hybrid, tiny_tokenizer

TOLERANCE = 2e-3  # nats on sums over up to 60 tokens, float32 on both sides
ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl", "ant", "bee")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{{files}}}}}
{splits}
output_type: {kind}
doc_to_text: "Animal {{{{text}}}}?"
{rest}
"""
CHOICE = 'doc_to_target: answer\ndoc_to_choice: ["yes", "no sir"]\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
WRITTEN = (
    'doc_to_target: "{{target}}"\ngeneration_kwargs: {until: ["e"], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match}]"
)
LIKELY = 'doc_to_target: "{{text}}"\nmetric_list: [{metric: acc}, {metric: perplexity}]'
ROLLING = 'doc_to_target: "A {{text}} of size {{answer}}."\nmetric_list: [{metric: word_perplexity}]'


def write_task(folder: Path, kind: str, rest: str, both: bool = False, shots: int = 0, name: str = "animals") -> str:
    for split, count in (("train", 6), ("validation", 14), ("test", 13)):
        rows = [{"text": f"{split} {ANIMALS[i % 8]} {i}", "answer": i % 2} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["train", "validation", "test"] if both else ["train", "validation"]
    files = ", ".join(f"{split}: {folder / split}.jsonl" for split in names)
    keys = {"train": "training_split: train", "validation": "validation_split: validation", "test": "test_split: test"}
    splits = "\n".join(keys[split] for split in names) + f"\nfewshot_split: train\nnum_fewshot: {shots}"
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, files=files, splits=splits, kind=kind, rest=rest))
    return str(path)


@pytest.fixture(autouse=True)
def _local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def hflm(model: Any) -> HFLM:
    return HFLM(
        pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4, max_length=model.config.max_position_embeddings
    )


def evaluate(lm: Any, path: str, samples: list[int] | None = None, seed: int = 0) -> Any:
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=[path],
        task_manager=TaskManager(include_defaults=False),
        samples={"animals": samples} if samples else None,
        bootstrap_iters=0,
        fewshot_random_seed=seed,
    )


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [tiny_backbone, tiny_hybrid], ids=["backbone", "hybrid"])
def test_loglikelihoods_equal_lm_evals_own(make: Any) -> None:
    model = make()
    pairs = [(f"the {a} says ", "moo moo") for a in ANIMALS] + [("the cat", " mew"), ("the cat", " mow"), ("", "owl")]
    requests = instances("loglikelihood", pairs)
    ours, theirs = DtrLM(model, tiny_tokenizer()).loglikelihood(requests), hflm(model).loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], atol=TOLERANCE)
    assert [b for _, b in ours] == [b for _, b in theirs]


def test_texts_beyond_the_context_are_cut_and_windowed_as_in_lm_eval() -> None:
    model = tiny_backbone()
    model.config.max_position_embeddings = 24
    ours, theirs = DtrLM(model, tiny_tokenizer()), hflm(model)
    pairs = instances("loglikelihood", [("a long context of more than twenty four bytes", " tail")])
    assert ours.loglikelihood(pairs)[0][0] == pytest.approx(theirs.loglikelihood(pairs)[0][0], abs=TOLERANCE)
    texts = instances(
        "loglikelihood_rolling", [("sixty tokens of text, so that it takes three windows to see it.",), ("ab",)]
    )
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), atol=TOLERANCE)
    with pytest.raises(UsageError, match="exceeds a context of 24"):
        ours.loglikelihood(instances("loglikelihood", [("a", "b" * 30)]))


@pytest.mark.parametrize("make", [tiny_backbone, tiny_hybrid], ids=["backbone", "hybrid"])
def test_generation_equals_lm_evals_own(make: Any) -> None:
    model = make()
    settings = [{"until": ["e", "\n"], "max_gen_toks": 8}, {"until": [], "max_gen_toks": 5, "do_sample": False}]
    contexts = [f"{a} and more {a * n}" for n, a in enumerate(ANIMALS)]
    requests = instances("generate_until", [(text, settings[i % 2]) for i, text in enumerate(contexts)])
    ours = DtrLM(model, tiny_tokenizer(), batch_tokens=100).generate_until(requests)
    # One at a time: HFLM's own padded batches are no reference for a recurrent layer.
    theirs = [hflm(model).generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert ours == theirs and any(ours)


def test_drafts_of_another_model_change_no_text() -> None:
    drafts: dict[tuple[int, ...], tuple[int, ...]] = {}
    contexts = ["cat dog", "a longer context of words", "owl"]
    requests = instances("generate_until", [(text, {"until": ["e"], "max_gen_toks": 9}) for text in contexts])
    for model in (tiny_backbone(), tiny_backbone(), tiny_hybrid(), tiny_backbone(seed=1)):
        ours = DtrLM(model, tiny_tokenizer(), drafts=drafts).generate_until(requests)
        theirs = [hflm(model).generate_until([request], disable_tqdm=True)[0] for request in requests]
        assert ours == theirs
        assert len(drafts) == len(contexts)


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_equal_lm_evals_evaluator(tmp_path: Path, shots: int) -> None:
    path, model = write_task(tmp_path, "multiple_choice", CHOICE, shots=shots), tiny_backbone()
    task = LmEvalTask("animals", tiny_tokenizer(), path, metric="acc_norm")
    # Few-shot examples are drawn document after document, so only the same documents in the same order compare: all
    # of them in lm-eval's order.
    whole = evaluate(hflm(model), path)["samples"]["animals"]
    by_doc = {sample["doc_id"]: sample for sample in whole}
    for split in SPLITS:
        score = task.score(model, split)
        for (_, index, doc), hit, margin in zip(task.documents(split), score.per_item, score.margins, strict=True):
            assert doc == by_doc[index]["doc"]
            if shots == 0:
                values = [float(response[0][0]) for response in by_doc[index]["resps"]]
                assert hit == by_doc[index]["acc_norm"]
                assert margin == pytest.approx(values[doc["answer"]] - np.logaddexp(*values), abs=TOLERANCE)
    if shots:
        text = task.tokenizer.decode(task.requests("search")[0].context)
        assert text.count("Animal train") == shots


def test_splits_are_disjoint_and_limited(tmp_path: Path) -> None:
    path = write_task(tmp_path, "multiple_choice", CHOICE)
    task = LmEvalTask("animals", tiny_tokenizer(), path)
    chosen = [[index for _, index, _ in task.documents(split)] for split in SPLITS]
    assert sorted(index for part in chosen for index in part) == list(range(14))
    limited = LmEvalTask("animals", tiny_tokenizer(), path, items=3)
    few = [[index for _, index, _ in limited.documents(split)] for split in SPLITS]
    assert few[:2] == [part[:3] for part in chosen[:2]]
    assert set(few[2]) < set(chosen[2]) and few[2] == sorted(few[2]), "lm-eval's own order"
    assert len({limited.fingerprint(split) for split in SPLITS}) == 3


def test_a_test_split_of_its_own_is_used(tmp_path: Path) -> None:
    task = LmEvalTask("animals", tiny_tokenizer(), write_task(tmp_path, "multiple_choice", CHOICE, both=True))
    texts = {split: [doc["text"] for _, _, doc in task.documents(split)] for split in SPLITS}
    assert len(texts["test"]) == 13 and all(text.startswith("test") for text in texts["test"])
    assert len(set(texts["search"] + texts["confirm"])) == 14


def test_hidden_states_from_elsewhere_give_the_same_score(tmp_path: Path) -> None:
    task = LmEvalTask("animals", tiny_tokenizer(), write_task(tmp_path, "multiple_choice", CHOICE))
    model = tiny_hybrid()
    assert isinstance(task, Task) and task.resumable
    hidden = [
        model.model(b.input_ids, attention_mask=b.attention_mask, use_cache=False).last_hidden_state
        for b in task.batches("confirm")
    ]
    one, other = task.read("confirm", hidden, model.lm_head), task.score(model, "confirm")
    np.testing.assert_array_equal(one.per_item, other.per_item)
    # Sums of log-probabilities in float32: a rounding or two of -65.
    np.testing.assert_allclose(one.margins, other.margins, rtol=1e-6, atol=1e-5)


def test_generation_tasks_equal_lm_evals_evaluator(tmp_path: Path) -> None:
    path, model = write_task(tmp_path, "generate_until", WRITTEN), tiny_backbone()
    # Every second document's right answer is what the model happens to write.
    for name in ("train", "validation"):
        file = tmp_path / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        arguments = [(f"Animal {row['text']}?", {"until": ["e"], "max_gen_toks": 6}) for row in rows]
        written = hflm(model).generate_until(instances("generate_until", arguments), disable_tqdm=True)
        for index, row in enumerate(rows):
            row["target"] = written[index] if index % 2 else "something else"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = LmEvalTask("animals", tiny_tokenizer(), path)
    assert not task.resumable
    with pytest.raises(UsageError, match="generates text"):
        task.batches("search")
    by_doc = {sample["doc_id"]: sample["exact_match"] for sample in evaluate(hflm(model), path)["samples"]["animals"]}
    assert set(by_doc.values()) == {0.0, 1.0}
    for split in SPLITS:
        expected = [by_doc[index] for _, index, _ in task.documents(split)]
        assert task.score(model, split).per_item.tolist() == expected
    assert task.fingerprint("search") != task.fingerprint("confirm")


@pytest.mark.parametrize(("kind", "rest"), [("loglikelihood", LIKELY), ("loglikelihood_rolling", ROLLING)])
def test_likelihood_tasks_score_a_document(tmp_path: Path, kind: str, rest: str) -> None:
    path, model = write_task(tmp_path, kind, rest), tiny_backbone()
    task = LmEvalTask("animals", tiny_tokenizer(), path)
    score = task.score(model, "search")
    by_doc = {s["doc_id"]: s for s in evaluate(hflm(model), path)["samples"]["animals"]}
    for (_, index, doc), value, margin in zip(task.documents("search"), score.per_item, score.margins, strict=True):
        sample = by_doc[index]
        if kind == "loglikelihood":
            log_prob, greedy = sample["filtered_resps"][0]
            assert value == greedy
            assert margin == pytest.approx(log_prob / len(doc["text"]), abs=TOLERANCE)
        else:
            log_prob, words = sample["word_perplexity"]
            assert value == pytest.approx(np.exp(log_prob / words), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "rest", "shots"),
    [("multiple_choice", CHOICE, 0), ("multiple_choice", CHOICE, 3), ("loglikelihood_rolling", ROLLING, 0)],
)
def test_lm_eval_itself_finds_the_same_score_of_a_hybrid(tmp_path: Path, kind: str, rest: str, shots: int) -> None:
    path, model = write_task(tmp_path, kind, rest, both=True, shots=shots), tiny_hybrid()
    task = LmEvalTask("animals", tiny_tokenizer(), path, items=7, seed=3)
    ours = task.score(model, "test").per_item
    np.testing.assert_allclose(lm_eval_values(model, tiny_tokenizer(), task, "test"), ours, atol=TOLERANCE)
    progress = QuietProgress()
    (row,) = check_scores(model, tiny_tokenizer(), [object(), task], {"animals": float(ours.mean())}, progress)
    assert row.passed and row.documents == 7 and row.lm_eval == pytest.approx(ours.mean())
    gate([row])
    (row,) = check_scores(model, tiny_tokenizer(), [task], {"animals": float(ours.mean()) + 0.9}, progress)
    with pytest.raises(ParityFailed, match="task 'animals': lm-eval scores the hybrid"):
        gate([row])


@pytest.mark.parametrize(
    ("theirs", "passed", "verdict"),
    [(0.8, True, "equal"), (0.81, True, "within a standard error"), (0.9, False, "DIFFERENT")],
)
def test_only_the_same_score_is_called_equal(theirs: float, passed: bool, verdict: str) -> None:
    row = LmEvalReportRow(task="a", documents=9, ours=0.8, lm_eval=theirs, standard_error=0.05, passed=passed)
    assert row.verdict == verdict and "verdict" not in row.model_dump()


def test_bad_names_and_metrics_are_one_line(tmp_path: Path) -> None:
    tokenizer, path = tiny_tokenizer(), write_task(tmp_path, "multiple_choice", CHOICE)
    with pytest.raises(UsageError, match=r"^task 'x': lm_eval: no file nowhere.yaml$"):
        LmEvalTask("x", tokenizer, "nowhere.yaml")
    with pytest.raises(UsageError, match=r"metric 'bleu' gives no score .* use one of acc, acc_norm"):
        LmEvalTask("x", tokenizer, path, metric="bleu").score(tiny_backbone(), "search")
    with pytest.raises(UsageError, match="no filter 'strict'; it has none"):
        LmEvalTask("x", tokenizer, path, metric="acc,strict").score(tiny_backbone(), "search")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UsageError, match="could not be loaded"):
        LmEvalTask("x", tokenizer, path)


def test_lm_eval_is_imported_only_when_a_recipe_names_it() -> None:
    import subprocess
    import sys

    code = "import sys, dtr_deploy.tasks; assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_backbone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    LmEvalTask("animals", tiny_tokenizer(), write_task(tmp_path, "multiple_choice", CHOICE)).score(model, "search")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
