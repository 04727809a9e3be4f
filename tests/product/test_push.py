"""`dtr-deploy push` against a hub of our own: what arrives, in one commit, and one line for what goes wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from dtr_deploy.export.model_card import front_matter, write_model_card
from dtr_deploy.hybrid.model import save_hybrid
from dtr_deploy.recipe import RECIPE_COPY, load_recipe
from dtr_deploy.report.schema import REPORT
from dtr_deploy.run_dir import RunDir
from tests.product.fake_hub import Hub, fake_hub
from tests.product.recipes import write_recipe
from tests.product.reports import full_report, small_report
from tests.tiny import tiny_hybrid, tiny_tokenizer


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return tiny_hybrid("llama", (None, "gla", None, None), 8)


@pytest.fixture
def run(tmp_path: Path, tiny: torch.nn.Module) -> Path:
    """A finished run with a real tiny checkpoint and made-up figures."""
    run = RunDir(tmp_path / "run")
    recipe = load_recipe(write_recipe(tmp_path))
    (run.path / RECIPE_COPY).write_text(json.dumps(recipe.model_dump(mode="json")))
    (run.path / REPORT).write_bytes(small_report().to_json())
    (run.path / "report.html").write_text("<html></html>")
    for precision in ("fp32", "int4"):
        (run.path / "onnx" / precision).mkdir(parents=True)
        (run.path / "onnx" / precision / "model.onnx").write_bytes(precision.encode() * 1000)

    def hybrid(folder: Path) -> tuple[list[Path], dict]:
        save_hybrid(tiny, tiny_tokenizer(), folder)
        write_model_card(small_report(), folder)
        return [folder], {}

    run.stage("hybrid", "key", hybrid, folder="hybrid")
    return run.path


def push(hub: Hub, *arguments: object, token: str | None = "hf_x") -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    # Xet's protocol is its client's own affair; without it files go by LFS, which is documented.
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": "/nonexistent", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "dtr_deploy", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_arrives_is_the_run_in_one_commit(hub: Hub, run: Path) -> None:
    done = push(hub, run, "me/tiny", "--private", "--onnx", "int4", "--message", "first")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/me/tiny/commit/" in done.stdout and "vllm serve me/tiny" in done.stdout
    arrived = hub.files["me/tiny"]["main"]
    expected = {file.relative_to(run / "hybrid").as_posix(): file for file in (run / "hybrid").iterdir()}
    expected |= {"onnx/int4/model.onnx": run / "onnx/int4/model.onnx"}
    expected |= {name: run / name for name in (REPORT, "report.html")}
    assert arrived == {name: file.read_bytes() for name, file in expected.items()}
    assert hub.private["me/tiny"] and [commit["summary"] for commit in hub.commits] == ["first"]
    assert any(request.startswith("PUT /upload/") for request in hub.requests), "weights go through LFS"

    again = push(hub, run, "me/tiny", "--onnx", "int4")
    assert again.returncode == 0 and len(hub.commits) == 1, "nothing new, no commit"
    branch = push(hub, run, "me/tiny", "--revision", "next", "--no-report", "--json")
    assert branch.returncode == 0 and json.loads(branch.stdout)["url"], branch.stderr
    assert "report.json" not in json.loads(branch.stdout)["files"]


def test_what_was_pushed_is_the_model(hub: Hub, run: Path, tiny: torch.nn.Module, tmp_path: Path) -> None:
    assert push(hub, run, "me/tiny").returncode == 0
    program = (
        "import torch, dtr_deploy.hybrid.model\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('me/tiny').eval()\n"
        "print(model(torch.arange(10, 60)[None], use_cache=False).logits.double().sum().item())\n"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = tiny.eval()(torch.arange(10, 60)[None], use_cache=False).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-3)


def test_a_dry_run_sends_nothing(hub: Hub, run: Path) -> None:
    done = push(hub, run, "me/tiny", "--dry-run", token=None)
    assert done.returncode == 0 and "model.safetensors" in done.stdout and "nothing was sent" in done.stdout
    assert hub.requests == []


def test_a_run_that_is_not_what_was_built_is_not_published(hub: Hub, run: Path) -> None:
    weights = run / "hybrid/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + b"\0")
    assert "corrupted, its sha256" in one_line(push(hub, run, "me/tiny"))
    weights.write_bytes(before)
    assert "accepted: fp32, int4" in one_line(push(hub, run, "me/tiny", "--onnx", "int8"))
    (run / REPORT).write_bytes(full_report().to_json())  # one of its parity rows failed
    assert "parity failed (genai" in one_line(push(hub, run, "me/tiny"))
    (run / REPORT).unlink()
    assert "not finished" in one_line(push(hub, run, "me/tiny"))
    assert hub.requests == []


def test_what_a_hub_refuses_is_one_line(hub: Hub, run: Path) -> None:
    assert "OWNER/NAME" in one_line(push(hub, run, "me/ti ny"))
    assert "hf auth login" in one_line(push(hub, run, "me/tiny", token=None))
    for status, words in ((401, "does not know you"), (403, "may not write"), (404, "no such repository")):
        hub.refuse = status
        assert words in one_line(push(hub, run, "me/tiny"))
    hub.url = "http://127.0.0.1:9"
    assert "was not reached" in one_line(push(hub, run, "me/tiny"))


def test_the_cards_front_matter_is_the_report(tmp_path: Path) -> None:
    report = full_report()
    report.backbone = report.backbone.model_copy(update={"spec": "owner/base-model"})
    report.recipe |= {
        "corpus": ["owner/texts:en:train", "pydoc", "some/file.txt"],
        "tasks": [{"name": "recall", "metric": "accuracy"}],
    }
    head = front_matter(report)
    assert head.startswith("---\n") and head.endswith("\n---")
    data = yaml.safe_load(head.strip("-\n"))
    assert data["base_model"] == "owner/base-model" and data["datasets"] == ["owner/texts"]
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "recall", "type": "recall", "split": "test"}
    (metric,) = result["metrics"]
    assert metric["value"] == report.scores["test"].tasks["recall"].hybrid and metric["type"] == "accuracy"
    assert "base_model" not in front_matter(small_report()), "a package is no hub id"
    (tmp_path / "card").mkdir()
    card = write_model_card(report, tmp_path / "card").read_text()
    assert card.startswith("---\n") and "## Limits" in card and "recall" in card
