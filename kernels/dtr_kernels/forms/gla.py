"""Gated Linear Attention (Yang et al., arXiv 2312.06635): a state with a learned decay per key dimension."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels.forms.base import Form, FormConfig, Operands, TeacherStatistics, small_linear

DECAY_RANK = 16
DECAY_TEMPERATURE = 16.0
# Key dimensions start with distances from 1/4 to 4 times the teacher's: the state holds several time scales at once.
DISTANCE_SPREAD = 4.0


class GatedLinearAttention(Form):
    """log decay = logsigmoid(W2 W1 h + b) / 16 per kv head and key dimension; q, k as the teacher makes them."""

    name: ClassVar[str] = "gla"
    rule: ClassVar[str] = "gated"
    decay_per_key: ClassVar[bool] = True
    SHARD: ClassVar[dict[str, tuple[str, int]]] = {
        **Form.SHARD,
        "decay_up.weight": ("kv", 0),
        "decay_up.bias": ("kv", 0),
    }

    def __init__(self, config: FormConfig) -> None:
        super().__init__(config)
        self.decay_down = small_linear(config.hidden_size, DECAY_RANK, bias=False)
        self.decay_up = small_linear(DECAY_RANK, config.num_kv_heads * config.head_dim, bias=True)
        nn.init.normal_(self.decay_down.weight, std=0.02)
        nn.init.zeros_(self.decay_up.weight)
        self._start_decay(torch.full((config.num_kv_heads,), 128.0))

    def operands(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Operands:
        return Operands(q.float(), k.float(), v.float(), self._log_decay(hidden), None)

    def gates(self, hidden: Tensor) -> tuple[Tensor, None]:
        return self._log_decay(hidden), None

    def step_gates(self) -> dict[str, Tensor]:
        return {}

    def step_decay(self, hidden: Tensor) -> Tensor:
        return self._log_decay(hidden)

    def _log_decay(self, hidden: Tensor) -> Tensor:
        """[...,Hkv,D]"""
        logits = self.decay_up(self.decay_down(hidden.float()))
        log_decay = F.logsigmoid(logits) / DECAY_TEMPERATURE
        return log_decay.unflatten(-1, (self.config.num_kv_heads, self.config.head_dim))

    @torch.no_grad()
    def start_from(self, statistics: TeacherStatistics) -> None:
        super().start_from(statistics)
        self._start_decay(statistics.distance.clamp_min(1.0))

    @torch.no_grad()
    def _start_decay(self, distance: Tensor) -> None:
        # arange, not linspace: transformers keeps linspace on the CPU while it builds a model on the meta device.
        position = torch.arange(self.config.head_dim, device=distance.device) / max(self.config.head_dim - 1, 1)
        spread = torch.exp(math.log(DISTANCE_SPREAD) * (2 * position - 1))
        per_key = distance[:, None] * spread
        # logsigmoid(b) / 16 = -1 / distance
        self.decay_up.bias.copy_(-torch.log(torch.expm1(DECAY_TEMPERATURE / per_key)).flatten())
