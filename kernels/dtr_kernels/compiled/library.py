"""The compiled library, loaded once a process."""

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dtr_kernels.compiled.build import BuildError, build

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "dtr_linear_forward": [_P] * 12 + [_L] * 14 + [_I] * 4 + [_F, _I],
    "dtr_linear_backward": [_P] * 16 + [_L] * 7 + [_I] * 2 + [_F, _I],
    "dtr_window_forward": [_P] * 13 + [_L] * 13 + [_I] * 4 + [_F, _I],
    "dtr_window_backward": [_P] * 13 + [_L] * 5 + [_F, _I],
    "dtr_window_step": [_P] * 10 + [_L] * 12 + [_I] * 3 + [_F, _I],
    "dtr_unit_rows": [_P] * 2 + [_L] * 4 + [_I, _F, _I],
    "dtr_unit_rows_backward": [_P] * 3 + [_L] * 4 + [_I, _F, _I],
    "dtr_form_step": [_P] * 10 + [_L] * 6 + [_I] * 5,
    "dtr_add_norm": [_P] * 5 + [_L] * 2 + [_I, _F, _I],
    "dtr_silu_mul": [_P] * 2 + [_L] * 2 + [_I] * 2,
    "dtr_gates": [_P] * 5 + [_L] * 4 + [_I] * 3,
    "dtr_rotary": [_P] * 4 + [_L] * 4 + [_I] * 3,
    "dtr_readout": [_P] * 3 + [_L] * 3 + [_I, _F, _I],
    "dtr_readout_backward": [_P] * 5 + [_L] * 3 + [_F, _I],
}
NO_MEMORY, BAD_INDEX = 1, 2  # simd.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none. DTR_KERNELS_COMPILED=0 turns it off."""
    if os.environ.get("DTR_KERNELS_COMPILED") == "0":
        return None, "turned off by DTR_KERNELS_COMPILED=0"
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        warnings.warn(f"dtr_kernels: {error}; linear attention runs in torch, several times slower", stacklevel=2)
        return None, str(error)
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, _I
    return library, ""


_disabled = threading.local()


@contextmanager
def disabled(yes: bool = True) -> Iterator[None]:
    """While this is open, this thread does without the compiled kernels, and without those for GPUs where it has the
    choice: they are held to what torch computes."""
    before = getattr(_disabled, "yes", False)
    _disabled.yes = yes or before
    try:
        yield
    finally:
        _disabled.yes = before


def is_disabled() -> bool:
    """Whether `disabled` is open in this thread."""
    return getattr(_disabled, "yes", False)


def is_available() -> bool:
    """Whether the compiled kernels can be used; the first call compiles them if need be."""
    return not is_disabled() and _load()[0] is not None


def can_take(*operands: Tensor) -> bool:
    """Whether the compiled kernels can be given these operands: plain CPU tensors of at most float32."""
    return (
        all(x.device.type == "cpu" and x.dtype in TYPES for x in operands)
        and not torch.compiler.is_compiling()
        and is_available()
    )


def unavailable_reason() -> str:
    """Why they cannot be used, one line; empty if they can."""
    return _load()[1]


def pointer(x: Tensor | None) -> int | None:
    """Address of the first element; None stays None. The caller keeps the tensor alive over the call."""
    return None if x is None else x.data_ptr()


def call(name: str, *arguments: int | float | None) -> None:
    """Call a kernel. MemoryError: no scratch memory. IndexError: slots, positions or borders out of range."""
    library = _load()[0]
    assert library is not None
    result = getattr(library, name)(*arguments)
    if result == NO_MEMORY:
        raise MemoryError(f"{name}: no scratch memory")
    if result == BAD_INDEX:
        raise IndexError(f"{name}: a slot outside the pool, a negative position, or borders outside the tokens")


def rows(x: Tensor) -> Tensor:
    """[N,H,D] whose rows are contiguous; tokens may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def indices(x: Tensor) -> Tensor:
    """int64 and contiguous, on the CPU."""
    return x.to("cpu", torch.int64).contiguous()
