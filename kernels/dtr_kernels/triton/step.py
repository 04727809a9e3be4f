"""A mixer's decoding step on a GPU: what `Form.operands`, the operator, `Form.readout` and the window do, in three
launches for forms whose gates depend on the layer's input alone. Nothing is read on the host: a CUDA graph can hold it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dtr_kernels.forms.base import Form
from dtr_kernels.triton.decode import linear_attention_decode
from dtr_kernels.triton.window import window_attention_decode


@torch.no_grad()
def mixer_step(
    form: Form,
    state: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    values: Tensor,
    hidden: Tensor,
    *,
    slots: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """One token for R sequences of a form that has `step_gates`, over pools by the names of `Form.state_spec`.

    q [R,Hq,D], k, v [R,Hkv,D] after QK-norm and rotary embedding; values [R,Hkv,D]: v, or what the form's convolution
    made of it; hidden [R,hidden_size]; slots, positions [R]. Writes out [R,Hq,D], contiguous. Null slots (<= 0) leave
    the states as they are and give zeros.
    """
    log_decay, beta = form.gates(hidden)
    window = form.config.window
    heads = linear_attention_decode(
        q, k, values, rule=form.rule, log_decay=log_decay, beta=beta, scale=form.scale, pool=state["recurrent"],
        slots=slots, l2_normalise=form.unit_epsilon is not None, readout_gain=form.out_gain,
        out=None if window else out,
    )  # fmt: skip
    if window:
        window_attention_decode(
            q, k, v, window=window, scale=form.config.head_dim**-0.5, ring_k=state["window_k"],
            ring_v=state["window_v"], slots=slots, positions=positions, rest=form.rest(heads), out=out,
        )  # fmt: skip
