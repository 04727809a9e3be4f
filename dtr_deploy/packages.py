"""Which packages building needs that serving does without.

`pip install dtr-deploy` beside vLLM adds nothing but this project; `dtr-deploy[cpu]` and `dtr-deploy[gpu]` add what is
here, and the engines.
"""

from __future__ import annotations

from importlib.util import find_spec

from dtr_deploy.errors import UsageError

BUILD_PACKAGES = ("scipy", "datasets", "gguf", "plotly")
"""The extra `build`: the name of each one's distribution, which is its module's as well."""

ENGINE_PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "vllm", "lm_eval")
"""Modules that the extras `cpu` and `gpu` add besides."""


def missing_text(modules: tuple[str, ...]) -> str:
    """One line for a person who has not installed `modules`."""
    some = f"the Python package{'s' if len(modules) > 1 else ''} {', '.join(modules)}"
    return f"this needs {some}, which serving does without: pip install 'dtr-deploy[cpu]', or 'dtr-deploy[gpu]'"


def require_build_packages() -> None:
    """Raise `UsageError` if a package that some stage of a build needs is not installed."""
    missing = tuple(name for name in BUILD_PACKAGES if find_spec(name) is None)
    if missing:
        raise UsageError(missing_text(missing))
