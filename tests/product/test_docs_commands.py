"""Every command in the README and the docs: it can be typed as it stands, and a test or a script runs it."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from dtr_deploy import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STARTS = ("dtr-deploy", "vllm", "make", "python", "pip", "curl", "bash", "scripts/")

RUN_BY = {
    "dtr-deploy init": "tests/product/test_recipe_template.py",
    "dtr-deploy (plan|distill|search|export|build)": "tests/product/test_whole_path.py",
    "dtr-deploy (verify|bench|show|report|compare)": "tests/product/test_whole_path.py",
    "dtr-deploy push": "tests/product/test_push.py",
    "dtr-deploy quantize": "tests/vllm/test_quantized.py",
    "dtr-deploy schema": "tests/product/test_recipe_schema.py",
    "dtr-deploy doctor": "tests/vllm/test_serving_host.py",
    "dtr-deploy --install-completion": "tests/product/test_terminal.py",
    "vllm serve": "tests/vllm/test_server.py",  # on tests/vllm/serving.py, which starts the module behind the command
    "vllm bench serve": "benchmarks/serving_vllm.py",
    "curl http://127.0.0.1:8000/v1/chat/completions": "tests/vllm/test_server.py",
    "python -m vllm.entrypoints.openai.api_server": "tests/vllm/serving.py",
    "python -m dtr_vllm.sizing": "tests/vllm/test_sizing.py",
    "python -m dtr_kernels.compiled": "tests/kernels/test_compiled.py",
    "python examples/": "tests/onnx/test_examples.py",
    "python -m benchmarks.(operator|distill)": "tests/benchmarks/test_command_lines.py",
    "python -m benchmarks.scoring": "tests/benchmarks/test_scoring.py",
    "python -m benchmarks.scale": "tests/benchmarks/test_scale.py",
    "python -m benchmarks.cluster": "tests/cluster/test_cluster.py",
    "python -m benchmarks.studies.twins": "tests/benchmarks/test_twins_study.py",
    "python -m benchmarks.studies.(frontier|selection)": "tests/benchmarks/test_search_studies.py",
    "python -m benchmarks.studies.recall": "tests/benchmarks/test_recall_study.py",
    "python -m benchmarks.studies.cost_model": "tests/benchmarks/test_study_cost_model.py",
    "python -m benchmarks.(serving_vllm|soak_vllm|served_score)": "tests/benchmarks/test_serving_vllm.py",
    "python -m benchmarks.serving_onnx": "tests/benchmarks/test_serving_onnx.py",
    "python -m benchmarks.serving_cache": "tests/vllm/test_serving_cache.py",
    "python -m benchmarks.serving_memory": "tests/vllm/test_sizing.py",
    "python -m benchmarks.soak_onnx": "tests/benchmarks/test_soak_onnx.py",
    "make (quickstart|test|benchmark)": "Makefile",
    "scripts/install_cpu.sh": "Makefile",
    "pip install": "scripts/install_cpu.sh",
}
"""Beginning of a command (a regular expression) -> the file that runs it, or what it does under another name."""


NAMED_OTHERWISE = {
    "dtr-deploy --install-completion": "--install-completion",
    "vllm bench serve": '"bench"',
    "curl http://127.0.0.1:8000/v1/chat/completions": "/v1/chat/completions",
}
"""What of the runner's text says that it runs the command, where that is not the command's own word."""


def evidence(words: tuple[str, ...]) -> str:
    """What the file that runs a command has in it: the subcommand, the module's or the program's name, the target."""
    line = " ".join(words)
    if otherwise := [text for start, text in NAMED_OTHERWISE.items() if line.startswith(start)]:
        return otherwise[0]
    if words[1:2] == ("-m",):
        return words[2].rpartition(".")[2]
    return Path(words[0 if words[0].startswith("scripts/") else 1]).name


class Shown(NamedTuple):
    """A command on a page. whole: from a block, to be typed as it is; a mention in a line may leave its options out."""

    page: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def shown() -> Iterator[Shown]:
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text()
        for language, code in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if language in ("", "bash", "sh"):
                for line in code.splitlines():
                    if line.startswith(STARTS) and (words := words_of(line)):
                        yield Shown(name, words, whole=True)
        for mention in re.findall(r"`([^`\n]+)`", text):
            if re.match(rf"({'|'.join(STARTS[:-1])}) |scripts/", mention):
                yield Shown(name, words_of(mention), whole=False)


def words_of(line: str) -> tuple[str, ...]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # goes on in the next line: only its beginning is looked at
        words = line.split()
    return tuple(words[: words.index(">")] if ">" in words else words)


COMMANDS = sorted(set(shown()))


def parse(command: Any, words: tuple[str, ...], name: str) -> None:
    """What the program would do with these words, up to running them."""
    command.make_context(name, list(words)).close()


def test_commands_are_found() -> None:
    beginnings = {" ".join(command.words[:2]) for command in COMMANDS}
    assert {"dtr-deploy build", "vllm serve", "make quickstart", "python -m"} <= beginnings and len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_can_be_typed_and_is_run_somewhere(command: Shown) -> None:
    line = " ".join(command.words)
    runners = [file for start, file in RUN_BY.items() if re.match(start, line)]
    assert runners, f"{command}: no test or script runs this"
    text = evidence(command.words)
    assert any(text in (ROOT / file).read_text() for file in runners), f"{command}: {text} is not in {runners}"
    for word in command.words[1:]:
        if re.match(r"(recipes|examples|scripts|benchmarks|docs|tests)/", word):
            assert (ROOT / word).exists(), f"{command}: no {word}"
    program, arguments = command.words[0], command.words[1:]
    if program == "dtr-deploy":
        group: Any = typer.main.get_command(cli.app)
        if arguments[0].startswith("-"):
            assert any(arguments[0] in parameter.opts for parameter in group.params), command
        else:
            assert arguments[0] in group.commands, command
            if command.whole:
                parse(group.commands[arguments[0]], arguments[1:], arguments[0])
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif arguments[:1] == ("-m",) and arguments[1].startswith("benchmarks."):
        module = import_module(arguments[1])
        if command.whole and hasattr(module, "app"):
            parse(typer.main.get_command(module.app), arguments[2:], arguments[1])
        source = Path(str(module.__file__)).read_text()
        missing = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]
        assert hasattr(module, "app") or not missing, f"{command}: {missing}"
    elif program == "python" and arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), command
