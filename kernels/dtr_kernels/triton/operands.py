"""What both launchers ask of their operands."""

import torch
import triton
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POOL_DTYPES = (torch.float32, torch.bfloat16)
RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}


def check_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: str,
    log_decay: Tensor | None,
    beta: Tensor | None,
    pool: Tensor,
    slots: Tensor,
) -> None:
    """ValueError unless q [N,Hq,Dk], k [N,Hkv,Dk], v [N,Hkv,Dv], the rule's operands, the pool and slots [R] fit."""
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}: accepted are {', '.join(RULES)}")
    if q.ndim != 3 or q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide by {k.shape[1]} kv heads")
    for name, tensor, needed in (("log_decay", log_decay, RULES[rule][0]), ("beta", beta, RULES[rule][1])):
        if needed != (tensor is not None):
            raise ValueError(f"rule {rule!r} {'needs' if needed else 'takes no'} {name}")
    if log_decay is not None and log_decay.shape not in (k.shape[:2], k.shape):
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}, expected {tuple(k.shape[:2])} or k's")
    if beta is not None and beta.shape != k.shape[:2]:
        raise ValueError(f"beta has shape {tuple(beta.shape)}, expected {tuple(k.shape[:2])}")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta)):
        if tensor is not None and tensor.dtype not in INPUT_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: accepted are {', '.join(map(str, INPUT_DTYPES))}")
    state = (k.shape[1], k.shape[2], v.shape[2])
    if pool.ndim != 4 or tuple(pool.shape[1:]) != state or pool.dtype not in POOL_DTYPES:
        raise ValueError(
            f"pool is {tuple(pool.shape)} {pool.dtype}, expected [S, {', '.join(map(str, state))}]"
            f" in {' or '.join(map(str, POOL_DTYPES))}"
        )
    slot_stride(pool)
    if slots.ndim != 1 or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots are {tuple(slots.shape)} {slots.dtype}, expected [R] int32 or int64")


def slot_stride(pool: Tensor) -> int:
    """Elements from one slot of a pool to the next; ValueError unless what a slot holds is contiguous."""
    expected = 1
    for size, stride in zip(reversed(pool.shape[1:]), reversed(pool.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            raise ValueError(f"a pool's slots must be contiguous: strides {pool.stride()} for {tuple(pool.shape)}")
        expected *= size
    return pool.stride(0)


def contiguous_last(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(size: int) -> int:
    """The power of two, at least 16, that holds `size`: blocks of products are that large."""
    return max(16, triton.next_power_of_2(size))
