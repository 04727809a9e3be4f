"""The schema of recipes: it takes what the program takes, refuses what it refuses, and the docs' page is its."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from dtr_deploy import cli
from dtr_deploy.recipe import Recipe
from dtr_deploy.recipe_schema import json_schema, reference

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "name": "a",
    "model": "m",
    "corpus": "pydoc",
    "tasks": [{"name": "t", "synthetic": "needle"}],
    "target": {"workload": {"prompt": 8, "output": 2}},
}


@pytest.fixture(scope="module")
def validator() -> Any:
    result = CliRunner().invoke(cli.app, ["schema"])
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert schema == json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_our_recipes_are_valid(file: Path, validator: Any) -> None:
    assert list(validator.iter_errors(yaml.safe_load(file.read_text()))) == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"corpus": ["pydoc", "recall"]},
        {"forms": "gla"},
        {"distill": {"layers": "all"}},
        {"distill": {"layers": [1, -1]}},
        {"distill": {"layers": {"exclude": [0]}}},
        {"export": {"onnx": {"precision": "int4"}, "vllm": None}},
    ],
)
def test_every_spelling_that_a_recipe_may_have(change: dict[str, Any], validator: Any) -> None:
    recipe = SMALL | change
    Recipe.model_validate(recipe)
    assert list(validator.iter_errors(recipe)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"windw": 3},
        {"window": -1},
        {"tasks": []},
        {"target": {}},
        {"distill": {"layers": "some"}},
        {"search": {"strategy": "greedy"}},
        {"export": {"onnx": {"precision": "int3"}}},
    ],
)
def test_what_a_recipe_refuses_the_schema_refuses(change: dict[str, Any], validator: Any) -> None:
    recipe = SMALL | change
    with pytest.raises(ValueError):
        Recipe.model_validate(recipe)
    assert list(validator.iter_errors(recipe))


def test_every_key_is_explained() -> None:
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        for key, told in section["properties"].items():
            assert told.get("description"), f"{section['title']}.{key}"


def test_the_page_in_the_docs_is_current() -> None:
    assert (ROOT / "docs/recipe-reference.md").read_text() == reference(), (
        "python -m dtr_deploy.recipe_schema > docs/recipe-reference.md"
    )
