"""The documentation: it builds without a warning, loads nothing from elsewhere, and what it quotes is what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_deploy.distill.stage import distill
from dtr_deploy.distill.trainer import DistillSettings
from dtr_deploy.engines.ort import OrtEngine
from dtr_deploy.engines.torch import TorchEngine
from dtr_deploy.export.onnx import export_model
from dtr_deploy.export.onnx.forms import EMITTERS
from dtr_deploy.hybrid.model import make_hybrid
from dtr_kernels.forms import FORMS
from tests.tiny import tiny_backbone, tiny_tokenizer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CODE = re.compile(r"^```python(?: title=\"([^\"]*)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", ROOT / "mkdocs.yml", "-d", out]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return out


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*href=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*href=\"([^\"]+)\"[^>]*rel=\"(?:stylesheet|preconnect|icon)\"", text)
        assert loaded and not [url for url in loaded if url.startswith(("http", "//"))], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", style.read_text()), style


def test_pages_from_elsewhere_and_equations_are_there(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert "gives back a hybrid model" in home and "<code>recipes/quickstart.yaml</code>" in home
    assert 'href="recipe/' in home
    assert "Keeping it honest" in (site / "benchmarks" / "index.html").read_text()
    concepts = (site / "concepts" / "index.html").read_text()
    assert concepts.count("<math") >= 5 and "```" not in concepts


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """Each heading is a part of a message somewhere in the source; vLLM's own is not ours to check."""
    messages = re.findall(r"^`(.+)`\n:", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    folders = (ROOT / "dtr_deploy", ROOT / "kernels", ROOT / "plugins")
    source = "\n".join(file.read_text() for folder in folders for file in sorted(folder.rglob("*.py")))
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)  # texts that go on in the next line
    families = ", ".join(("llama", "qwen2", "qwen3"))
    source = source.replace("{', '.join(FAMILIES)}", families)
    missing = [message for message in messages if message not in source and not message.startswith("Model arch")]
    assert missing == []


def page_code(page: str, title: str) -> str:
    found = {name: code for name, code in CODE.findall((DOCS / page).read_text())}
    return found[title]


def test_the_guides_form_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guide writes is a form: registered as it says, it trains, decodes what it prefills, and exports."""
    names: dict[str, type] = {}
    exec(compile(page_code("add-a-form.md", "retention.py"), "retention.py", "exec"), names)
    monkeypatch.setitem(FORMS, "retention", names["Retention"])
    backbone, layout = tiny_backbone(layers=3), (None, "retention", "retention")
    text = (8 + torch.randint(0, 5, (12, 48), generator=torch.Generator().manual_seed(0)).cumsum(1)) % 512
    settings = DistillSettings(tokens=12 * 48 * 4, warmup_steps=2)
    found = distill(backbone, text[2:], text[:2], ["retention"], [1, 2], 8, settings, tmp_path)
    for report in found.reports:
        assert report.trained.relative_error < report.start.relative_error

    hybrid = make_hybrid(backbone, layout, 8).eval()
    whole = hybrid(text[:2], use_cache=False).logits
    past, steps = None, []
    for token in text[:2].T:
        out = hybrid(token[:, None], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-4, rtol=2e-4)
    # One process without compiled kernels, in float64, token by token.
    for layer in (1, 2):
        hybrid.model.layers[layer].self_attn.backend = "reference"
    torch.testing.assert_close(hybrid(text[:2], use_cache=False).logits, whole, atol=2e-4, rtol=2e-4)

    exec(compile(page_code("add-a-form.md", "emitters/retention.py"), "retention.py", "exec"), names)
    monkeypatch.setitem(EMITTERS, "retention", names["RetentionEmitter"])
    export_model(hybrid, tiny_tokenizer(), tmp_path / "onnx", "fp32", "cpu")
    prompts = [text[0].tolist(), text[1, :7].tolist()]  # the shorter one is padded
    engine = OrtEngine(tmp_path / "onnx", "fp32", threads=1)
    for ours, theirs in zip(engine.score(prompts), TorchEngine(hybrid).score(prompts), strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)


@pytest.mark.parametrize("page", sorted({*DOCS.rglob("*.md"), ROOT / "README.md"}), ids=lambda page: page.stem)
def test_python_in_pages_is_python(page: Path) -> None:
    for _, code in CODE.findall(page.read_text()):
        compile(code, str(page), "exec")
