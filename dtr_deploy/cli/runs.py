"""Commands about finished runs: check, measure, look at, compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtr_deploy.cli.terminal import AsJson, Debug, Quiet, RunFolder, Terminal, Verbose, one_line_errors, open_run
from dtr_deploy.errors import UsageError

if TYPE_CHECKING:
    from dtr_deploy.report.schema import Report


def verify(
    run: RunFolder, as_json: AsJson = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False
) -> None:
    """Check a run: sha256 of every artefact, then the whole parity ladder on the build's own prompts."""
    again = f"dtr-deploy verify {run}"
    with one_line_errors(debug, again):
        from dtr_deploy.parity.prove import prove, read_prompts
        from dtr_deploy.plan import check_engines
        from dtr_deploy.progress import StopRequest
        from dtr_deploy.run_log import run_log

        terminal = Terminal(as_json, quiet, verbose)
        opened, recipe = open_run(run)
        check_engines(recipe)
        stop = StopRequest()
        shown = terminal.progress(stop)
        with opened.lock(), run_log(opened.path, again, shown) as progress, stop.listening(shown):
            files = sum(opened.check_artefacts(stage) for stage in opened.stages)
            progress.line(f"{files} artefacts are what the build wrote")
            rows = prove(recipe, opened.path, read_prompts(opened.path), progress)
        terminal.answer({"artefacts": files, "parity": [row.to_dict() for row in rows]})
        terminal.say(f"verified: {len(rows)} of {len(rows)} programs agree")


def bench(
    run: RunFolder, as_json: AsJson = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False
) -> None:
    """Measure a run's throughput again, base and hybrid, and write bench.json."""
    again = f"dtr-deploy bench {run}"
    with one_line_errors(debug, again):
        from dtr_deploy.benchmark import benchmark
        from dtr_deploy.parity.rungs import benchmarked
        from dtr_deploy.plan import check_engines
        from dtr_deploy.progress import StopRequest
        from dtr_deploy.report.tables import throughput_rows_table
        from dtr_deploy.run_dir import write_atomically
        from dtr_deploy.run_log import run_log
        from dtr_deploy.serving import base_of

        terminal = Terminal(as_json, quiet, verbose)
        opened, recipe = open_run(run)
        check_engines(recipe)
        context = json.loads((base_of(opened.path).checkpoint / "config.json").read_text())["max_position_embeddings"]
        stop = StopRequest()
        shown = terminal.progress(stop)
        with opened.lock(), run_log(opened.path, again, shown) as progress, stop.listening(shown):
            rows = [
                row
                for engine, precision in benchmarked(recipe)
                for row in benchmark(recipe, opened.path, engine, precision, context, progress)
            ]
        data = [row.model_dump(mode="json") for row in rows]
        write_atomically(opened.path / "bench.json", json.dumps(data, indent=1).encode())
        terminal.answer(data)
        if not as_json:
            terminal.show(throughput_rows_table(rows))


def show(run: RunFolder, as_json: AsJson = False, debug: Debug = False) -> None:
    """A run's report: layout, scores, throughput, parity, time."""
    with one_line_errors(debug):
        from dtr_deploy.report.tables import parts

        terminal = Terminal(as_json)
        report = read_report(run)
        terminal.answer(report.model_dump(mode="json"))
        for part in parts(report) if not as_json else ():
            terminal.show(part)
            terminal.show("")


def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The file to write; report.html in the run's folder.")] = None,
    debug: Debug = False,
) -> None:
    """A run's report as one HTML file that opens offline. `build` writes it too; this writes it again."""
    with one_line_errors(debug):
        from dtr_deploy.report.page import PAGE, page
        from dtr_deploy.run_dir import write_atomically

        target = out or run / PAGE
        text = page(read_report(run))
        if not target.parent.is_dir():
            raise UsageError(f"--out {target}: there is no folder {target.parent}")
        write_atomically(target, text.encode())
        typer.echo(f"report: {target}")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, two or more.", show_default=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Runs side by side: layout, scores, speedups, memory, parity, time."""
    with one_line_errors(debug):
        from dtr_deploy.report.compare import comparison, facts

        if len(runs) < 2:
            raise UsageError("name two runs or more; `dtr-deploy show` shows one")
        names = [run.resolve().name for run in runs]
        distinct = len(set(names)) == len(names)
        found = {name if distinct else str(run): read_report(run) for name, run in zip(names, runs, strict=True)}
        if len(found) < len(runs):
            raise UsageError(f"{_first_twice(runs)}: named twice")
        terminal = Terminal(as_json)
        terminal.answer({name: facts(report) for name, report in found.items()})
        if not as_json:
            terminal.show(comparison(found))


def push(
    run: RunFolder,
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there.", show_default=False)],
    onnx: Annotated[
        list[str] | None, typer.Option(help="Also onnx/PRECISION of the run; may be repeated.", show_default=False)
    ] = None,
    report: Annotated[bool, typer.Option(help="Also report.json and report.html.")] = True,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made now.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, in place of main.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and send nothing.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Publish a finished run on the Hugging Face hub, in one commit: the checkpoint, its card, the report. Files are
    compared with the manifest before; log in with `hf auth login` or HF_TOKEN."""
    with one_line_errors(debug):
        from dtr_deploy.export.hub import files_to_push
        from dtr_deploy.export.hub import push as push_files
        from dtr_deploy.report.tables import new_table

        terminal = Terminal(as_json)
        opened, _ = open_run(run)
        with opened.lock():
            files = files_to_push(opened, onnx or [], report)
            table = new_table(f"To {repo_id}", "file", "MiB")
            for name, file in files.items():
                table.add_row(name, f"{file.stat().st_size / 2**20:,.1f}")
            terminal.show(table)
            if dry_run:
                terminal.answer({"files": {name: file.stat().st_size for name, file in files.items()}})
                terminal.say("nothing was sent")
                return
            done = push_files(files, repo_id, private=private, revision=revision, message=message, create_pr=create_pr)
        terminal.answer({"url": done.url, "files": done.files})
        terminal.say(f"pushed: {done.url}")
        terminal.say(f"serve it where dtr-deploy is installed: vllm serve {repo_id}")


def read_report(run: Path) -> Report:
    """The report in a run's folder; raises `UsageError` if there is none."""
    from dtr_deploy.report.schema import REPORT
    from dtr_deploy.report.schema import read_report as read

    if not run.is_dir():
        raise UsageError(f"{run}: no such run; accepted: a folder that `dtr-deploy build` made")
    return read(run / REPORT)


def _first_twice(runs: Sequence[Path]) -> Path:
    return next(run for index, run in enumerate(runs) if run in runs[:index])
