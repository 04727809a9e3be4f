"""Statistics of a teacher's softmax attention that a form's start values are made from."""

import torch
from torch import Tensor

from dtr_deploy.hybrid.mixer import HybridMixer
from dtr_kernels.forms import TeacherStatistics

# Distances are clamped to what a sequence of training length can show and a decay can express.
SHORTEST, LONGEST = 8.0, 1024.0


@torch.no_grad()
def teacher_statistics(
    mixer: HybridMixer, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> TeacherStatistics:
    """Measure the attention that `mixer` (with the teacher's projections) is to replace.

    hidden [B,T,hidden_size] is the layer's input. Costs [B,Hq,T,T] floats for one layer.
    """
    c = mixer.sizes
    group = c.num_heads // c.num_kv_heads
    q, k, v = mixer.project(hidden, position_embeddings)
    length = hidden.shape[1]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * c.head_dim**-0.5
    position = torch.arange(length, device=hidden.device)
    distance = position[:, None] - position[None]
    weights = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    output = torch.einsum("bhij,bjhd->bihd", weights, v)

    rest_logit = torch.zeros(c.num_heads, device=hidden.device)
    far = weights.clone()
    far[..., 0] = 0  # the first token is a sink: attended to from everywhere
    if c.window:
        # Queries for which the window does not already cover everything say what its share is.
        first = min(c.window, length - 1)
        outside = distance[first:] >= c.window
        share = weights[:, :, first:].masked_fill(outside, 0).sum(-1).mean((0, 2)).clamp(0.02, 0.98)
        inside = logits[:, :, first:].masked_fill(outside | (distance[first:] < 0), -torch.inf)
        rest_logit = inside.logsumexp(-1).mean((0, 2)) - torch.logit(share)
        far = far.masked_fill(distance < c.window, 0)
    mass = far.sum((0, 2, 3))
    mean = (far * distance.clamp_min(0)).sum((0, 2, 3)) / mass.clamp_min(1e-6)
    # A head that never looks beyond the window has nothing to say: it gets the longest memory, which costs nothing.
    mean = torch.where(mass > 1e-3, mean, LONGEST)
    return TeacherStatistics(
        distance=mean.unflatten(0, (c.num_kv_heads, group)).mean(1).clamp(SHORTEST, LONGEST),
        rest_logit=rest_logit,
        output_rms=output.square().mean((0, 1, 3)).sqrt(),
    )
