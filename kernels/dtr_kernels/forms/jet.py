"""JetBlock (Jet-Nemotron, Gu et al., arXiv 2508.15884): Gated DeltaNet over values that a dynamic convolution mixes."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels.forms.base import FormConfig, small_linear
from dtr_kernels.forms.gated_deltanet import GatedDeltaNet

KERNEL = 4
# The generator's inner width is the hidden size over this, as in the paper's models.
GENERATOR_REDUCTION = 8


class Jet(GatedDeltaNet):
    """As `GatedDeltaNet`, with v_t replaced by sum_j taps_t[j] * v_{t-3+j}, taps = W2 silu(W1 h) + b for each token,
    kv head and channel.

    The convolution starts as the identity: W2 = 0 and b is 1 at the token's own tap, 0 elsewhere. W1 starts random,
    for with both zero neither would ever get a gradient. Nothing is applied after the convolution (the paper applies
    SiLU), and there is no output gate: both would ruin inherited projections at the start.
    """

    name: ClassVar[str] = "jet"
    conv_kernel: ClassVar[int] = KERNEL
    SHARD: ClassVar[dict[str, tuple[str, int]]] = {
        **GatedDeltaNet.SHARD,
        "tap_weight": ("kv", 1),
        "tap_bias": ("kv", 1),
    }

    def __init__(self, config: FormConfig) -> None:
        super().__init__(config)
        width = max(1, config.hidden_size // GENERATOR_REDUCTION)
        channels = config.num_kv_heads * config.head_dim
        self.tap_down = small_linear(config.hidden_size, width, bias=False)
        self.tap_weight = nn.Parameter(torch.zeros(KERNEL, channels, width, dtype=torch.float32))
        self.tap_bias = nn.Parameter(torch.zeros(KERNEL, channels, dtype=torch.float32))
        nn.init.normal_(self.tap_down.weight, std=0.02)
        nn.init.ones_(self.tap_bias[-1])

    def taps(self, hidden: Tensor) -> Tensor:
        inner = F.silu(self.tap_down(hidden.float()))
        taps = F.linear(inner, self.tap_weight.flatten(0, 1), self.tap_bias.flatten())
        return taps.unflatten(-1, (KERNEL, self.config.num_kv_heads, self.config.head_dim))
