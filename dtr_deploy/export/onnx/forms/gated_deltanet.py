"""`dtr_kernels.forms.GatedDeltaNet` as nodes."""

from typing import Any, ClassVar

import torch

from dtr_deploy.export.onnx.call import Call
from dtr_deploy.export.onnx.forms.base import FormEmitter, OperandNames
from dtr_deploy.export.onnx.graph import FLOAT, parameter_name
from dtr_kernels.forms.gated_deltanet import L2_EPS


class GatedDeltaNetEmitter(FormEmitter):
    name: ClassVar[str] = "gated_deltanet"

    @classmethod
    def shared_bias(cls, form: Any) -> torch.Tensor:
        return torch.cat([form.decay_proj.bias, form.beta_proj.bias])

    def operands(self, queries_keys: str, v: str, hidden: str, call: Call) -> OperandNames:
        graph, form, at = self.graph, self.form, self.at
        kv_heads, dim = self.heads.kv_heads, self.heads.head_dim
        lead = ["batch_size", "sequence_length"]

        # x rsqrt(sum x^2 + eps) is an RMS norm: mean = sum / D, so eps / D below the root and D^-1/2 as its scale.
        scale = graph.initializer(torch.full((dim,), dim**-0.5), f"{parameter_name(at)}.l2_norm.scale")
        unit = graph.node(
            "RMSNormalization",
            [self.by_head(queries_keys), scale],
            f"{at}/l2_norm/RMSNormalization",
            FLOAT,
            [*lead, self.heads.q_heads + kv_heads, dim],
            axis=-1,
            epsilon=L2_EPS / dim,
        )
        q, k = self.split_heads(unit, dim)

        # Both gates in one product. The padding mask comes with their biases: there decay and beta are exactly 0, so
        # that the state is neither decayed nor written.
        assert self.masked_bias is not None
        logits = graph.linear(hidden, torch.cat([form.decay_proj.weight, form.beta_proj.weight]), f"{at}/gates")
        logits = graph.node("Add", [logits, self.masked_bias], f"{at}/gates/Add", FLOAT, [*lead, 2 * kv_heads])
        decay_logit, beta_logit = graph.split(logits, [kv_heads, kv_heads], f"{at}/gates/Split", FLOAT, lead)
        no_bias = graph.initializer(torch.zeros(kv_heads), f"{parameter_name(at)}.gates.no_bias")
        rate = graph.initializer(-form.decay_log_rate.detach().exp(), f"{parameter_name(at)}.decay_rate")
        decay, beta = graph.nodes(
            "LinearAttentionGate",
            [decay_logit, no_bias, rate, beta_logit],
            f"{at}/LinearAttentionGate",
            [(FLOAT, [*lead, kv_heads])] * 2,
            domain="com.microsoft",
        )
        return OperandNames(q, k, v, decay, beta)
