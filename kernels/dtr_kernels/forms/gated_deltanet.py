"""Gated DeltaNet (Yang et al., arXiv 2412.06464): a decayed state corrected by the delta rule."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels.compiled import rows
from dtr_kernels.forms.base import Form, FormConfig, Operands, TeacherStatistics, small_linear
from dtr_kernels.gpu import on_gpu

L2_EPS = 1e-6


def l2_normalised(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, float32; the epsilon is inside the root, as in the public implementations."""
    if rows.fits(x):
        return rows.unit_rows(x, L2_EPS)
    if not torch.is_grad_enabled() and on_gpu(x):
        from dtr_kernels.triton import rows as gpu_rows

        if gpu_rows.fits(x):
            return gpu_rows.unit_rows(x, L2_EPS)
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


class GatedDeltaNet(Form):
    """q, k L2-normalised; beta = sigmoid(W_b h); log decay = -exp(decay_log_rate) softplus(W_a h), per kv head.

    Without the short convolution of the original: a random one ruins inherited projections.
    """

    name: ClassVar[str] = "gated_deltanet"
    rule: ClassVar[str] = "gated_delta"
    unit_epsilon: ClassVar[float | None] = L2_EPS
    SHARD: ClassVar[dict[str, tuple[str, int]]] = {
        **Form.SHARD,
        "decay_proj.weight": ("kv", 0),
        "decay_proj.bias": ("kv", 0),
        "decay_log_rate": ("kv", 0),
        "beta_proj.weight": ("kv", 0),
        "beta_proj.bias": ("kv", 0),
    }

    def __init__(self, config: FormConfig) -> None:
        super().__init__(config)
        self.decay_proj = small_linear(config.hidden_size, config.num_kv_heads, bias=True)
        self.decay_log_rate = nn.Parameter(torch.full((config.num_kv_heads,), -math.log(128.0), dtype=torch.float32))
        self.beta_proj = small_linear(config.hidden_size, config.num_kv_heads, bias=True)
        # softplus(bias) = 1: the rate alone sets the start, and learns on a logarithmic scale.
        nn.init.zeros_(self.decay_proj.weight)
        nn.init.constant_(self.decay_proj.bias, math.log(math.e - 1))
        nn.init.zeros_(self.beta_proj.weight)
        nn.init.zeros_(self.beta_proj.bias)

    def operands(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Operands:
        log_decay, beta = self.gates(hidden)
        return Operands(l2_normalised(q), l2_normalised(k), v.float(), log_decay, beta)

    def gates(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled() and on_gpu(hidden):
            from dtr_kernels.triton import rows as gpu_rows

            return gpu_rows.gates(hidden, self.decay_proj, self.decay_log_rate, self.beta_proj)
        rate = torch.exp(self.decay_log_rate)
        if not torch.is_grad_enabled() and rows.fits(hidden):
            return rows.decay_gate(hidden, self.decay_proj, rate), rows.beta_gate(hidden, self.beta_proj)
        hidden = hidden.float()
        return -rate * F.softplus(self.decay_proj(hidden)), torch.sigmoid(self.beta_proj(hidden))

    def step_gates(self) -> dict[str, Tensor]:
        return {
            "decay_weight": self.decay_proj.weight,
            "decay_bias": self.decay_proj.bias,
            "log_rate": self.decay_log_rate,
            "beta_weight": self.beta_proj.weight,
            "beta_bias": self.beta_proj.bias,
        }

    @torch.no_grad()
    def start_from(self, statistics: TeacherStatistics) -> None:
        super().start_from(statistics)
        # A decay of exp(-1/d) a token has mean distance d.
        self.decay_log_rate.copy_(-torch.log(statistics.distance.clamp_min(1.0)))
