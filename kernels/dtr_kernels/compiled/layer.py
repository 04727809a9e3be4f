"""What surrounds a mixer in a decoder layer while serving on a CPU: residual addition with RMS norm, gated activation.

In torch each is a chain of passes over [tokens, width], and of calls, which one token a sequence feels more. Rounded as
vLLM's layers round. No gradients.
"""

import torch
from torch import Tensor

from dtr_kernels.compiled.library import TYPES, call, can_take, pointer
from dtr_kernels.compiled.rows import MAX_DIM

DTYPES = (torch.float32, torch.bfloat16)
# Elements below which one thread does it: waking another costs as much.
WORTH_A_THREAD = 1 << 16


def takes(x: Tensor) -> bool:
    """Whether `silu_mul` takes x."""
    return x.dtype in DTYPES and can_take(x)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `add_norm` takes these hidden states [N,width] and this norm's weight [width]."""
    return x.dtype == weight.dtype and x.shape[-1] <= MAX_DIM and takes(x)


@torch.no_grad()
def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm of x + residual over the last dimension, and the sum itself (x without a residual).

    x, residual [N,width], weight [width], of one dtype, float32 or bfloat16, on the CPU.
    """
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    call(
        "dtr_add_norm", pointer(x), pointer(residual), pointer(weight), pointer(total), pointer(out), *x.shape,
        TYPES[x.dtype], epsilon, _threads(x),
    )  # fmt: skip
    return out, total


@torch.no_grad()
def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up, [N,width], of x [N,2*width] = gate and up side by side, float32 or bfloat16."""
    x = x.contiguous()
    out = x.new_empty(len(x), x.shape[1] // 2)
    call("dtr_silu_mul", pointer(x), pointer(out), *out.shape, TYPES[x.dtype], _threads(out))
    return out


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < WORTH_A_THREAD else torch.get_num_threads()
