"""Two Ray nodes on this machine: stages 1 and 2 on them give what one process gives, also when workers are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks import cluster as benchmark
from dtr_deploy import layout_search, pipeline
from dtr_deploy.cluster import distill as cluster_distill
from dtr_deploy.cluster import evaluator as cluster_evaluator
from dtr_deploy.cluster.distill import distill_on
from dtr_deploy.cluster.evaluator import ClusterEvaluator
from dtr_deploy.cluster.measure import Served, compare_on
from dtr_deploy.cluster.workers import RETRIES, Source, connected, results
from dtr_deploy.distill.groups import Group, GroupedTwins
from dtr_deploy.distill.stage import SUMMARY
from dtr_deploy.distill.trainer import DistillSettings
from dtr_deploy.engines.base import Workload
from dtr_deploy.errors import DtrError, UsageError
from dtr_deploy.hybrid.backbone import load_backbone
from dtr_deploy.pipeline import build
from dtr_deploy.progress import QuietProgress
from dtr_deploy.recipe import load_recipe
from dtr_deploy.recipe_sections import Cluster as Settings
from dtr_deploy.run_dir import RunDir
from dtr_deploy.search.evaluator import ATTRIBUTION, SCORE, SCREEN
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.model_evaluator import ModelEvaluator
from dtr_deploy.tasks.divergence import Divergence
from tests.product.killable_build import timed_opener
from tests.tiny import tiny_backbone, tiny_tokenizer

pytestmark = pytest.mark.slow

RECIPE = """\
name: NAME
model: {folder}/model
corpus: [pydoc]
forms: [gated_deltanet, gla]
window: 8
distill: {{tokens: 6_144, sequence_length: 128, held_out: 4, layers: {{exclude: [0]}}}}
tasks:
  - {{name: recall, synthetic: needle, lengths: [160], items: 8}}
target: {{engine: ort, precision: int4, workload: {{prompt: 64, output: 8}}, speedup: 1.1}}
search:
  max_score_loss: 0.5
  repeats: 1
  screen: {{sequences: 4, recall: [needle], recall_items: 2, recall_length: 160}}
export: {{onnx: {{precision: int4}}}}
cluster: CLUSTER
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes with one core each."""
    options = {"num_cpus": 1, "object_store_memory": 100 << 20}
    with pytest.MonkeyPatch.context() as patch:
        # Ray's workers give way to everything else on a machine, and the other tests leave nothing over.
        patch.setenv("RAY_worker_niceness", "0")
        two = Cluster(initialize_head=True, head_node_args=options)
        two.add_node(**options)
        yield two.address
        ray.shutdown()
        two.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    tiny_backbone(layers=5).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> RunDir:
    """Built in this process, with one thread, as a worker has. How fast layouts are is set by hand."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_search, "layout_opener", timed_opener)
        torch.set_num_threads(1)
        try:
            return run(folder, "alone", "none")
        finally:
            torch.set_num_threads(threads)


def run(folder: Path, name: str, cluster: str, until: str = "hybrid") -> RunDir:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(folder=folder).replace("NAME", name).replace("CLUSTER", cluster))
    opened = RunDir(folder / name)
    build(load_recipe(recipe), opened, Told(), until)
    return RunDir(folder / name)


class Told(QuietProgress):
    """Keeps what it is told."""

    lines: list[str]

    def __init__(self) -> None:
        super().__init__()
        Told.lines = []

    def line(self, text: str) -> None:
        Told.lines.append(text)


def with_measurements_of(alone: RunDir, run: RunDir) -> None:
    """Timings differ from run to run, so the other one's are taken over."""
    shutil.copy(alone.path / "ledger.sqlite", run.path / "ledger.sqlite")
    with closing(sqlite3.connect(run.path / "ledger.sqlite")) as ledger:
        ledger.execute("DELETE FROM arrays WHERE trial IN (SELECT id FROM trials WHERE kind != 'throughput')")
        ledger.execute("DELETE FROM trials WHERE kind != 'throughput'")
        ledger.execute("DELETE FROM steps")
        ledger.commit()


def trials(run: RunDir, kind: str) -> dict[tuple[Any, ...], tuple[str, dict[str, np.ndarray]]]:
    """Scalars and arrays of all trials of a kind, by what they were of."""
    with Ledger(run.path / "ledger.sqlite") as ledger:
        found = [ledger.find(trial.key) for trial in ledger.trials(kind)]
    return {
        (t.key.layout, t.key.split, t.key.inputs): (repr(sorted(t.scalars.items())), dict(t.arrays)) for t in found if t
    }


def assert_same(alone: RunDir, other: RunDir) -> None:
    """Weights to the bit; scores, screenings and estimates to the bit; every step, and the layout."""
    ours, theirs = other.stages, alone.stages
    weights = {name: x for name, x in theirs["distill"].artefacts.items()}
    assert weights and ours["distill"].artefacts == weights
    for kind in (SCORE, SCREEN, ATTRIBUTION):
        found, expected = trials(other, kind), trials(alone, kind)
        assert found.keys() == expected.keys() and (found or kind == SCREEN), kind
        for key, (scalars, arrays) in expected.items():
            assert found[key][0] == scalars
            assert found[key][1].keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[key][1][name], array)
    assert ours["search"].result == theirs["search"].result
    assert any(form is not None for form in ours["search"].result["layout"])
    assert ours["hybrid"].artefacts == theirs["hybrid"].artefacts


def apart(address: str) -> str:
    """The recipe's section for workers that each run the teacher for themselves."""
    return f"{{address: '{address}', share_teacher: 1}}"


def test_a_build_on_two_nodes_is_that_of_one_process(address: str, folder: Path, alone: RunDir) -> None:
    twins = run(folder, "both", address, until="distill")
    assert "cluster: 2 workers with 1 cores each" in Told.lines
    with_measurements_of(alone, twins)
    assert_same(alone, run(folder, "both", address))
    each = run(folder, "apart", apart(address), until="distill")
    assert each.stages["distill"].artefacts == twins.stages["distill"].artefacts
    left = {path.name for path in (folder / "both" / "distilled").iterdir()}
    assert left == {path.name for path in (alone.path / "distilled").iterdir()}, "nothing half-way stays behind"


@pytest.mark.parametrize("sharing", [True, False])
def test_workers_that_are_killed_change_nothing(
    address: str, folder: Path, alone: RunDir, monkeypatch: pytest.MonkeyPatch, sharing: bool
) -> None:
    killed: list[str] = []
    name, cluster = f"killed-{sharing}", address if sharing else apart(address)

    def kill_one(name: str) -> None:
        """The first process of Ray that runs `name`, with SIGKILL."""
        for place in Path("/proc").glob("[0-9]*"):
            title = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode() if place.is_dir() else ""
            if title.startswith(f"ray::{name}"):
                os.kill(int(place.name), signal.SIGKILL)
                killed.append(name)
                return

    class Killing(Told):
        """Kills a worker when a group of twins is half trained."""

        def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
            if "relative error" in note and not killed:
                kill_one("Member.train")

        def bar(self, what: str, total: float | None = None) -> Any:
            from contextlib import nullcontext

            return nullcontext(self)

    monkeypatch.setattr(cluster_distill, "LOOK_SECONDS", 0.02)  # tiny models are trained in a second
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(folder=folder).replace("NAME", name).replace("CLUSTER", cluster))
    build(load_recipe(recipe), RunDir(folder / name), Killing(), "distill")
    assert killed == ["Member.train"]
    with_measurements_of(alone, RunDir(folder / name))
    if not sharing:  # what comes after is the same in both
        assert RunDir(folder / name).stages["distill"].artefacts == alone.stages["distill"].artefacts
        return

    run_calls, run_units = ClusterEvaluator._run, ClusterEvaluator._units
    moments = iter([0, 1, 1, 0, 1])

    def kill_replica(evaluator: ClusterEvaluator, asked: str) -> None:
        """One that has calls to answer."""
        pid = ray.get(evaluator.replicas[0].__ray_call__.remote(lambda replica: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        killed.append(asked)

    def killing(evaluator: ClusterEvaluator, calls: Any) -> Iterator[tuple[int, Any]]:
        if calls[0][1] == "score" and next(moments, 0):
            kill_replica(evaluator, "score")
        yield from run_calls(evaluator, calls)

    def killing_in_between(evaluator: ClusterEvaluator, *asked: Any) -> Iterator[tuple[int, Any]]:
        for number, unit in enumerate(run_units(evaluator, *asked)):
            if number == 0:
                kill_replica(evaluator, "attribute")
            yield unit

    monkeypatch.setattr(ClusterEvaluator, "_run", killing)
    monkeypatch.setattr(ClusterEvaluator, "_units", killing_in_between)
    finished = run(folder, name, cluster)
    assert "score" in killed and "attribute" in killed
    assert_same(alone, finished)


def test_a_node_that_is_lost_for_good(folder: Path, alone: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both workers train together; then there is room for one only."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    options = {"num_cpus": 1, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=options)
    second: list[Any] = [nodes.add_node(**options)]

    class Losing(Told):
        def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
            if "relative error" in note and second:
                nodes.remove_node(second.pop(), allow_graceful=False)

        def bar(self, what: str, total: float | None = None) -> Any:
            from contextlib import nullcontext

            return nullcontext(self)

    monkeypatch.setattr(cluster_distill, "LOOK_SECONDS", 0.02)
    recipe = folder / "lost.yaml"
    recipe.write_text(RECIPE.format(folder=folder).replace("NAME", "lost").replace("CLUSTER", nodes.address))
    try:
        build(load_recipe(recipe), RunDir(folder / "lost"), Losing(), "distill")
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert not second
    assert RunDir(folder / "lost").stages["distill"].artefacts == alone.stages["distill"].artefacts


def test_a_search_goes_on_without_a_node_that_is_lost(
    folder: Path, alone: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setattr(cluster_evaluator, "PATIENCE_SECONDS", 1.0)
    job = pipeline.Build(load_recipe(folder / "alone.yaml"), RunDir(folder / "alone"), QuietProgress())
    twins = job._load_twins(alone.path / "distilled")
    divergence = Divergence(job.corpus.held_out[:2])
    local = ModelEvaluator(job.backbone.model, twins, 8, job.tasks, divergence, [], "hash")
    layouts = [(None,) * 5, (None, "gla", None, None, None), (None, "gla", "gated_deltanet", None, None)]
    expected = {part: list(local.score_part(layouts, "search", part)) for part in (0, 1)}
    options = {"num_cpus": 1, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=options)
    try:
        second = nodes.add_node(**options)
        with connected(Settings(address=nodes.address), lambda text: None) as workers:
            assert workers is not None
            source = Source.of(job.backbone)
            with ClusterEvaluator(workers, source, local, twins, "float32") as who:

                def check(part: int) -> None:
                    found = {done.number: done for done in who.score([(one, part) for one in layouts], "search")}
                    assert found.keys() == {0, 1, 2}
                    for done in expected[part]:
                        for name, array in done.arrays.items():
                            # This process may have more threads, which round otherwise.
                            np.testing.assert_allclose(found[done.number].arrays[name], array, atol=1e-5)

                check(0)
                assert len(who.replicas) == 2
                nodes.remove_node(second, allow_graceful=False)
                until = time.monotonic() + 90
                while len(who.replicas) == 2 and time.monotonic() < until:  # its processes live on for a moment
                    check(1)
                assert len(who.replicas) == 1
                start = layouts[0]
                estimates = list(who.attribute(start, layouts[:2], priced=True))
                assert len(estimates) == 2 and len(list(who.screen(layouts))) == 3
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_what_groups_finished_is_not_trained_again(address: str, folder: Path, alone: RunDir) -> None:
    """As after a kill of the building process between two groups."""
    out = folder / "rest"
    shutil.copytree(alone.path / "distilled", out)
    reports = {(r["layer"], r["form"]): r for r in alone.stages["distill"].result["reports"]}
    (out / SUMMARY).unlink()
    job = pipeline.Build(load_recipe(folder / "alone.yaml"), RunDir(folder / "alone"), QuietProgress())
    twins = GroupedTwins(out, job.layers, job.recipe.forms)
    for key, file in twins.files.items():
        weights = load_file(file)
        file.unlink()
        if key[0] != 3:
            twins.keep(Group((key[0],), (key[1],)), {key: weights}, {key: reports[key]}, tokens=1, seconds=0.0)
    settings = DistillSettings(tokens=6_144, batch_size=1)
    trained: list[int] = []
    with connected(Settings(address=address), lambda text: None) as workers:
        assert workers is not None
        source = Source.of(job.backbone)
        result = distill_on(
            workers, source, job.corpus.train, job.corpus.held_out, job.recipe.forms, job.layers, 8, settings, out,
            lambda done, total, message: trained.append(total),
        )  # fmt: skip
    assert {(r.layer, r.form) for r in result.reports} == set(reports)
    steps = 6_144 // 128
    assert set(trained) <= {steps, 2 * steps}, "at most two groups, of one layer's forms"
    for file in (alone.path / "distilled").glob("layer03*"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_layouts_are_measured_by_machines(address: str, folder: Path) -> None:
    backbone = load_backbone(str(folder / "model"))
    layouts = [("gla", None, None, None, None), ("gla", "gla", "gla", None, None)]
    workload = Workload(64, 8)
    with connected(Settings(address=address), lambda text: None) as workers:
        assert workers is not None
        measure = compare_on(workers, Source.of(backbone), Served(8, "ort", "fp32", 72))
        found = list(measure(None, layouts, workload, 1, 2))
    assert [comparison.layout for comparison in found] == layouts
    assert all(comparison.speedup > 0 and comparison.base.engine == "genai" for comparison in found), found


def test_the_benchmark_compares_both_ways(address: str, folder: Path, tmp_path: Path) -> None:
    recipe, file = tmp_path / "recipe.yaml", tmp_path / "rows.json"
    recipe.write_text(RECIPE.format(folder=folder).replace("NAME", "timed").replace("CLUSTER", "none"))
    threads = torch.get_num_threads()
    with patch.dict(os.environ):
        done = CliRunner().invoke(
            benchmark.app,
            ["--recipe", str(recipe), "--tokens", "1024", "--address", address, "--workers", "1", "--json", str(file)],
        )
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["stage"] for row in rows] == ["distill", "search"] and all(row["same"] for row in rows)
    assert "| both | median |" in done.output


def test_errors_arrive_as_they_were_raised(address: str, folder: Path) -> None:
    def refuse() -> None:
        raise UsageError("not like this")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with connected(Settings(address=address), lambda text: None) as workers:
        assert workers is not None
        with pytest.raises(UsageError, match=r"^not like this$"):
            list(results([workers.task(refuse).remote()]))
        with pytest.raises(DtrError, match=f"lost its worker {RETRIES + 1} times"):
            list(results([workers.task(die).remote()]))
        other = Source(str(folder / "model"), None, False, "another fingerprint")
        with pytest.raises(UsageError, match="is another one on the node"):
            list(results([workers.task(loading(other)).remote()]))


def loading(source: Source) -> Callable[[], None]:
    def load_it() -> None:
        from dtr_deploy.cluster.workers import load

        load(source)

    return load_it


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with connected(Settings(), told.append) as workers:
        assert workers is None and told == []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("dtr_deploy.cluster.workers.find_spec", lambda name: None)
    with connected(Settings(address="auto"), told.append) as workers:
        assert workers is None and "ray is not installed" in told[0]
    with (
        pytest.raises(UsageError, match=r"dtr-deploy\[cluster\]"),
        connected(Settings(address="1.2.3.4:5"), told.append),
    ):
        pass


def test_an_address_where_nothing_is_is_refused_at_once() -> None:
    began = time.monotonic()
    for wrong, words in (("127.0.0.1:1", "cannot be joined"), ("nowhere", "is no address")):
        refused = pytest.raises(UsageError, match=f"cluster.address: {wrong} {words}.*HOST:PORT")
        with refused, connected(Settings(address=wrong), lambda text: None):
            pass
    assert time.monotonic() - began < 30, "Ray itself waits for minutes"
