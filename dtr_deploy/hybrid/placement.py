"""Where a model lies: on the CPU, on a GPU, or with its layers spread over several devices.

Which layer goes where is accelerate's to say. Its hooks are not used: they replace `forward` of the one module they are
attached to, and a twin's layer is a copy of the teacher's with another attention, whose copied hook would run the
teacher. Inputs are moved by torch's own pre-hooks instead, which a copy of a layer keeps and calls for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtr_deploy.errors import UsageError

AUTO, CPU, SPREAD = "auto", "cpu", "spread"
ACCEPTED = "auto, cpu, cuda, cuda:N, or spread (over all GPUs, what is left on the CPU)"

ROOM = 0.6
"""Share of a GPU's free memory that weights may take; the rest is for twins in training, activations and engines. A
guess, not measured."""


def choose(device: str, weight_bytes: int) -> str:
    """What `device` means on this machine: "cpu", "cuda:N" or "spread".

    "auto" is the GPU with the most free memory where there is one, all of them where `weight_bytes` do not fit it.
    Raises `UsageError` for a device that is not known or not there.
    """
    if device == CPU:
        return CPU
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == AUTO:
        if not gpus:
            return CPU
        free = [torch.cuda.mem_get_info(number)[0] for number in range(gpus)]
        return f"cuda:{free.index(max(free))}" if weight_bytes <= ROOM * max(free) else SPREAD
    kind, _, number = device.partition(":")
    if device != SPREAD and (kind != "cuda" or (number and not number.isdigit())):
        raise UsageError(f"device {device!r}: accepted are {ACCEPTED}")
    if int(number or 0) >= gpus:
        raise UsageError(f"device {device!r}: torch sees {gpus or 'no'} GPU{'s' if gpus > 1 else ''} here")
    return device if device == SPREAD or number else "cuda:0"


def place(model: Any, device: str) -> None:
    """Move a causal LM in place. device: "cpu", a torch device, or "spread"."""
    if device != SPREAD:
        bring_back(model, device)
        return
    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    spread(model, device_map(model, {number: int(ROOM * room) for number, room in free.items()}))


def device_map(model: Any, gpu_bytes: Mapping[int, int]) -> dict[str, torch.device]:
    """accelerate's map of module names to devices, GPUs filled evenly. gpu_bytes: what weights may take on each."""
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError:
        raise UsageError("device 'spread': needs the Python package accelerate") from None
    options = {"no_split_module_classes": list(model._no_split_modules or ())}
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    room = dict[int | str, int]([(CPU, 2 * weights), *gpu_bytes.items()])
    memory = get_balanced_memory(model, room, **options)
    found = infer_auto_device_map(model, memory, **options)
    return {name: torch.device(f"cuda:{at}" if isinstance(at, int) else at) for name, at in found.items()}


def spread(model: Any, where: Mapping[str, torch.device | str]) -> None:
    """Move the modules of `model` in place, and from now on the inputs of each to it. where: by module name; modules
    that have none of their own lie where the one they are in does.

    The embedding is where a pass begins, so rotary angles are computed there.
    """
    for name, module in _parts(model).items():
        device = torch.device(_of(name, where))
        module.to(device)
        _stay(module)
        module.register_forward_pre_hook(partial(_move_inputs, device), with_kwargs=True)
    model.model.rotary_emb.to(torch.device(_of("model.embed_tokens", where)))


def bring_back(model: Any, device: torch.device | str = CPU) -> None:
    """Move all of `model` to one device in place, the hooks of `spread` removed."""
    for module in _parts(model).values():
        _stay(module)
    model.to(device)
    free_gpu_memory()


def free_gpu_memory() -> None:
    """Give back what torch's allocator keeps of freed tensors."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def place_like(model: Any, other: Any) -> None:
    """Move the parts of `model` in place to where those of `other` lie."""
    where = {name: next(module.parameters()).device for name, module in _parts(other).items()}
    if len(set(where.values())) == 1:
        bring_back(model, other.device)
    else:
        spread(model, where)


def on_cpu(model: Any) -> Any:
    """`model`, or a copy of it on the CPU."""
    if all(tensor.device.type in (CPU, "meta") for tensor in model.state_dict().values()):
        return model
    copied = copy.deepcopy(model)
    bring_back(copied)
    return copied


def take_hooks(layer: nn.Module, like: nn.Module) -> None:
    """Let `layer` move its inputs as `like` does, whose parts it is made of."""
    layer._forward_pre_hooks = like._forward_pre_hooks
    layer._forward_pre_hooks_with_kwargs = like._forward_pre_hooks_with_kwargs


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dicts on `device`; everything else, caches too, as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    return value


def _parts(model: Any) -> dict[str, nn.Module]:
    """What may lie on devices of their own, by name."""
    body = model.model
    layers = {f"model.layers.{index}": layer for index, layer in enumerate(body.layers)}
    return {"model.embed_tokens": body.embed_tokens, **layers, "model.norm": body.norm, "lm_head": model.lm_head}


def _stay(module: nn.Module) -> None:
    """Remove the hook of `spread`, and no other."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, partial) and hook.func is _move_inputs:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def _move_inputs(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return moved(args, device), moved(kwargs, device)


def _of(name: str, where: Mapping[str, torch.device | str]) -> torch.device | str:
    """The entry of `name` or of the nearest module around it."""
    whole = name
    while name not in where:
        if not name:
            raise ValueError(f"no device for {whole}")
        name = name.rpartition(".")[0]
    return where[name]
