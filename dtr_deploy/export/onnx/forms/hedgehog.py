"""`dtr_kernels.forms.Hedgehog` as nodes."""

from typing import ClassVar

import torch

from dtr_deploy.export.onnx.call import LEAD, Call
from dtr_deploy.export.onnx.forms.base import FormEmitter, OperandNames
from dtr_deploy.export.onnx.graph import FLOAT, Shape, parameter_name
from dtr_kernels.forms.hedgehog import SMALLEST_NORMALISER

# The operator's fast CPU path wants Dv in steps of 32. With Dk = 128, 12 query heads and 512 tokens (onnxruntime 1.31,
# one AVX-512 thread) Dv = 65 took 2.8 ms, 72 and 80 the same, 96 took 1.2 ms.
VALUE_STEP = 32


class HedgehogEmitter(FormEmitter):
    name: ClassVar[str] = "hedgehog"
    reads_hidden: ClassVar[bool] = False

    @classmethod
    def state_dims(cls, head_dim: int) -> tuple[int, int]:
        return 2 * head_dim, -(-(head_dim + 1) // VALUE_STEP) * VALUE_STEP

    def operands(self, queries_keys: str, v: str, hidden: str, call: Call) -> OperandNames:
        graph, form, at, heads = self.graph, self.form, self.at, self.heads
        count, dim = heads.q_heads + heads.kv_heads, heads.head_dim
        features, values = self.state_dims(dim)

        # x W and -x W of every head in one batched product, and one softmax over each half.
        by_head = graph.node(
            "Transpose",
            [self.by_head(queries_keys)],
            f"{at}/heads/Transpose",
            FLOAT,
            ["batch_size", count, "sequence_length", dim],
            perm=[0, 2, 1, 3],
        )
        maps = torch.cat([form.query_map, form.key_map]).detach()
        stored = graph.initializer(torch.cat([maps, -maps], -1), f"{parameter_name(at)}.maps")
        product = f"{at}/maps/MatMul"
        graph.builder.exclude_node_from_quantization(product)
        logits = graph.node(
            "MatMul", [by_head, stored], product, FLOAT, ["batch_size", count, "sequence_length", features]
        )
        halves: Shape = ["batch_size", count, "sequence_length", 2, dim]
        logits = graph.reshape(logits, [0, 0, 0, 2, dim], f"{at}/halves/Reshape", FLOAT, halves)
        phi = graph.node("Softmax", [logits], f"{at}/Softmax", FLOAT, halves, axis=-1)
        phi = graph.node(
            "Transpose", [phi], f"{at}/tokens/Transpose", FLOAT, [*LEAD, count, 2, dim], perm=[0, 2, 1, 3, 4]
        )
        q, k = self.split_heads(phi, features)
        k = graph.node("Mul", [k, call.real], f"{at}/k/Mask", FLOAT, [*LEAD, heads.kv_heads * features])

        # The normaliser's column of ones, and as many more as the fast path wants.
        by_head = graph.reshape(v, [0, 0, heads.kv_heads, dim], f"{at}/v/Reshape", FLOAT, [*LEAD, heads.kv_heads, dim])
        pads = graph.int64([0, 0, 0, 0, 0, 0, 0, values - dim])
        by_head = graph.node(
            "Pad", [by_head, pads, graph.float32(1.0)], f"{at}/v/Pad", FLOAT, [*LEAD, heads.kv_heads, values]
        )
        size = heads.kv_heads * values
        v = graph.reshape(by_head, [0, 0, size], f"{at}/v/Reshape_1", FLOAT, [*LEAD, size])
        return OperandNames(q, k, v, "", "")

    def read_out(self, out: str) -> str:
        graph, at, heads = self.graph, f"{self.at}/read_out", self.heads
        dim, values = heads.head_dim, self.state_dims(heads.head_dim)[1]
        sizes = [dim, 1, values - dim - 1]
        by_head = self.kept_heads(out, values)
        total, normaliser, *_ = graph.split(
            by_head, [n for n in sizes if n], f"{at}/Split", FLOAT, [*LEAD, heads.q_heads]
        )
        smallest = graph.initializer(torch.tensor(SMALLEST_NORMALISER), f"{parameter_name(at)}.smallest")
        shape = [*LEAD, heads.q_heads, 1]
        normaliser = graph.node("Max", [normaliser, smallest], f"{at}/Max", FLOAT, shape)
        shape = [*LEAD, heads.q_heads, dim]
        mean = graph.node("Div", [total, normaliser], f"{at}/Div", FLOAT, shape)
        stored = graph.initializer(self.form.out_gain, f"{parameter_name(at)}.gain")
        return graph.node("Mul", [mean, stored], f"{at}/Mul", FLOAT, shape)
