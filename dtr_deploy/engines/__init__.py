"""Adapters to the programs that serve a model: PyTorch (the reference), vLLM, ONNX Runtime and onnxruntime-genai.

This module imports none of them. `availability()` says which can be used here and `require()` refuses, in one line, an
engine that cannot.
"""

from __future__ import annotations

from importlib import import_module

from dtr_deploy.errors import UsageError

ENGINE_MODULES = {
    "torch": "dtr_deploy.engines.torch",
    "vllm": "dtr_deploy.engines.vllm",
    "ort": "dtr_deploy.engines.ort",
    "genai": "dtr_deploy.engines.genai",
}
"""Engine name -> the adapter's module; each has `available() -> (bool, reason)`, which imports nothing heavy."""


def available(name: str) -> tuple[bool, str]:
    """Whether engine `name` can be used here, and its version, or else the reason why not."""
    if name not in ENGINE_MODULES:
        raise UsageError(f"engine {name!r} is unknown; accepted: {', '.join(ENGINE_MODULES)}")
    return import_module(ENGINE_MODULES[name]).available()


def availability() -> dict[str, tuple[bool, str]]:
    """`available()` of every engine."""
    return {name: available(name) for name in ENGINE_MODULES}


def require(name: str, wanted_by: str) -> None:
    """Raise `UsageError` unless engine `name` can be used; `wanted_by` names the key or option that asks for it."""
    ok, reason = available(name)
    if not ok:
        raise UsageError(
            f"{wanted_by}: engine {name} cannot be used here ({reason}); `dtr-deploy doctor` lists what can"
        )
