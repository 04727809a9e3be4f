"""What an ONNX emitter of a form does: from the mixer's projections to the operands of `com.microsoft.LinearAttention`,
and from the operator's output to the linear branch.

The emitter writes `Form.operands` and `Form.readout` as nodes, and `Form.taps` where values are convolved first; the
operator, the states and the window are the same for all forms and written once, in `mixer.py`. Everything
here is float32.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from dtr_deploy.export.onnx.call import LEAD, Call
from dtr_deploy.export.onnx.graph import FLOAT, Graph, parameter_name
from dtr_kernels.forms.base import NORM_EPS

# Query heads a kv head that the operator's fast CPU path takes (onnxruntime 1.31).
FAST_GROUPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one mixer, and how query heads are padded so that each kv head has a number the fast kernel takes.

    Padding repeats the group's first head; its output is dropped again. Groups above the largest fast size stay as
    they are.
    """

    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def padded_group(self) -> int:
        return next((size for size in FAST_GROUPS if size >= self.group), self.group)

    @property
    def padded_heads(self) -> int:
        return self.kv_heads * self.padded_group

    @property
    def is_padded(self) -> bool:
        return self.padded_group != self.group

    def padded_index(self) -> list[int]:
        """The query head at each padded place."""
        return [
            kv * self.group + (place if place < self.group else 0)
            for kv in range(self.kv_heads)
            for place in range(self.padded_group)
        ]

    def kept_index(self) -> list[int]:
        """The padded place of each query head."""
        return [kv * self.padded_group + place for kv in range(self.kv_heads) for place in range(self.group)]


class OperandNames(NamedTuple):
    """Names of the operator's inputs: q [B,T,padded heads*Dk], k [B,T,Hkv*Dk], v [B,T,Hkv*Dv], decay (log) [B,T,Hkv] or
    [B,T,Hkv*Dk] or "", beta [B,T,Hkv] or "". Masked: with right padding the state stays what it was at a row's last
    real token."""

    q: str
    k: str
    v: str
    decay: str
    beta: str


class FormEmitter:
    """Base of all emitters. `form` is the trained module of `dtr_kernels.forms`, `at` the node-name prefix."""

    name: ClassVar[str]
    # Whether operands or taps read the layer's input.
    reads_hidden: ClassVar[bool] = True

    def __init__(self, graph: Graph, form: Any, heads: HeadLayout, at: str, masked_bias: str | None) -> None:
        self.graph = graph
        self.form = form
        self.heads = heads
        self.at = at
        self.masked_bias = masked_bias

    @classmethod
    def state_dims(cls, head_dim: int) -> tuple[int, int]:
        """Dk, Dv of the operator's operands here; Dv may be padded beyond the form's own."""
        return head_dim, head_dim

    @classmethod
    def shared_bias(cls, form: Any) -> torch.Tensor | None:
        """A bias [n] that wants the padding mask added: `masked_bias` is then the sum, float32 [B,T,n], made for all
        layers at once. Only for few channels, since it is kept for every token of a call."""
        return None

    def taps(self, hidden: str) -> str:
        """hidden [B,T,hidden] -> taps [B,T,K*Hkv*D] of the convolution; only for forms with one."""
        raise NotImplementedError

    def operands(self, queries_keys: str, v: str, hidden: str, call: Call) -> OperandNames:
        """queries_keys [B,T,(Hq+Hkv)*D]: q heads, then k heads, normalised and rotated. v [B,T,Hkv*D], convolved if the
        form has taps. hidden [B,T,hidden], "" for a form that does not read it."""
        raise NotImplementedError

    def read_out(self, out: str) -> str:
        """The operator's output [B,T,padded heads*Dv] -> the linear branch [B,T,Hq,D]. Here: RMS norm over D."""
        heads, dim = self.heads, self.heads.head_dim
        stored = self.graph.initializer(self.form.out_gain, f"{parameter_name(self.at)}.read_out.gain")
        return self.graph.node(
            "RMSNormalization",
            [self.kept_heads(out, dim), stored],
            f"{self.at}/read_out/RMSNormalization",
            FLOAT,
            [*LEAD, heads.q_heads, dim],
            axis=-1,
            epsilon=NORM_EPS,
        )

    def kept_heads(self, out: str, dim: int) -> str:
        """[B,T,padded heads*dim] -> [B,T,Hq,dim]."""
        heads, at = self.heads, f"{self.at}/read_out"
        shape = [*LEAD, heads.padded_heads, dim]
        by_head = self.graph.reshape(out, [0, 0, heads.padded_heads, dim], f"{at}/Reshape", FLOAT, shape)
        if not heads.is_padded:
            return by_head
        kept = self.graph.int64(heads.kept_index())
        return self.graph.node("Gather", [by_head, kept], f"{at}/Gather", FLOAT, [*LEAD, heads.q_heads, dim], axis=2)

    def flat_heads(self, by_head: str) -> str:
        """[B,T,Hq,D] -> [B,T,Hq*D]."""
        size = self.heads.q_heads * self.heads.head_dim
        return self.graph.reshape(by_head, [0, 0, size], f"{self.at}/read_out/Reshape_1", FLOAT, [*LEAD, size])

    def split_heads(self, heads_4d: str, dim: int) -> tuple[str, str]:
        """[B,T,Hq+Hkv,dim] -> q [B,T,padded heads*dim], k [B,T,Hkv*dim]."""
        heads = self.heads
        if heads.is_padded:
            places = heads.padded_index() + list(range(heads.q_heads, heads.q_heads + heads.kv_heads))
            heads_4d = self.graph.node(
                "Gather",
                [heads_4d, self.graph.int64(places)],
                f"{self.at}/pad_heads/Gather",
                FLOAT,
                [*LEAD, len(places), dim],
                axis=2,
            )
        sizes = [heads.padded_heads * dim, heads.kv_heads * dim]
        flat = self.graph.reshape(heads_4d, [0, 0, sum(sizes)], f"{self.at}/flat/Reshape", FLOAT, [*LEAD, sum(sizes)])
        q, k = self.graph.split(flat, sizes, f"{self.at}/flat/Split", FLOAT, LEAD)
        return q, k

    def by_head(self, queries_keys: str) -> str:
        """[B,T,(Hq+Hkv)*D] -> [B,T,Hq+Hkv,D]."""
        count, dim = self.heads.q_heads + self.heads.kv_heads, self.heads.head_dim
        shape = [*LEAD, count, dim]
        return self.graph.reshape(queries_keys, [0, 0, count, dim], f"{self.at}/by_head/Reshape", FLOAT, shape)
