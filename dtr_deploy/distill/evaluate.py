"""How close a twin is to its teacher on held-out activations, beside the controls that say what was needed for it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_deploy.hybrid.mixer import HybridMixer
from dtr_kernels.window import window_attention


@dataclass(frozen=True)
class Closeness:
    """relative_error: |y - y'|^2 / |y|^2 over all tokens and channels. cosine: mean over tokens of cos(y, y')."""

    relative_error: float
    cosine: float


@dataclass(frozen=True)
class TwinReport:
    """One twin: before and after training, and controls.

    no_op: the layer's attention left out (relative error 1 by definition of the measure). window_only: the teacher's
    own softmax attention cut to the window, without any linear branch; None for window 0.
    """

    layer: int
    form: str
    start: Closeness
    trained: Closeness
    no_op: Closeness
    window_only: Closeness | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TwinReport":
        parts: dict[str, Any] = {k: Closeness(**v) if isinstance(v, dict) else v for k, v in values.items()}
        return cls(**parts)


class Running:
    """Sums over batches that `Closeness` is the ratio of."""

    def __init__(self) -> None:
        self.error = self.power = self.cosine = 0.0
        self.tokens = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """[B,T,hidden] each."""
        self.error += (ours - theirs).square().sum().item()
        self.power += theirs.square().sum().item()
        self.cosine += F.cosine_similarity(ours, theirs, dim=-1).sum().item()
        self.tokens += theirs.shape[0] * theirs.shape[1]

    def result(self) -> Closeness:
        return Closeness(self.error / max(self.power, 1e-30), self.cosine / max(self.tokens, 1))


@torch.no_grad()
def window_only(mixer: HybridMixer, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Output [B,T,hidden] of the teacher's attention restricted to the window; `mixer` still holds its projections."""
    q, k, v = mixer.project(hidden, position_embeddings)
    out, _ = window_attention(q, k, v, window=mixer.sizes.window, return_past=False)
    return mixer.o_proj(out.flatten(-2))
