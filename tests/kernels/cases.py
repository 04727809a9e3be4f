"""Random operands, the truths they are held to, and every implementation that a CPU can run."""

import platform

import torch
from hypothesis import strategies as st

from dtr_kernels.operator import RULES
from dtr_kernels.window import Rest


def operands(rule, batch, length, kv_heads, group, key_dim, value_dim, per_key, decay, beta, seed):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k = normal(batch, length, kv_heads * group, key_dim), normal(batch, length, kv_heads, key_dim)
    k = k / k.norm(dim=-1, keepdim=True)
    log_decay = beta_t = None
    if rule in ("gated", "gated_delta"):
        shape = (batch, length, kv_heads, key_dim) if per_key else (batch, length, kv_heads)
        log_decay = decay * torch.rand(*shape, generator=g, dtype=torch.float64)
    if rule in ("delta", "gated_delta"):
        beta_t = torch.rand(batch, length, kv_heads, generator=g, dtype=torch.float64) if beta is None else None
        beta_t = torch.full((batch, length, kv_heads), beta, dtype=torch.float64) if beta_t is None else beta_t
    state = normal(batch, kv_heads, key_dim, value_dim)
    return q, k, normal(batch, length, kv_heads, value_dim), log_decay, beta_t, state


def narrow(tensors, dtype=torch.float32):
    return [None if x is None else x.to(dtype) for x in tensors]


def assert_close(ours, truth, tolerance):
    scale = truth.abs().max().clamp_min(1.0)
    assert ((ours.double() - truth).abs().max() / scale).item() <= tolerance


CASES = dict(
    rule=st.sampled_from(RULES),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 128, 150]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4]),
    key_dim=st.sampled_from([8, 16, 32]),
    value_dim=st.sampled_from([8, 17, 32]),
    per_key=st.booleans(),
    decay=st.sampled_from([0.0, -0.05, -1.0, -20.0]),
    beta=st.sampled_from([None, 0.0, 1.0]),
    seed=st.integers(0, 2**31),
)


def banded(q, k, v, window, scale, valid=None, rest=None):
    """The truth: [T,T] logits, a band, a softmax, and the one more key of `rest`. q [B,T,Hq,D]."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    i = torch.arange(q.shape[1])
    visible = (i[:, None] - i[None] >= 0) & (i[:, None] - i[None] < window)
    visible = visible[None] if valid is None else visible[None] & valid[:, None, :]
    weights = logits.exp() * visible[:, None]
    total, out = weights.sum(-1), torch.einsum("bhij,bjhd->bihd", weights, v)
    if rest is not None:
        outside = rest.logit.to(q.dtype).exp()
        total = total + outside[:, None]
        out = out + outside[:, None] * rest.value.to(q.dtype)
    return out / total.clamp_min(1e-300).mT[..., None]


def some_rest(q, seed=0):
    """A rest for q [B,T,Hq,D], float32: it and the window weigh about the same."""
    g = torch.Generator().manual_seed(seed + 100)
    return Rest(torch.randn(q.shape[2], generator=g) + 2, torch.randn(q.shape, generator=g))


def rest_at(rest, *index):
    """The rest of some tokens: the value indexed, the logit as it is."""
    return None if rest is None else Rest(rest.logit, rest.value[index])


def implementations():
    """What the serving entry points may run on here: torch, and the C kernels compiled for each instruction set."""
    if platform.machine() != "x86_64":
        return ["torch", "native"]
    capability = torch.backends.cpu.get_cpu_capability()
    return ["torch", "native", "x86-64", *(["x86-64-v3"] if capability in ("AVX2", "AVX512") else [])]
