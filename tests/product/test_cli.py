"""The command line: exit codes, one line an error, and a quick --help. Stages are replaced, not run."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dtr_deploy import cli, pipeline
from dtr_deploy.errors import ParityFailed, UsageError
from dtr_deploy.report.schema import REPORT
from dtr_deploy.run_dir import RunDir
from dtr_deploy.search.objective import InfeasibleTarget, Loss, Visit
from dtr_deploy.throughput.performance import Performance
from tests.product.recipes import write_recipe
from tests.product.reports import small_report


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    """stderr, which has to be one line that begins with the program's name."""
    assert result.stderr.startswith("dtr-deploy: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def build_that(monkeypatch: pytest.MonkeyPatch):
    """Make the pipeline raise an error, or return a report."""

    def replace(outcome: Any) -> None:
        def build(*_: Any, **__: Any) -> Any:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(pipeline, "build", build)

    return replace


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """Its own process, as a person starts it. A torch import takes seconds; 1.5 s leaves room for a busy machine."""
    check = (
        "import sys; from dtr_deploy.cli import main; sys.argv = ['dtr-deploy', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'pydantic', 'vllm', 'onnxruntime'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    for word in ("build", "plan", "distill", "search", "export", "verify", "bench", "show", "push", "doctor"):
        assert f"\n  {word} " in done.stdout
    assert "0 done; 1 wrong input" in done.stdout and "2 no layout reaches" in done.stdout
    assert min(seconds) < 1.5, seconds


def test_importing_the_package_imports_nothing_heavy() -> None:
    check = (
        "import sys, dtr_deploy, dtr_deploy.hybrid; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@pytest.mark.parametrize("arguments", [["nonsense"], ["build"], ["build", "--recipee", "x"], ["show"]])
def test_mistakes_on_the_command_line_are_exit_code_1(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and "(see --help)" in one_line(result)


def test_version_and_bare_call() -> None:
    assert run("--version").stdout.startswith("dtr-deploy ")
    assert "Commands:" in run().stderr + run().stdout


def test_bad_recipes_are_exit_code_1(tmp_path: Path) -> None:
    for command in ("build", "plan", "distill", "search", "export"):
        result = run(command, "--recipe", tmp_path / "none.yaml")
        assert result.exit_code == 1 and "no such recipe file" in one_line(result)
    result = run("build", "--recipe", write_recipe(tmp_path, "window: 64", "windw: 64"))
    assert result.exit_code == 1 and "did you mean 'window'?" in one_line(result)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("model 'x' is of type 'gpt2': accepted are llama, qwen2, qwen3"), 1, "accepted are llama"),
        (ParityFailed("parity failed on 1 of 5: ort fp32"), 3, "parity failed on 1 of 5"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/y"), 1, "disk full while writing runs/x/y"),
        (RuntimeError("No space left on device (os error 28)"), 1, "disk full"),
        (KeyboardInterrupt(), 130, "nothing finished is lost, to go on: dtr-deploy build --recipe"),
        (
            torch.OutOfMemoryError("Tried to allocate 2 GiB\nand more"),
            1,
            "GPU memory full; a smaller distill.twins_at_once",
        ),
        (ZeroDivisionError("division by zero\nand more"), 1, "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_errors_of_a_build(tmp_path: Path, build_that, error: BaseException, code: int, says: str) -> None:
    build_that(error)
    result = run("build", "--recipe", write_recipe(tmp_path), "--runs", tmp_path)
    assert result.exit_code == code and says in one_line(result)


def test_debug_shows_the_traceback(tmp_path: Path, build_that) -> None:
    build_that(UsageError("something is wrong"))
    result = run("build", "--recipe", write_recipe(tmp_path), "--runs", tmp_path, "--debug")
    assert result.exit_code == 1 and "Traceback" in result.stderr and "dtr-deploy: something is wrong" in result.stderr


def test_an_infeasible_target_is_exit_code_2_with_the_frontier(tmp_path: Path, build_that) -> None:
    loss = Loss(combined=0.012, standard_error=0.01, tasks={})
    visit = Visit(
        (None, "gla"), score=0.85, margin=0.0, loss=loss, performance=Performance(1.07, 1.0, 0.01, 1), passes=True
    )
    build_that(InfeasibleTarget("target.speedup: 1.2 times the backbone was not reached", [visit]))
    result = run("build", "--recipe", write_recipe(tmp_path), "--runs", tmp_path)
    assert result.exit_code == 2 and "was not reached" in one_line(result)
    assert "Frontier" in result.stdout and "1.07x" in result.stdout and "0.850" in result.stdout


def test_a_build_ends_with_the_tables(tmp_path: Path, build_that) -> None:
    build_that(small_report())
    result = run("build", "--recipe", write_recipe(tmp_path), "--runs", tmp_path)
    assert result.exit_code == 0, result.stderr
    for title in ("Scores", "Throughput", "Parity", "Time", f"built: {tmp_path / 'small'}"):
        assert title in result.stdout


def test_a_run_that_another_process_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir(tmp_path / "small").lock():
        result = run("build", "--recipe", write_recipe(tmp_path), "--runs", tmp_path)
    assert result.exit_code == 1 and f"process {os.getpid()} is working on this run" in one_line(result)


def test_show(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_bytes(small_report().to_json())
    result = run("show", tmp_path)
    assert result.exit_code == 0 and "3 of 4 layers replaced" in result.stdout
    (tmp_path / REPORT).write_text('{"schema_version": 99}')
    assert run("show", tmp_path).exit_code == 1 and "schema_version 99; accepted: 1" in one_line(run("show", tmp_path))
    (tmp_path / REPORT).unlink()
    assert "no report yet" in one_line(run("show", tmp_path))
    assert "no such run" in one_line(run("show", tmp_path / "none"))


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_commands_on_what_is_no_run(tmp_path: Path, command: str) -> None:
    result = run(command, tmp_path)
    assert result.exit_code == 1 and "not a run of dtr-deploy" in one_line(result)


def test_doctor_names_every_engine() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.stderr
    for word in ("Processor:", "Instruction sets:", "Memory:", "GPUs:", "torch", "vllm", "ort", "genai"):
        assert word in result.stdout


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtr_deploy.engines import vllm

    monkeypatch.setattr(vllm, "available", lambda: (False, "vLLM is not installed"))
    result = run("build", "--recipe", write_recipe(tmp_path), "--runs", tmp_path)
    assert result.exit_code == 1
    assert "export.vllm: engine vllm cannot be used here (vLLM is not installed)" in one_line(result)
