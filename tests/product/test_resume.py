"""kill -9 at any moment of a build, then the same command: the result is that of an uninterrupted build."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtr_deploy.run_dir import MANIFEST, RunDir
from tests.tasks.test_lm_eval import CHOICE, write_task
from tests.tiny import tiny_backbone, tiny_tokenizer

BUILD = Path(__file__).with_name("killable_build.py")
MOMENTS = (4, 18, 28)
"""Units of work after which successive attempts die: within distillation, screening and scoring."""

RECIPE = """\
name: resumed
model: {folder}/model
corpus: [pydoc]
forms: [gated_deltanet, gla]
window: 8
distill: {{tokens: 6_144, sequence_length: 128, held_out: 4, layers: {{exclude: [0]}}}}
tasks:
  - {{name: recall, synthetic: needle, lengths: [160], items: 4}}
  - {{name: animals, lm_eval: {animals}, shots: 2, items: 4}}
target: {{engine: ort, precision: int4, workload: {{prompt: 64, output: 8}}, speedup: 1.1}}
search:
  max_score_loss: 0.5
  repeats: 1
  screen: {{sequences: 2, recall: [needle], recall_items: 2, recall_length: 160}}
export: {{onnx: {{precision: int4}}}}
"""


def attempt(recipe: Path, run: Path, units: int) -> int:
    command = [sys.executable, str(BUILD), str(recipe), str(run), str(units)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(recipe.with_name("datasets"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
def test_a_build_that_was_killed_ends_like_one_that_was_not(tmp_path: Path) -> None:
    tiny_backbone(layers=4).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path, animals=write_task(tmp_path, "multiple_choice", CHOICE)))

    assert attempt(recipe, tmp_path / "whole", 10**9) == 0
    deaths = [attempt(recipe, tmp_path / "killed", units) for units in MOMENTS]
    assert -signal.SIGKILL in deaths, "no attempt lasted long enough to be killed: choose earlier moments"
    assert attempt(recipe, tmp_path / "killed", 10**9) == 0

    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    assert whole.stages["search"].result == killed.stages["search"].result
    assert any(form is not None for form in whole.stages["search"].result["layout"])
    for stage in ("distill", "hybrid"):
        ours, theirs = killed.stages[stage], whole.stages[stage]
        assert ours.key == theirs.key
        assert ours.artefacts == theirs.artefacts  # sha256 of every file, weights included
    (row,) = whole.stages["lm-eval"].result["rows"]
    assert row["passed"] and row["documents"] == 4
    assert row["lm_eval"] == pytest.approx(row["ours"]), "lm-eval itself, on the checkpoint"
    assert killed.stages["lm-eval"].result == whole.stages["lm-eval"].result
    found, expected = (json.loads((run.path / "search.json").read_text()) for run in (killed, whole))
    for name in ("scores", "frontier", "m_best", "m_opt"):
        assert found[name] == expected[name], name
    assert json.loads((killed.path / MANIFEST).read_text())["recipe"] == "resumed"
