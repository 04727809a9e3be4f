"""`dtr_kernels.forms.GatedLinearAttention` as nodes."""

from typing import ClassVar

from dtr_deploy.export.onnx.call import Call
from dtr_deploy.export.onnx.forms.base import FormEmitter, OperandNames
from dtr_deploy.export.onnx.graph import FLOAT, Shape, parameter_name
from dtr_kernels.forms.gla import DECAY_TEMPERATURE


class GatedLinearAttentionEmitter(FormEmitter):
    name: ClassVar[str] = "gla"

    def operands(self, queries_keys: str, v: str, hidden: str, call: Call) -> OperandNames:
        graph, form, at = self.graph, self.form, self.at
        kv_size = self.heads.kv_heads * self.heads.head_dim
        shape: Shape = ["batch_size", "sequence_length", kv_size]
        q, k = self.split_heads(self.by_head(queries_keys), self.heads.head_dim)

        # logsigmoid(x) = -softplus(-x): the sign of x goes into the weights. At padding the addend makes the decay 0
        # and k is zeroed, so that the state stays as it is.
        low_rank = graph.linear(hidden, form.decay_down.weight, f"{at}/decay_down")
        logits = graph.linear(low_rank, -form.decay_up.weight, f"{at}/decay_up")
        bias = graph.initializer(-form.decay_up.bias, f"{parameter_name(at)}.decay_up.bias")
        logits = graph.node("Add", [logits, bias], f"{at}/decay_up/Add", FLOAT, shape)
        logits = graph.node("Add", [logits, call.gate_mask], f"{at}/decay/Mask", FLOAT, shape)
        decay = graph.node("Softplus", [logits], f"{at}/decay/Softplus", FLOAT, shape)
        decay = graph.node(
            "Mul", [decay, f"/model/constants/FLOAT/{-1.0 / DECAY_TEMPERATURE}"], f"{at}/decay/Mul", FLOAT, shape
        )
        k = graph.node("Mul", [k, call.real], f"{at}/k/Mask", FLOAT, shape)
        return OperandNames(q, k, v, decay, "")
