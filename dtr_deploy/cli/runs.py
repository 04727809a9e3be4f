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
    repo_id: Annotated[str, typer.Argument(help="The repository: OWNER/NAME.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    onnx: Annotated[
        list[str] | None, typer.Option(help="An ONNX export to add, by precision; may be repeated.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, made if missing; main if left out.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default=False)] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    with_report: Annotated[bool, typer.Option("--report/--no-report", help="report.json and report.html.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, upload nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Publish a finished run on the Hugging Face Hub: checkpoint, model card and report, in one commit. The token comes
    from HF_TOKEN or `hf auth login`."""
    with one_line_errors(debug, f"dtr-deploy push {run} {repo_id}"):
        from dtr_deploy.export import hub
        from dtr_deploy.progress import for_terminal
        from dtr_deploy.run_dir import RunDir

        to = hub.Destination(repo_id, private, revision, create_pr, **({} if message is None else {"message": message}))
        to.check()
        opened, progress = RunDir(run, create=False), for_terminal()
        with opened.lock():
            uploads = hub.checked_uploads(opened, hub.finished_report(opened), onnx or [], with_report, progress)
            if dry_run:
                for upload in uploads:
                    typer.echo(f"{hub.size_text(upload.bytes):>12}  {upload.path}")
                total = hub.size_text(sum(upload.bytes for upload in uploads))
                typer.echo(f"would upload {len(uploads)} files, {total}, to {repo_id}; nothing was sent")
                return
            pushed = hub.push(uploads, to, progress)
        for path in pushed.removed:
            typer.echo(f"removed: {path}, of an earlier checkpoint")
        typer.echo(f"{'published' if pushed.changed else 'nothing has changed'}: {pushed.url}")
        at = f" --revision {pushed.revision}" if pushed.revision else ""
        typer.echo(f"serve it where dtr-deploy is installed: vllm serve {pushed.repo_id}{at}")


def read_report(run: Path) -> Report:
    """The report in a run's folder; raises `UsageError` if there is none."""
    from dtr_deploy.report.schema import REPORT
    from dtr_deploy.report.schema import read_report as read

    if not run.is_dir():
        raise UsageError(f"{run}: no such run; accepted: a folder that `dtr-deploy build` made")
    return read(run / REPORT)


def _first_twice(runs: Sequence[Path]) -> Path:
    return next(run for index, run in enumerate(runs) if run in runs[:index])
