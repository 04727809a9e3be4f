"""A tiny model from a recipe to a report, by the commands a person types: every stage, both engines, every command."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr_deploy.report.schema import REPORT
from dtr_deploy.run_log import LOG
from tests.tiny import tiny_backbone, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

# How fast a tiny model is says nothing; a bound on the cache asks for replaced layers all the same.
RECIPE = """\
name: tiny
model: {folder}/model
corpus: [pydoc]
forms: [gated_deltanet]
window: 8
distill: {{tokens: 4_096, sequence_length: 128, held_out: 6}}
heal: {{tokens: 1_024}}
tasks:
  - {{name: recall, synthetic: needle, lengths: [160], items: 4}}
target: {{engine: ort, precision: int4, workload: {{prompt: 512, output: 4}}, cache_mib: 0.6}}
search:
  max_score_loss: 1.0
  max_task_loss: 1.0
  repeats: 1
  screen: {{sequences: 2, recall: [needle], recall_items: 2, recall_length: 160}}
export: {{vllm: {{dtype: float32}}, onnx: {{precision: [fp32, int4]}}}}
parity: {{prompts: 6, max_length: 200, tokens: 600}}
bench: {{prompts: [64], output: 4, repeats: 1}}
"""


def run(*arguments: object, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtr_deploy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=900)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where `dtr-deploy build` has been run."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_backbone(layers=4, hidden=192).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "tiny.yaml").write_text(RECIPE.format(folder=folder))
    run("plan", "--recipe", "tiny.yaml", folder=folder)
    assert not (folder / "runs").exists()
    twins = json.loads(run("distill", "--recipe", "tiny.yaml", "--json", folder=folder).stdout)
    assert list(twins["seconds"]) == ["distill"]
    run("search", "--recipe", "tiny.yaml", "-q", folder=folder)
    run("export", "--recipe", "tiny.yaml", folder=folder)
    assert not (folder / "runs/tiny" / REPORT).exists()
    built = run("build", "--recipe", "tiny.yaml", "-v", folder=folder)
    assert "built: runs/tiny" in built.stdout and "Parity" in built.stdout
    assert "distill: finished before" in built.stdout and "search: finished before" in built.stdout
    yield folder


def test_the_run_holds_what_the_readme_says(folder: Path) -> None:
    tiny = folder / "runs/tiny"
    for name in ("hybrid", "onnx/fp32", "onnx/int4", "base", "distilled", "healed", "parity"):
        assert (tiny / name).is_dir(), name
    for name in ("ledger.sqlite", "report.html", REPORT, "manifest.json", "hybrid/README.md", "hybrid/config.json"):
        assert (tiny / name).is_file(), name
    log = (tiny / LOG).read_text()
    for command in ("distill", "search", "export", "build"):
        assert f"dtr-deploy {command} --recipe tiny.yaml --runs runs" in log
    assert "trial: score of" in log and "vLLM: " in log and log.count("finished\n") == 4


def test_the_report_has_every_part(folder: Path) -> None:
    report = json.loads(run("show", "runs/tiny", "--json", folder=folder).stdout)
    forms = [layer["form"] for layer in report["layout"]]
    assert forms.count("gated_deltanet") >= 2 and None in forms
    assert set(report["scores"]) == {"search", "confirm", "test"}
    engines = {(row["engine"], row["precision"]) for row in report["parity"]}
    assert {("ort", "fp32"), ("ort", "int4"), ("vllm", "fp32")} <= engines
    assert all(row["passed"] for row in report["parity"])
    assert {row["engine"] for row in report["throughput"]} >= {"vllm"} and len(report["throughput"]) >= 2
    assert "Scores" in run("show", "runs/tiny", folder=folder).stdout


def test_commands_on_the_finished_run(folder: Path) -> None:
    again = run("build", "--recipe", "tiny.yaml", "--json", folder=folder)
    assert json.loads(again.stdout) == json.loads((folder / "runs/tiny" / REPORT).read_text())
    measured = json.loads(run("bench", "runs/tiny", "--json", folder=folder).stdout)
    assert measured == json.loads((folder / "runs/tiny/bench.json").read_text()) and measured
    run("report", "runs/tiny", "--out", "page.html", folder=folder)
    assert "<html" in (folder / "page.html").read_text()
    shutil.copytree(folder / "runs/tiny", folder / "runs/other")
    assert "layers replaced" in run("compare", "runs/tiny", "runs/other", folder=folder).stdout


def test_verify_finds_what_was_changed(folder: Path) -> None:
    checked = json.loads(run("verify", "runs/tiny", "--json", folder=folder).stdout)
    assert checked["artefacts"] > 10 and all(row["passed"] for row in checked["parity"])
    weights = folder / "runs/tiny/hybrid/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    failed = run("verify", "runs/tiny", folder=folder, code=1)
    assert "corrupted, its sha256 is not the one in manifest.json" in failed.stderr
    assert failed.stderr.count("\n") == 1
    weights.write_bytes(before)
