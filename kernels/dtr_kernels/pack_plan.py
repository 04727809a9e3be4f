"""How a ragged pack is cut into the chunks that GPU kernels work on: made once a step, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtr_kernels.gpu import on_gpu

if TYPE_CHECKING:
    from dtr_kernels.triton import ChunkPlan


@dataclass(frozen=True)
class PackPlan:
    """Chunks for the operator and for the window."""

    operator: ChunkPlan
    window: ChunkPlan


def products_of(dtype: torch.dtype) -> torch.dtype:
    """What a GPU multiplies in for a model of `dtype`: bfloat16 for float16 too, which states do not fit."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def pack_plan(cu_seqlens: Tensor, tokens: int, dtype: torch.dtype) -> PackPlan | None:
    """The plan of a pack with borders `cu_seqlens` [R+1] on a GPU, `tokens` rows and a model of `dtype`; None on a CPU,
    whose kernels need none. The host reads no tensor."""
    if not on_gpu(cu_seqlens):
        return None
    from dtr_kernels.triton import plan_of_operator, plan_of_window

    return PackPlan(plan_of_operator(cu_seqlens, tokens, products_of(dtype)), plan_of_window(cu_seqlens, tokens))
