"""Triton kernels on a GPU: flash-linear-attention's and the copy of its gated delta rule in vLLM."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import Contender, Ready, Unavailable, directions, only
from benchmarks.contenders.repeated import ready, repeated_operands
from benchmarks.problem import Inputs

FLA, VLLM = "fla.ops.gated_delta_rule", "vllm.third_party.flash_linear_attention.ops"
CHUNK, FUSED = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"


def contenders() -> list[Contender]:
    return [
        Contender("fla chunk", "rule", _prepare(FLA, CHUNK), directions("forward", "backward")),
        Contender("fla fused recurrent", "rule", _prepare(FLA, FUSED), directions("forward", "decode"), graph=True),
        Contender("fla chunk gla", "rule", _prepare_gla("chunk_gla"), directions("forward", "backward")),
        Contender("fla fused recurrent gla", "rule", _prepare_gla("fused_recurrent_gla"), directions("decode")),
        Contender("vLLM chunk", "rule", _prepare(VLLM, CHUNK), directions("forward")),
        Contender("vLLM fused recurrent", "rule", _prepare(VLLM, FUSED), directions("forward", "decode")),
    ]


def _prepare(module: str, name: str) -> Callable[[Inputs], Ready]:
    def prepare(inputs: Inputs) -> Ready:
        problem = inputs.problem
        only(problem, "gated_delta")
        function = _import(module, name)
        # Chunked kernels multiply on tensor cores and take no float32; the fused ones take any.
        dtype = torch.bfloat16 if name == CHUNK and problem.dtype == "float32" else problem.torch_dtype
        operands = repeated_operands(inputs, dtype)
        transposed = module == VLLM  # its states lie [N,H,V,K]
        if transposed:
            operands["state"] = operands["state"].mT.contiguous()
        options: dict[str, Any] = {"use_qk_l2norm_in_kernel": False}
        if module == VLLM and name == FUSED:
            options["inplace_final_state"] = False
        else:
            options["output_final_state"] = True

        def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            out, final = function(q, k, v, g=g, beta=beta, initial_state=state, **options)
            return out, final.mT if transposed else final

        return ready(inputs, run, str(dtype).removeprefix("torch."), operands)

    return prepare


def _prepare_gla(name: str) -> Callable[[Inputs], Ready]:
    """GLA: the gated rule with a decay for each key dimension."""

    def prepare(inputs: Inputs) -> Ready:
        problem = inputs.problem
        only(problem, "gated", per_key=True)
        function = _import("fla.ops.gla", name)
        dtype = torch.bfloat16 if name == "chunk_gla" and problem.dtype == "float32" else problem.torch_dtype
        decay = "g" if name == "chunk_gla" else "gk"

        def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            out, final = function(q, k, v, **{decay: g}, initial_state=state, output_final_state=True)
            return out, final

        return ready(inputs, run, str(dtype).removeprefix("torch."), repeated_operands(inputs, dtype))

    return prepare


def _import(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        # Missing, or built for another platform, or without a driver: the reason is the row's text.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"{module} is not importable: {reason}") from error
