"""Hooks of mkdocs: pages that are files elsewhere in the project, and equations as MathML.

A page of `ELSEWHERE` is written once, where a reader of the repository looks for it; its links are turned towards the
site, and what the site does not hold (recipes, examples) becomes its path. Equations are fenced blocks named `math`, in
LaTeX, which GitHub draws too; here they are turned into MathML while building, so that a page needs no script for them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"index.md": "README.md", "benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#]*)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    fence = {"name": "math", "class": "math", "format": equation}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = ELSEWHERE.get(page.file.src_uri)
    if source is None:
        return markdown
    folder = posixpath.dirname(source)
    return LINK.sub(lambda link: _towards_the_site(link, folder), (ROOT / source).read_text(encoding="utf-8"))


def _towards_the_site(link: re.Match[str], folder: str) -> str:
    text, path, anchor = link[1], posixpath.normpath(posixpath.join(folder, link[2])), link[3] or ""
    pages = {source: page for page, source in ELSEWHERE.items()}
    if path in pages:
        return f"[{text}]({pages[path]}{anchor})"
    if path.startswith("docs/"):
        return f"[{text}]({path.removeprefix('docs/')}{anchor})"
    return f"`{path}`"


def equation(source: str, *_: Any, **__: Any) -> str:
    """One display equation a line."""
    lines = [line for line in source.splitlines() if line.strip()]
    return "".join(f'<p class="math" style="overflow-x: auto">{convert(line, display="block")}</p>' for line in lines)
