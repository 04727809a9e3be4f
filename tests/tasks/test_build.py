"""From recipe entries to tasks."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.recipe import TaskRecipe
from dtr_deploy.tasks import Task, build_tasks
from dtr_deploy.tasks.local_file import LabelledFile
from dtr_deploy.tasks.needle import DEFAULT_ITEMS, Needle
from tests.tiny import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name in ("train", "validation", "test"):
        rows = [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_recipe_entries_become_tasks_in_order(folder: str) -> None:
    recipes = [
        TaskRecipe(name="films", file=folder, shots=2, items=4, weight=2.0),
        TaskRecipe(name="recall", synthetic="needle", lengths=(300, 400)),
    ]
    films, recall = build_tasks(recipes, tiny_tokenizer(), seed=0)
    assert isinstance(films, LabelledFile) and isinstance(films, Task)
    assert (films.name, films.weight, len(films.rows("search"))) == ("films", 2.0, 4)
    assert "train" in tiny_tokenizer().decode(films.requests("search")[0].context)
    assert isinstance(recall, Needle) and isinstance(recall, Task)
    assert (recall.lengths, recall.items, recall.weight) == ((300, 400), DEFAULT_ITEMS, 1.0)


def test_the_seed_reaches_every_task(folder: str) -> None:
    recipes = [TaskRecipe(name="films", file=folder), TaskRecipe(name="recall", synthetic="needle", lengths=(300,))]
    one, other = (build_tasks(recipes, tiny_tokenizer(), seed=seed) for seed in (0, 1))
    for a, b in zip(one, other, strict=True):
        assert a.fingerprint("search") != b.fingerprint("search")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "name at least one"),
        ([{}], "exactly one of the keys file, synthetic, lm_eval; it has none"),
        ([{"file": "x", "synthetic": "needle"}], "exactly one of the keys"),
        ([{"synthetic": "haystack"}], "synthetic: 'haystack' is not one of needle"),
        ([{"synthetic": "needle", "weight": -1}], "weight must be >= 0"),
        ([{"file": "nowhere"}], r"no folder or \.jsonl file nowhere"),
        ([{"synthetic": "needle"}, {"synthetic": "needle"}], "two are named 't'"),
    ],
)
def test_bad_entries_are_named(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_tasks([SimpleNamespace(name="t", **entry) for entry in entries], tiny_tokenizer(), seed=0)
