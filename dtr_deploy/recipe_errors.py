"""Where in a YAML file a mistake is and how it reads: one line with file, line, key and what is accepted.

Knows pydantic and YAML, not what a recipe means.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dtr_deploy.errors import UsageError

Location = tuple[str | int, ...]
"""The way to a value, keys and list indices: ("tasks", 0, "file")."""


ACCEPTED = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "a list of at least one entry",
    "tuple_type": "a list",
    "list_type": "a list",
}
"""What to write, by pydantic's type of error."""


@dataclass
class YamlLines:
    """The line (from 1) of every key and list item of a YAML document."""

    line_of: dict[Location, int] = field(default_factory=dict)

    def at(self, location: Location) -> int | None:
        """The line of the value at `location`, or of the nearest part of the way to it that is in the file."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.line_of:
                return self.line_of[location[:length]]
        return None


@dataclass(frozen=True)
class Finding:
    """One mistake."""

    location: Location
    message: str

    def text(self, source: Path, lines: YamlLines | None) -> str:
        line = lines.at(self.location) if lines else None
        key = ""
        for part in self.location:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        place = f"{source}:{line}" if line else f"{source}"
        return f"{place}: {key}: {self.message}" if key else f"{place}: {self.message}"


def parse_yaml(text: str, source: Path) -> tuple[dict[str, Any], YamlLines]:
    """The document as plain values, and its lines. Raises `UsageError` for bad syntax, repeated keys, or no mapping."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{source}: a recipe is a YAML mapping (key: value); see docs/recipe.md")
    lines = YamlLines()
    _collect_lines(root, (), lines, source)
    return data, lines


def _collect_lines(node: yaml.Node, location: Location, lines: YamlLines, source: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(f"{source}:{key_node.start_mark.line + 1}: keys are plain names")
            here = (*location, key_node.value)
            line = key_node.start_mark.line + 1
            if here in lines.line_of:
                first = lines.line_of[here]
                raise UsageError(f"{source}:{line}: key {key_node.value!r} is there twice (first in line {first})")
            lines.line_of[here] = line
            _collect_lines(value, here, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines.line_of[(*location, index)] = value.start_mark.line + 1
            _collect_lines(value, (*location, index), lines, source)


def findings_of(error: ValidationError, root: type[BaseModel]) -> list[Finding]:
    """pydantic's errors in the words of a recipe, each key once; of a key and something in it, only the latter."""
    found: dict[Location, Finding] = {}
    for detail in error.errors(include_url=False):
        location = tuple(detail["loc"])
        found.setdefault(location, Finding(location, _message(dict(detail), location, root)))
    # A list whose only entry is wrong also counts as empty.
    inner = {location[:length] for location in found for length in range(1, len(location))}
    return [finding for location, finding in found.items() if location not in inner]


def _message(detail: dict[str, Any], location: Location, root: type[BaseModel]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    got = f" (got {_short(detail.get('input'))})"
    if kind == "extra_forbidden":
        known = list(_model_at(root, location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key; {hint}accepted: {', '.join(known)}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        near = difflib.get_close_matches(str(detail.get("input")), _quoted(context["expected"]), n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"accepted: {context['expected'].replace(' or ', ', ')}{got}{hint}"
    if kind == "value_error":
        return f"{context['error']}{got}"
    if kind == "string_pattern_mismatch":
        return f"accepted: letters, digits, '.', '_' and '-', beginning with a letter or digit{got}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"a mapping (key: value) belongs here{got}"
    if kind in ACCEPTED:
        return f"accepted: {ACCEPTED[kind]}{got}"
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value should ")
    return f"accepted: {message}{got}"


def _model_at(model: type[BaseModel], location: Location) -> type[BaseModel]:
    """The section of the schema that `location` leads to."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation) or model
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def _quoted(expected: str) -> list[str]:
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
