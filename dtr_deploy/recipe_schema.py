"""The recipe's schema for editors (`dtr-deploy schema`), and the same as a page for readers.

`python -m dtr_deploy.recipe_schema` prints docs/recipe-reference.md.
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dtr_deploy.recipe import Recipe
from dtr_deploy.recipe_sections import Layers

DIALECT = "https://json-schema.org/draft/2020-12/schema"
HEAD = """# Recipe reference

Every key of a recipe, with its default and what is accepted, as the program itself has them. [recipe.md](recipe.md)
explains them. For completion and checks while writing, let an editor read the schema:

```
dtr-deploy schema > recipe.schema.json
```

and begin a recipe with `# yaml-language-server: $schema=recipe.schema.json`.
"""


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe. It tells what one key alone may hold; that keys fit each other is checked by `plan`."""
    return {"$schema": DIALECT, **_one_line(Recipe.model_json_schema())}


def reference() -> str:
    """The page: a table for the recipe itself and one for each of its sections."""
    schema = json_schema()
    parts = [HEAD, _table(Recipe, schema)]
    for path, section in _sections(Recipe, ""):
        parts += [f"## `{path}`\n\n{_words(section)}\n", _table(section, schema["$defs"][section.__name__])]
    return "\n".join(parts)


def _sections(model: type[BaseModel], path: str) -> list[tuple[str, type[BaseModel]]]:
    """(dotted key, model) of everything below a model that has a table of its own."""
    found = []
    for name, field in model.model_fields.items():
        section = _section(field)
        # `layers` is hardly ever written as a mapping, and explained where it stands.
        if section is not None and section is not Layers:
            key = f"{path}{name}{'[]' if _is_list(field) else ''}"
            found += [(key, section), *_sections(section, f"{key}.")]
    return found


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _is_list(field: FieldInfo) -> bool:
    return str(field.annotation).startswith("tuple[")


def _table(model: type[BaseModel], schema: dict[str, Any]) -> str:
    lines = ["| key | default | accepted | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        told = schema["properties"][name]
        default = "**required**" if field.is_required() else _default(told)
        lines.append(
            f"| `{name}` | {default} | {_accepted(told)} | {told.get('description', '')} |".replace("|  |", "| |")
        )
    return "\n".join(lines) + "\n"


def _default(told: dict[str, Any]) -> str:
    value = told.get("default")
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ""  # a section: its table has them
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else f"{value}"


def _accepted(told: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "$ref" in told:
        return "mapping"
    if "anyOf" in told:
        return " or ".join(dict.fromkeys(text for kind in told["anyOf"] if (text := _accepted(kind)) != "null"))
    if "enum" in told:
        return ", ".join(f"`{value}`" for value in told["enum"])
    if "const" in told:
        return f"`{told['const']}`"
    if told["type"] == "array":
        return f"list of {_accepted(told['items'])}"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    text = names.get(told["type"], told["type"])
    bounds = [
        f"{sign} {told[key]:g}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in told
    ]
    return f"{text} {', '.join(bounds)}".strip()


def _words(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _one_line(schema: Any) -> Any:
    """Descriptions without the line breaks of the source they stand in."""
    if isinstance(schema, dict):
        return {
            key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _one_line(value)
            for key, value in schema.items()
        }
    return [_one_line(part) for part in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    print(reference(), end="")
