"""`python -m benchmarks.cluster`: what a cluster costs. Stages 1 and 2 of a recipe by N Ray workers of one core each,
beside one process with N threads, on this machine. Bits depend on a process's threads, so that it is with one thread
only (`--threads 1`) that results have to be the same.

Both do the same work: every replaced layer is taken to save the same time, so that nothing is measured and both search
on the same grounds. Starting workers, loading the model in each and sending twins around all count. The cluster is this
command's own, of N nodes; it is started before anything is timed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads

if TYPE_CHECKING:
    from dtr_deploy.cluster.workers import Workers

NAME = "benchmarks.cluster"
QUICKSTART = Path(__file__).parents[1] / "recipes/quickstart.yaml"
STAGES = ("distill", "search")

app = application()


@dataclass(frozen=True)
class Row:
    """One stage in one round. here, cluster: seconds. same: whether both ended with the same files, or layout."""

    stage: str
    round: int
    here: float
    cluster: float
    same: bool

    @property
    def ratio(self) -> float:
        return self.cluster / self.here


@app.command(name=NAME, cls=Command)
def cluster(
    recipe: Annotated[Path, typer.Option(help="Whose stages 1 and 2 are run.")] = QUICKSTART,
    tokens: Annotated[int, typer.Option(min=0, help="Training tokens; 0: the recipe's.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Nodes of one core.")] = 2,
    threads: Annotated[
        int,
        typer.Option(min=0, help="Of the one process; 0: as many as workers. With 1, results are equal to the bit."),
    ] = 0,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a cluster of so many workers, in place of its own.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each round does everything both ways, in turns.")] = 1,
    file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Stages 1 and 2 on a cluster of this machine's cores, beside one process."""
    with one_line_errors(NAME, debug):
        threads = use_threads(threads or workers)
        from benchmarks.machine import describe
        from benchmarks.table import machine_lines

        environment = describe("cpu", threads)
        rows = list(_rounds(recipe, tokens, workers, address, rounds))
        for line in [*machine_lines(environment), *table(rows)]:
            typer.echo(line)
        if file is not None:
            data = {"environment": environment, "rows": [vars(row) for row in rows]}
            file.write_text(json.dumps(data, indent=1))


def table(rows: list[Row]) -> list[str]:
    """A line a row, and the median ratio of each stage and of both together."""
    lines = ["", "| stage | round | one process, s | workers, s | ratio | same result |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.stage} | {row.round} | {row.here:.1f} | {row.cluster:.1f} | {row.ratio:.2f} "
        f"| {'yes' if row.same else 'no'} |"
        for row in rows
    ]
    for stage in STAGES:
        ratios = [row.ratio for row in rows if row.stage == stage]
        lines.append(f"| {stage} | median | | | {statistics.median(ratios):.2f} | |")
    numbers = sorted({row.round for row in rows})
    both = [
        sum(row.cluster for row in rows if row.round == n) / sum(row.here for row in rows if row.round == n)
        for n in numbers
    ]
    return [*lines, f"| both | median | | | {statistics.median(both):.2f} | |"]


def _rounds(recipe_file: Path, tokens: int, count: int, address: str | None, rounds: int) -> Iterator[Row]:
    from dtr_deploy.cluster.workers import connected
    from dtr_deploy.recipe import load_recipe
    from dtr_deploy.recipe_sections import Cluster as Settings

    recipe = load_recipe(recipe_file)
    changes: dict[str, Any] = {"search": recipe.search.model_copy(update={"minutes": None})}
    if tokens:
        changes["distill"] = recipe.distill.model_copy(update={"tokens": tokens})
    recipe = recipe.model_copy(update=changes)
    nodes = _nodes(count) if address is None else nullcontext(address)
    with nodes as place, connected(Settings(address=place, workers=count), typer.echo) as workers:
        for number in range(1, rounds + 1):
            with tempfile.TemporaryDirectory(prefix="dtr-cluster-") as folder:
                ways = {"here": None, "cluster": workers}
                names = list(ways) if number % 2 else list(reversed(ways))
                seconds: dict[tuple[str, str], float] = {}
                found: dict[tuple[str, str], Any] = {}
                for stage in STAGES:
                    for name in names:
                        one = _One(recipe, Path(folder), name, ways[name])
                        began = time.perf_counter()
                        found[stage, name] = getattr(one, stage)()
                        seconds[stage, name] = time.perf_counter() - began
                    same = found[stage, "here"] == found[stage, "cluster"]
                    row = Row(stage, number, seconds[stage, "here"], seconds[stage, "cluster"], same)
                    typer.echo(f"round {number}, {stage}: {row.here:.1f} s, {row.cluster:.1f} s")
                    yield row


@contextmanager
def _nodes(count: int) -> Iterator[str]:
    """The address of a cluster of so many nodes with one core each."""
    import os

    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")  # as the process it is compared with
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(count - 1):
            nodes.add_node(num_cpus=1)
        yield nodes.address
    finally:
        ray.shutdown()
        nodes.shutdown()


class _One:
    """The two stages, one way. What both share, and what is read but not computed, is prepared before a stage is timed:
    loading this process's model is not what is asked."""

    def __init__(self, recipe: Any, folder: Path, name: str, workers: Workers | None) -> None:
        from dtr_deploy.pipeline import Build
        from dtr_deploy.progress import QuietProgress
        from dtr_deploy.run_dir import RunDir

        self.job = Build(recipe, RunDir(folder / name), QuietProgress())
        self.job.workers = workers
        _ = self.job.backbone, self.job.corpus, self.job.tasks

    def distill(self) -> dict[str, str]:
        """Hashes of the twins."""
        record = self.job.distill()
        return {Path(name).name: artefact.sha256 for name, artefact in record.artefacts.items()}

    def search(self) -> tuple[str | None, ...]:
        """The layout."""
        from benchmarks.studies.search_setup import AssumedCost
        from dtr_deploy.layout_search import objective_of, recall_screen, replicated
        from dtr_deploy.search.ledger import Ledger
        from dtr_deploy.search.problem import Problem
        from dtr_deploy.search.scorer import ModelEvaluator, Scorer, models_hash
        from dtr_deploy.search.strategies import Racing, run
        from dtr_deploy.tasks.divergence import SCREENING, Divergence

        job, recipe = self.job, self.job.recipe
        twins = job._load_twins(job.run.path / "distilled")
        evaluator = ModelEvaluator(
            job.backbone.model,
            twins,
            recipe.window,
            job.tasks,
            Divergence(job.corpus.held_out[: recipe.search.screen.sequences], every=SCREENING),
            recall_screen(recipe, job.backbone),
            models_hash(job.backbone.fingerprint, twins, recipe.window),
            precision=recipe.search.precision,
        )
        cost, objective = AssumedCost(job.backbone.layers), objective_of(recipe)
        with (
            Ledger(job.run.path / "ledger.sqlite") as ledger,
            replicated(evaluator, recipe, job.backbone, twins, job.workers) as who,
        ):
            problem = Problem(Scorer(who, ledger), cost, objective, ledger, "racing")
            run(Racing(), problem)
            return objective.choose(list(problem.visits.values())).layout


if __name__ == "__main__":
    app()
