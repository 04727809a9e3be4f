"""Hedgehog (Zhang et al., arXiv 2402.04347; LoLCATs, arXiv 2410.10254): linear attention with learned feature maps that
imitate softmax, normalised like it."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dtr_kernels.forms.base import Form, FormConfig, Operands, TeacherStatistics

# A sum of positive numbers is exact to rounding however small it is, so only what float32 can hardly represent is
# guarded: a row that has seen no token, or none whose features met the query's.
SMALLEST_NORMALISER = 1e-30


class Hedgehog(Form):
    """out_t = sum_j w_tj v_j / sum_j w_tj over j <= t, w_tj = phi_q(q_t) . phi_k(k_j), phi(x) = [softmax(x W),
    softmax(-x W)].

    A map for each query head and one for each kv head, which starts as the identity. The papers learn one for every
    query head's copy of k; one a kv head is what lets query heads share the state. The normaliser is a column of ones
    appended to v, so the state is [Hkv, 2D, D + 1].

    The branch is a weighted mean of values, as the teacher's attention is: `readout` divides and leaves the scale,
    which an RMS norm would throw away, and gains start at 1. LoLCATs puts window and linear branch under one
    normaliser, the sum of the feature maps' weights; here the linear branch has a learned logit of each head, as in
    every form.
    """

    name: ClassVar[str] = "hedgehog"
    rule: ClassVar[str] = "linear"
    SHARD: ClassVar[dict[str, tuple[str, int]]] = {**Form.SHARD, "query_map": ("q", 0), "key_map": ("kv", 0)}

    def __init__(self, config: FormConfig) -> None:
        super().__init__(config)
        self.scale = 1.0  # cancels in the division
        identity = torch.eye(config.head_dim, dtype=torch.float32)
        self.query_map = nn.Parameter(identity.repeat(config.num_heads, 1, 1))
        self.key_map = nn.Parameter(identity.repeat(config.num_kv_heads, 1, 1))

    @property
    def key_dim(self) -> int:
        return 2 * self.config.head_dim

    @property
    def value_dim(self) -> int:
        return self.config.head_dim + 1

    def operands(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Operands:
        ones = torch.ones_like(v[..., :1], dtype=torch.float32)
        values = torch.cat([v.float(), ones], -1)
        return Operands(_features(q, self.query_map), _features(k, self.key_map), values, None, None)

    def readout(self, out: Tensor, hidden: Tensor) -> Tensor:
        out = out.float()
        return out[..., :-1] / out[..., -1:].clamp_min(SMALLEST_NORMALISER) * self.out_gain

    @torch.no_grad()
    def start_from(self, statistics: TeacherStatistics) -> None:
        super().start_from(statistics)
        nn.init.ones_(self.out_gain)


def _features(x: Tensor, weight: Tensor) -> Tensor:
    """x [...,H,D], weight [H,D,F] -> [softmax(x W), softmax(-x W)] [...,H,2F], float32."""
    x = torch.einsum("...hd,hdf->...hf", x.float(), weight)
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
