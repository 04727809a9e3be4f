"""A device that is no CPU, on a machine that has only a CPU: `other:0`.

Its tensors hold CPU tensors and compute by them, but an operator that is given tensors of two devices fails as it does
on a GPU. What runs here mixes no devices, whatever the speed and rounding of a real one. There is one such device,
since a backend in Python has no more for autograd; the CPU is the other one of a model that is spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_BACKEND = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    is_initialized=lambda: True,
    _is_in_bad_fork=lambda: False,
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    get_rng_state=lambda device=0: torch.get_rng_state(),
    set_rng_state=lambda state, device=0: None,
    manual_seed_all=lambda seed: None,
)
_setup_privateuseone_for_python_backend("other", backend_module=_BACKEND)

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
"""CUDA takes indices from the CPU."""


class MixedDevices(RuntimeError):
    """What a GPU would refuse."""


class OtherTensor(torch.Tensor):
    """A tensor on `other:N`, whose numbers are in `held`, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> OtherTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )

    def __init__(self, held: torch.Tensor, device: torch.device) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OtherTensor({self.held}, device={self.device})"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    devices, wrappers = [], {}

    def unwrap(value: Any) -> Any:
        if isinstance(value, OtherTensor):
            devices.append(value.device)
            wrappers[id(value.held)] = value
            return value.held
        if isinstance(value, torch.Tensor) and value.ndim:  # numbers may come from the CPU
            devices.append(value.device)
        return value

    plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    allowed = func in MOVES or (func in INDEXING and isinstance(args[0], OtherTensor))
    if len(set(devices)) > 1 and not allowed:
        raise MixedDevices(f"{func}: tensors on {', '.join(sorted(map(str, set(devices))))}")
    wanted = kwargs.get("device")
    if wanted is not None:
        plain_kwargs["device"] = torch.device("cpu")
        target = torch.device(wanted)
    else:
        target = next((device for device in devices if device.type == "other"), torch.device("cpu"))
        if func in MOVES:
            target = devices[0] if devices else target
    result = func(*plain_args, **plain_kwargs)
    if target.type == "other" and target.index is None:
        target = torch.device("other", 0)

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OtherTensor):
            return value
        if id(value) in wrappers:  # an operator in place returns what it was given
            return wrappers[id(value)]
        if target.type == "other":
            # A move to the CPU's own dtype may return its input; two devices never share memory.
            return OtherTensor(value.clone() if func in MOVES else value, target)
        return value.clone() if func in MOVES and devices and devices[0].type == "other" else value

    return tree_map(wrap, result)


class _Everywhere(TorchDispatchMode):
    """Makes what is created on `other`, from nothing or from CPU tensors, a tensor there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[None]:
    """While open, `other:0` can be used."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes one on the CPU and moves it where the mode sees it
    try:
        with _Everywhere():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
