"""The dynamic convolution of `dtr_kernels.conv` as nodes."""

import torch

from dtr_deploy.export.onnx.call import LEAD, Call
from dtr_deploy.export.onnx.graph import FLOAT, INT64, Graph, Shape


def make_neighbours(graph: Graph, call: Call, kernel: int) -> str:
    """int64 [T, kernel]: for each token its place among a call's rows (`conv_rows`) and those before it, oldest first.
    Once a call."""
    at = "/model/conv"
    shape: Shape = ["sequence_length", kernel]
    column = graph.node("Unsqueeze", [call.offsets, graph.int64([1])], f"{at}/Unsqueeze", INT64, ["sequence_length", 1])
    taps = graph.initializer(torch.arange(kernel), "model.conv.taps", INT64)
    return graph.node("Add", [column, taps], f"{at}/Add", INT64, shape)


def make_dynamic_conv(graph: Graph, at: str, rows: str, taps: str, neighbours: str, kernel: int, size: int) -> str:
    """rows [B, kernel - 1 + T, size], taps [B,T,kernel*size], float32 -> [B,T,size].

    With right padding the last rows of `rows` are no tokens; no token looks at them.
    """
    shape = [*LEAD, kernel, size]
    near = graph.node("Gather", [rows, neighbours], f"{at}/Gather", FLOAT, shape, axis=1)
    taps = graph.reshape(taps, [0, 0, kernel, size], f"{at}/Reshape", FLOAT, shape)
    weighted = graph.node("Mul", [near, taps], f"{at}/Mul", FLOAT, shape)
    inputs = [weighted, graph.int64([2])]
    return graph.node("ReduceSum", inputs, f"{at}/ReduceSum", FLOAT, [*LEAD, size], keepdims=0)
