"""In which precision the large products of a model run while twins are trained and layouts are scored."""

import torch

from dtr_deploy.errors import UsageError

PRECISIONS = ("auto", "float32", "bfloat16")


def products_dtype(precision: str, device: str) -> torch.dtype:
    """float32 or bfloat16; "auto" is bfloat16 where the processor multiplies it natively (a CPU: AVX512-BF16 or AMX).

    device: a torch device type. Raises UsageError for a precision that is not known.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: accepted are {', '.join(PRECISIONS)}")
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = device == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def products_in(dtype: torch.dtype, device: str) -> torch.autocast:
    """A context in which linear layers multiply in `dtype`; weights, residual stream, states and norms stay float32."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
