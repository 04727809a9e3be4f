"""Short hand for writing nodes into an onnxruntime-genai builder's graph.

The builders' own `make_*` methods ask for a name, a dtype and a shape each time and have no method for some operators
used here. `Graph` wraps a builder: one call is one node, names are paths below the caller's prefix, and the result is
the name of the node's output, ready to be an input.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64
BOOL = ir.DataType.BOOL
# int64's largest value: "to the end" for Slice.
END = 9223372036854775807

Shape = Sequence[int | str]


class Graph:
    """Writes nodes into `builder` (an onnxruntime_genai.models.builders Model)."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def node(
        self, op: str, inputs: Sequence[str], name: str, dtype: ir.DataType, shape: Shape | None, **attributes: Any
    ) -> str:
        """One node with one output, standard domain; returns the output's name."""
        return self.nodes(op, inputs, name, [(dtype, shape)], **attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[tuple[ir.DataType, Shape | None]],
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """One node with len(outputs) outputs; returns their names."""
        names = [f"{name}/output_{index}" for index in range(len(outputs))]
        self.builder.make_node(op, inputs=list(inputs), outputs=names, name=name, domain=domain, **attributes)
        for output, (dtype, shape) in zip(names, outputs, strict=True):
            self.builder.make_value(output, dtype, shape=shape)
        return names

    def initializer(self, tensor: torch.Tensor | np.ndarray, name: str, dtype: ir.DataType | None = FLOAT) -> str:
        """A named weight, converted to dtype (None: as it is)."""
        tensor = tensor.detach() if isinstance(tensor, torch.Tensor) else torch.as_tensor(tensor)
        self.builder.make_initializer(tensor.contiguous(), name, to=dtype)
        return name

    @staticmethod
    def int64(value: int | Sequence[int]) -> str:
        """An int64 constant: a scalar or a vector."""
        return f"/model/constants/INT64/{value if isinstance(value, int) else list(value)}"

    @staticmethod
    def float32(value: float) -> str:
        """A float32 scalar."""
        return f"/model/constants/FLOAT/{value}"

    def reshape(self, x: str, target: Sequence[int] | str, name: str, dtype: ir.DataType, shape: Shape | None) -> str:
        """target: numbers (0 copies the input's dimension), or the name of an int64 vector."""
        shape_input = target if isinstance(target, str) else self.int64(target)
        return self.node("Reshape", [x, shape_input], name, dtype, shape)

    def split(self, x: str, sizes: Sequence[int], name: str, dtype: ir.DataType, lead: Shape) -> list[str]:
        """Split the last dimension; lead is the shape before it."""
        outputs = [(dtype, [*lead, size]) for size in sizes]
        return self.nodes("Split", [x, self.int64(sizes)], name, outputs, axis=-1)

    def linear(self, x: str, weight: torch.Tensor, name: str) -> str:
        """x @ weight.T in float32, kept out of quantization. x [batch, sequence, in], weight [out, in]."""
        matmul = f"{name}/MatMul"
        self.builder.exclude_node_from_quantization(matmul)
        stored = self.initializer(weight.detach().float().T, f"{parameter_name(name)}.weight")
        return self.node("MatMul", [x, stored], matmul, FLOAT, ["batch_size", "sequence_length", weight.shape[0]])

    def cast(self, x: str, name: str, dtype: ir.DataType, shape: Shape) -> str:
        return self.node("Cast", [x], name, dtype, shape, to=dtype)


def parameter_name(node_name: str) -> str:
    """ "/model/layers.3/attn/decay" -> "model.layers.3.attn.decay", the builders' way of naming a node's weights."""
    return node_name[1:].replace("/", ".")
