"""When the Triton kernels are the ones to use. Imports no triton."""

import functools
import importlib.util

import torch
from torch import Tensor

from dtr_kernels.compiled.library import is_disabled


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_gpu(*operands: Tensor) -> bool:
    """Whether the Triton kernels can be given these operands: CUDA tensors of at most float32."""
    return (
        all(x.is_cuda and x.dtype != torch.float64 for x in operands)
        and not is_disabled()
        and not torch.compiler.is_compiling()
        and triton_is_installed()
    )
