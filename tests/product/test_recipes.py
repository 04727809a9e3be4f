"""The recipes that come with the project: each reads, each can be planned, and those for models that no test can hold
are built whole from tiny models of the same architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, Qwen2Config
from typer.testing import CliRunner

from dtr_deploy.cli import app
from dtr_deploy.distill.trainer import DistillSettings
from dtr_deploy.errors import UsageError
from dtr_deploy.pipeline import build
from dtr_deploy.recipe import load_recipe
from dtr_deploy.run_dir import RunDir
from dtr_deploy.tasks.build import unknown_options
from tests.tiny import tiny_backbone, tiny_tokenizer

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072}
# As the models' own config.json files have it, and the parameters that their pages name.
PUBLISHED: dict[str, tuple[Any, float]] = {
    "qwen2.5-1.5b": (
        Qwen2Config(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, vocab_size=151_936, max_position_embeddings=131_072, tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"],
        ),
        1.54e9,
    ),
    "llama-3.2-3b": (
        LlamaConfig(
            hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
            tie_word_embeddings=True, architectures=["LlamaForCausalLM"], **LLAMA_3,
        ),
        3.21e9,
    ),
    "llama-3.1-8b": (
        LlamaConfig(
            hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
            tie_word_embeddings=False, architectures=["LlamaForCausalLM"], **LLAMA_3,
        ),
        8.03e9,
    ),
}  # fmt: skip
CARD_BYTES = {"qwen2.5-1.5b": 24e9, "llama-3.2-3b": 80e9, "llama-3.1-8b": 80e9}
"""Of the GPU that a recipe's first line names."""


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_reads(file: Path) -> None:
    recipe = load_recipe(file)
    assert file.stem in recipe.name
    assert not [key for task in recipe.tasks for key in unknown_options(task)]


def test_tasks_of_lm_eval_have_its_names() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_subtasks)
    named = [task.lm_eval for name in PUBLISHED for task in load_recipe(ROOT / f"recipes/{name}.yaml").tasks]
    assert len([name for name in named if name]) == 3 * 18 and {name for name in named if name} <= known


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_large_model_is_planned(tmp_path: Path, name: str) -> None:
    config, parameters = PUBLISHED[name]
    config.save_pretrained(tmp_path / "model")
    text = (ROOT / f"recipes/{name}.yaml").read_text()
    recipe = yaml.safe_load(text) | {"model": str(tmp_path / "model")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ran = CliRunner().invoke(app, ["plan", "--recipe", str(tmp_path / "recipe.yaml"), "--teraflops", "400", "--json"])
    assert ran.exit_code == 0, ran.output
    plan = json.loads(ran.stdout)
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert "100,000,000 tokens" in stages["distill"]["work"]
    assert stages["lm-eval"]["work"] == "the test split of 18 tasks"
    # By hand: what has to be held is the weights in float32 at least, and what fits the card is what the recipe says.
    assert 4 * 0.97 * parameters < plan["memory_bytes"] < 0.9 * CARD_BYTES[name]
    assert f"GPU of {CARD_BYTES[name] / 1e9:.0f} GB" in text.splitlines()[0]


def small(name: str, folder: Path) -> Path:
    """The recipe with a tiny model of its architecture, little text and the tasks that come with the project."""
    family = "qwen2" if name.startswith("qwen") else "llama"
    backbone = tiny_backbone(family, layers=4, hidden=192)
    if not PUBLISHED[name][0].tie_word_embeddings:
        backbone.config.tie_word_embeddings = False
        backbone.lm_head.weight = torch.nn.Parameter(backbone.lm_head.weight.detach().clone() * 0.5)
    backbone.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    recipe = yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text())
    recipe |= {"model": str(folder / "model"), "corpus": ["pydoc", "recall"], "window": 8}
    recipe["distill"] |= {"tokens": 2_048, "sequence_length": 128, "held_out": 6, "batch_size": 2, "precision": "auto"}
    if "twins_at_once" in recipe["distill"]:
        recipe["distill"]["twins_at_once"] = 5
    if "heal" in recipe:
        recipe["heal"]["tokens"] = 512
    rows = [{"text": f"row {i} {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(36)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load((ROOT / "recipes/data/reviews/lm_eval.yaml").read_text())
    task["dataset_kwargs"] = {"data_files": {"validation": str(folder / "rows.jsonl")}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    recall = {"lengths": [480, 560], "items": 2, "confirm_items": 4}
    choice = {"name": "choice", "lm_eval": str(folder / "task.yaml"), "items": 6}
    recipe["tasks"] = [choice, recipe["tasks"][-1] | recall]
    # Starting vLLM for each layout that is measured would take most of an hour here; parity and the last table have it.
    workload = {"prompt": 512, "output": 4, "concurrency": 1}
    # Random weights of this size do not survive int4, neither the hybrid's nor the backbone's.
    recipe["target"] |= {"engine": "ort", "precision": "fp32", "workload": workload, "cache_mib": 0.6}
    screen = {"sequences": 2, "recall_items": 2, "recall_length": 480}
    recipe["search"] |= {"max_score_loss": 1.0, "max_task_loss": 1.0, "repeats": 1, "screen": screen}
    recipe["export"] = {"vllm": {"dtype": "float32"}, "onnx": {"precision": "fp32"}}
    recipe["parity"] = {"prompts": 6, "max_length": 200, "tokens": 600}
    recipe["bench"] = {"prompts": [64], "output": 4, "repeats": 1}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.1-8b"])
def test_every_stage_on_a_tiny_model_of_the_architecture(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path / "run")
    report = build(load_recipe(small(name, tmp_path)), run)
    assert report is not None and set(run.stages) >= {
        "distill", "search", "hybrid", "lm-eval", "base", "onnx fp32", "parity", "throughput ort",
        "throughput vllm", "report",
    }  # fmt: skip
    healed = name != "llama-3.1-8b"
    twins = run.path / ("healed" if healed else "distilled")
    assert ("heal" in run.stages) is healed
    forms = {file.stem.partition("_")[2] for file in twins.glob("layer*.safetensors")}
    assert forms == {"gla", "gated_deltanet", "jet"}
    config = json.loads((run.path / "hybrid/config.json").read_text())
    assert any(config["dtr"]["forms"]) and not all(config["dtr"]["forms"])
    assert config["tie_word_embeddings"] == PUBLISHED[name][0].tie_word_embeddings


@pytest.mark.parametrize("calibrate", [True, False])
def test_start_values_are_the_recipes_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: bool) -> None:
    file = small("qwen2.5-1.5b", tmp_path)
    recipe = yaml.safe_load(file.read_text())
    if not calibrate:
        recipe["distill"]["calibrate"] = False
    file.write_text(yaml.safe_dump(recipe))
    seen = []

    def record(*arguments: object, **_: object) -> None:
        seen.extend(x for x in arguments if isinstance(x, DistillSettings))
        raise UsageError("enough")

    monkeypatch.setattr("dtr_deploy.distill.stage.distill", record)
    with pytest.raises(UsageError, match="enough"):
        build(load_recipe(file), RunDir(tmp_path / "run"))
    assert [settings.calibrate for settings in seen] == [calibrate]
