"""What commands print where: --json for scripts, -q and -v, the run's log, completion. Stages are replaced, not run."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dtr_deploy import cli, pipeline
from dtr_deploy.errors import UsageError
from dtr_deploy.progress import Progress
from dtr_deploy.recipe import Recipe
from dtr_deploy.report.schema import REPORT
from dtr_deploy.run_dir import RunDir
from dtr_deploy.run_log import LOG
from dtr_deploy.search.objective import InfeasibleTarget, Loss, Visit
from dtr_deploy.throughput.performance import Performance
from tests.product.recipes import write_recipe
from tests.product.reports import small_report


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_slow(*arguments: object) -> Result:
    """`run`, of what warns."""
    with pytest.warns(UserWarning, match="something is slow"):
        return run(*arguments)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, and a pipeline that says a line, fills a bar, warns, logs and returns a report."""

    def build(recipe: Recipe, run: RunDir, progress: Progress, until: str) -> Any:
        progress.line("a line for a person")
        with progress.bar("training", total=3) as bar:
            bar.advance(3, note="error 0.1")
        logging.getLogger("dtr_deploy.stage").debug("a detail")
        logging.getLogger("library").info("a library's notice")
        logging.getLogger("library").warning("a library's warning")
        warnings.warn("something is slow", stacklevel=1)
        return small_report() if until == "report" else None

    monkeypatch.setattr(pipeline, "build", build)
    return write_recipe(tmp_path)


def test_json_is_all_there_is_on_stdout(recipe: Path, tmp_path: Path) -> None:
    done = run_slow("build", "--recipe", recipe, "--runs", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(small_report().to_json())
    assert "a line for a person" in done.stderr and f"built: {tmp_path / 'small'}" in done.stderr
    twins = run_slow("distill", "--recipe", recipe, "--runs", tmp_path, "--json")
    assert json.loads(twins.stdout) == {"run": str(tmp_path / "small"), "seconds": {}}


def test_quiet_leaves_the_json_and_what_is_wrong(recipe: Path, tmp_path: Path) -> None:
    done = run_slow("build", "--recipe", recipe, "--runs", tmp_path, "-q")
    assert done.exit_code == 0 and done.stdout == ""
    assert "a line" not in done.stderr and "built" not in done.stderr
    both = run_slow("build", "--recipe", recipe, "--runs", tmp_path, "-q", "--json")
    assert json.loads(both.stdout)["recipe"] == json.loads(small_report().to_json())["recipe"]
    refused = run("build", "--recipe", tmp_path / "none.yaml", "-q")
    assert refused.exit_code == 1 and "no such recipe file" in refused.stderr
    assert "one of the two is accepted" in run("build", "--recipe", recipe, "-q", "-v").stderr


@pytest.mark.parametrize("verbose", [False, True])
def test_details_are_logged_and_shown_if_asked_for(recipe: Path, tmp_path: Path, verbose: bool) -> None:
    """In a process of its own: what loggers do is process-wide."""
    arguments = ["build", "--recipe", str(recipe), "--runs", str(tmp_path), *(["-v"] if verbose else [])]
    program = (
        "import sys, logging, warnings\n"
        "from dtr_deploy import cli, pipeline\n"
        "def build(recipe, run, progress, until):\n"
        "    logging.getLogger('dtr_deploy.stage').debug('a detail')\n"
        "    logging.getLogger('library').warning('a library warns')\n"
        "    warnings.warn('something is slow')\n"
        "pipeline.build = build\n"
        f"sys.argv = ['dtr-deploy', *{arguments!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("a detail" in done.stderr) is verbose
    assert "WARNING library: a library warns" in done.stderr and "something is slow" in done.stderr
    log = (tmp_path / "small" / LOG).read_text()
    assert "a detail" in log and "a library warns" in log and "something is slow" in log


def test_the_log_tells_what_was_asked_done_and_how_it_ended(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_slow("build", "--recipe", recipe, "--runs", tmp_path, "-q")
    file = tmp_path / "small" / LOG
    lines = file.read_text().splitlines()
    assert f"dtr-deploy build --recipe {recipe}" in lines[0] and "torch" in lines[1]
    for words in ("a line for a person", "training: 3 of 3", "a library's notice", "something is slow"):
        assert any(words in line for line in lines), words
    assert lines[-1].endswith("finished")
    assert not any(getattr(handler, "baseFilename", "").endswith(LOG) for handler in logging.getLogger().handlers)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by zero")

    def refused(*_: Any) -> None:
        raise UsageError("not like this")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    for pipeline_build, words in ((broken, "Traceback"), (refused, "UsageError: not like this"), (stopped, "stopped")):
        monkeypatch.setattr(pipeline, "build", pipeline_build)
        run("build", "--recipe", recipe, "--runs", tmp_path)
        new = file.read_text().splitlines()[len(lines) :]
        assert new and any(words in line for line in new), (words, new)
        lines += new


def test_a_target_out_of_reach_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Loss(combined=0.012, standard_error=0.01, tasks={})
    speed = Performance(1.07, 1.0, 0.01, 1)
    visit = Visit((None, "gla"), score=0.85, margin=0.0, loss=loss, performance=speed, passes=True)

    def build(*_: Any) -> None:
        raise InfeasibleTarget("target.speedup: 1.2 times the backbone was not reached", [visit])

    monkeypatch.setattr(pipeline, "build", build)
    done = run("build", "--recipe", write_recipe(tmp_path), "--runs", tmp_path, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 2 and "was not reached" in found["error"]
    assert found["frontier"][0]["layout"] == [None, "gla"]


def test_json_of_reports_is_the_report(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / REPORT).write_bytes(small_report().to_json())
    shown = run("show", tmp_path / "one", "--json")
    assert json.loads(shown.stdout) == json.loads((tmp_path / "one" / REPORT).read_bytes())
    compared = json.loads(run("compare", tmp_path / "one", tmp_path / "two", "--json").stdout)
    assert list(compared) == ["one", "two"] and compared["one"]["layers replaced"] == "3 of 4"


def test_json_of_plan_and_doctor() -> None:
    plan = json.loads(run("plan", "--recipe", Path(__file__).parents[2] / "recipes/quickstart.yaml", "--json").stdout)
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"]))
    assert {stage["stage"] for stage in plan["stages"]} >= {"distill", "search", "parity"} and plan["disk_bytes"] > 1e8
    doctor = json.loads(run("doctor", "--json").stdout)
    assert doctor["hardware"]["cores"] >= 1 and doctor["engines"]["torch"]["usable"] and doctor["versions"]["torch"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    """As the shells call it; `dtr-deploy --install-completion` writes their side of it."""

    def complete(words: str) -> str:
        asked = {"_DTR_DEPLOY_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        asked |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        command = [Path(sys.executable).with_name("dtr-deploy")]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | asked).stdout

    assert "build" in complete("dtr-deploy bu") and "plan" not in complete("dtr-deploy bu")
    assert "--recipe" in complete("dtr-deploy build --re")
