"""What a form is: the small learned part of a linear mixer, with four duties.

The mixer that owns a form keeps the large projections (q, k, v, o, biases, QK-norm, rotary embedding); the form turns
their outputs into the operator's operands (`operands`, and `taps` where values are convolved first), the operator's
output into the linear branch (`readout`), which the window takes in as one more key (`rest`), starts from what is known
of the teacher (`start_from`) and says what one sequence's state is (`state_spec`). The Hugging Face model and the vLLM
plugin use the same module, so that they cannot differ. A form holds no state: whoever runs it keeps the states, and
convolves with `dtr_kernels.conv`.

Parameters are float32 in every engine: they are few, and decays and gates do not survive bfloat16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dtr_kernels.compiled import rows, step
from dtr_kernels.gpu import on_gpu
from dtr_kernels.window import Rest

NORM_EPS = 1e-6


@dataclass(frozen=True)
class FormConfig:
    """Sizes of one mixer. Head counts are local ones: those of this tensor-parallel rank.

    window: tokens of the softmax branch, 0 for none.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not divide by {self.num_kv_heads} kv heads")
        if self.window < 0:
            raise ValueError(f"window must be 0 or more tokens, got {self.window}")


class Operands(NamedTuple):
    """float32 operands of `linear_attention`, with the leading dimensions of the form's inputs.

    q [...,Hq,key_dim], k [...,Hkv,key_dim], v [...,Hkv,value_dim], log_decay [...,Hkv] or [...,Hkv,key_dim],
    beta [...,Hkv].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None


class TensorSpec(NamedTuple):
    """Shape (of one sequence) and dtype of one piece of state."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TeacherStatistics:
    """What a form's start values are made from, measured on the teacher's softmax attention.

    distance: [Hkv] mean distance in tokens from a query to what it attends to, outside the window and without the
        first token (an attention sink is at every distance), averaged over a group's heads.
    rest_logit: [Hq] logarithm of the weights' sum outside the window, with which the window gets its mean share of the
        attention (0 for window 0).
    output_rms: [Hq] root mean square of a head's attention output, before the output projection.
    """

    distance: Tensor
    rest_logit: Tensor
    output_rms: Tensor


class Form(nn.Module):
    """Base of all forms. A new form is a file beside this one, an ONNX emitter and a row in the parity tests."""

    name: ClassVar[str]
    rule: ClassVar[str]
    decay_per_key: ClassVar[bool] = False
    # Taps of a causal convolution over v, which then needs this many rows less one as a state; 0 for none.
    conv_kernel: ClassVar[int] = 0
    # `operands` L2-normalises q and k with this epsilon; None: they go in as they are.
    unit_epsilon: ClassVar[float | None] = None
    # parameter -> (kind of head its dimension counts, dimension); what is not here is replicated over ranks.
    SHARD: ClassVar[dict[str, tuple[str, int]]] = {"out_gain": ("q", 0), "rest_logit": ("q", 0)}

    def __init__(self, config: FormConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = config.head_dim**-0.5
        self.out_gain = nn.Parameter(torch.ones(config.num_heads, config.head_dim, dtype=torch.float32))
        if config.window:
            self.rest_logit = nn.Parameter(torch.zeros(config.num_heads, dtype=torch.float32))

    @property
    def key_dim(self) -> int:
        """Dk of the operator's operands."""
        return self.config.head_dim

    @property
    def value_dim(self) -> int:
        """Dv of the operator's operands."""
        return self.config.head_dim

    def taps(self, hidden: Tensor) -> Tensor | None:
        """hidden [...,hidden_size] -> taps [...,conv_kernel,Hkv,D] float32 of the convolution (`dtr_kernels.conv`)
        that v goes through on its way to `operands`; None for forms without one. The window sees v itself."""
        return None

    def operands(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Operands:
        """q [...,Hq,D], k, v [...,Hkv,D] after QK-norm and rotary embedding, v convolved if the form has taps, hidden
        [...,hidden_size] (the mixer's input) -> the operator's operands, float32."""
        raise NotImplementedError

    def readout(self, out: Tensor, hidden: Tensor) -> Tensor:
        """The operator's output [...,Hq,value_dim] -> the linear branch [...,Hq,D], float32. Here: RMS-normalised over
        D and scaled per head and channel; what the operator gives has no scale of its own."""
        if rows.fits(out):
            return rows.readout(out, self.out_gain, NORM_EPS)
        if not torch.is_grad_enabled() and on_gpu(out):
            from dtr_kernels.triton import rows as gpu_rows

            if gpu_rows.fits(out):
                return gpu_rows.readout(out, self.out_gain, NORM_EPS)
        out = out.float()
        return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + NORM_EPS) * self.out_gain

    def rest(self, linear: Tensor) -> Rest:
        """The linear branch [...,Hq,D] as one more key of the window's softmax: the heads' output is then what
        `window_attention` returns. Without a window it is the linear branch itself."""
        return Rest(self.rest_logit, linear)

    def gates(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """hidden [...,hidden_size] -> log decay and beta of `operands`, float32, for forms that have `step_gates`."""
        return None, None

    def step_gates(self) -> dict[str, Tensor] | None:
        """What `compiled.step` projects this form's decay and beta from hidden with; None: it has no such step."""
        return None

    def step_decay(self, hidden: Tensor) -> Tensor | None:
        """hidden [R,hidden_size] -> log decay [R,Hkv] or [R,Hkv,D], for forms whose decay is not among `step_gates`."""
        return None

    def bind_step(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> step.StepPlan | None:
        """A decoding step on a CPU, `taps` and `operands` to the heads' output and all states in one call, over
        `state`: pools by the names of `state_spec`. dtype: the model's. None where there is none: decode operator by
        operator then. To be made again when weights or pools are replaced by other tensors."""
        gates = self.step_gates()
        if gates is None or not step.fits(state, dtype, self.config.hidden_size):
            return None
        decays = type(self).step_decay is not Form.step_decay or "decay_weight" in gates
        return step.StepPlan(
            gates=gates,
            decay="none" if not decays else "key" if self.decay_per_key else "head",
            state=state,
            gain=self.out_gain,
            rest_logit=self.rest_logit if self.config.window else None,
            hidden_size=self.config.hidden_size,
            scale=self.scale,
            unit_epsilon=self.unit_epsilon,
            norm_epsilon=NORM_EPS,
        )

    @torch.no_grad()
    def step(
        self,
        plan: step.StepPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor,
        *,
        slots: Tensor,
        positions: Tensor,
        out: Tensor,
    ) -> None:
        """One token for R sequences with the plan of `bind_step`: q [R,Hq,D], k, v [R,Hkv,D] after QK-norm and rotary
        embedding, hidden [R,hidden_size], slots, positions [R]; writes out [R,Hq,D]. Null slots (<= 0) leave the states
        as they are and give zeros."""
        decay, taps = self.step_decay(hidden), self.taps(hidden)
        plan.run(q, k, v, hidden, decay, taps, slots=slots, positions=positions, out=out)

    @torch.no_grad()
    def start_from(self, statistics: TeacherStatistics) -> None:
        """Set start values from the teacher, so that training begins near it."""
        self.out_gain.copy_(statistics.output_rms.clamp_min(1e-3)[:, None].expand_as(self.out_gain))
        if self.config.window:
            self.rest_logit.copy_(statistics.rest_logit)

    def state_spec(self, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """State of one sequence; `dtype` is the model's, which rows of keys and values are kept in: the window's, and
        those the convolution still needs."""
        c = self.config
        spec = {"recurrent": TensorSpec((c.num_kv_heads, self.key_dim, self.value_dim), torch.float32)}
        if self.conv_kernel:
            spec["conv"] = TensorSpec((self.conv_kernel - 1, c.num_kv_heads, c.head_dim), dtype)
        if c.window:
            spec["window_k"] = TensorSpec((c.window, c.num_kv_heads, c.head_dim), dtype)
            spec["window_v"] = TensorSpec((c.window, c.num_kv_heads, c.head_dim), dtype)
        return spec


def small_linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A float32 projection, whatever the default dtype is."""
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float32)
