"""Which programs a recipe's run has to agree with, as rungs of the ladder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dtr_deploy.engines.torch import TorchEngine
from dtr_deploy.hybrid.layout import replaced
from dtr_deploy.hybrid.precision import products_dtype
from dtr_deploy.parity.ladder import EXACT_PRECISIONS, Rung
from dtr_deploy.recipe import Recipe
from dtr_deploy.recipe_sections import VLLM_PRECISION
from dtr_deploy.serving import base_of, hybrid_of, open_for_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_LOOP_LENGTH = 130
"""The token loop and the recurrent backend run a Python step a token and layer: longer prompts would take minutes."""


def served_precisions(recipe: Recipe) -> list[tuple[str, str]]:
    """(engine, precision) of everything a recipe exports, fp32 before reduced precisions.

    vLLM serves the checkpoint at any precision, so it is always held to fp32 as well.
    """
    served: list[tuple[str, str]] = []
    if recipe.export.vllm is not None:
        precisions = dict.fromkeys(("fp32", vllm_precision(recipe.export.vllm.dtype)))
        served += [("vllm", precision) for precision in precisions]
    if recipe.export.onnx is not None:
        served += [("ort", precision) for precision in dict.fromkeys(recipe.export.onnx.precision)]
    return sorted(served, key=lambda pair: (pair[0], pair[1] not in EXACT_PRECISIONS))


def vllm_precision(dtype: str) -> str:
    """The precision's name of a recipe's `export.vllm.dtype`, on this machine."""
    if dtype != "auto":
        return VLLM_PRECISION[dtype]
    chosen = products_dtype("auto", "cuda" if torch.cuda.is_available() else "cpu")
    return VLLM_PRECISION[str(chosen).removeprefix("torch.")]


def base_precisions(recipe: Recipe) -> list[tuple[str, str]]:
    """(engine, precision) at which the backbone is served too: reduced precisions, and what is benchmarked."""
    reduced = [pair for pair in served_precisions(recipe) if pair[1] not in EXACT_PRECISIONS]
    return list(dict.fromkeys([*reduced, *benchmarked(recipe)]))


def benchmarked(recipe: Recipe) -> list[tuple[str, str]]:
    """(engine, precision) of the throughput table: the target's own, and of other engines the last one exported."""
    last = dict(served_precisions(recipe))
    last[recipe.target.engine] = recipe.target.precision
    return sorted(last.items())


def ladder_of(recipe: Recipe, run: Path, hybrid: PreTrainedModel, max_length: int) -> list[Rung]:
    """All rungs of a run: the operator's other backends, the cached model, and every served engine and precision."""
    rungs = [Rung("torch cached", "fp32", partial(TorchEngine, hybrid, cached=True))]
    if replaced(hybrid.config.forms):
        loop = partial(TorchEngine, hybrid, backend="reference")
        recurrent = partial(TorchEngine, hybrid, backend="recurrent")
        rungs = [
            Rung("torch token loop", "fp64", loop, max_length=TOKEN_LOOP_LENGTH),
            Rung("torch recurrent", "fp32", recurrent, max_length=TOKEN_LOOP_LENGTH),
            Rung("torch chunked", "fp32", partial(TorchEngine, hybrid, backend="chunked")),
            *rungs,
        ]
    for engine, precision in served_precisions(recipe):
        opener = partial(open_for_scores, engine, precision)
        rungs.append(
            Rung(
                engine,
                precision,
                hybrid=partial(opener, hybrid_of(run), max_length),
                base=None if precision in EXACT_PRECISIONS else partial(opener, base_of(run), max_length),
            )
        )
    return rungs
