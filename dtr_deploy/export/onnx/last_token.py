"""Logits of each row's last token only: what a served graph computes, and the way back to the logits of all tokens.

After the last attention a token no longer meets the others, and only a row's last one decides what comes next. So the
served graph takes the hidden state of that token there: the last MLP, the final norm and the LM head run once a row. In
a batch with right padding the last token is not the last column, hence the index from `attention_mask`.

A graph for scoring needs the logits of all tokens. It is the served graph without those nodes.
"""

from typing import TYPE_CHECKING

from dtr_deploy.export.onnx.call import NewTokens
from dtr_deploy.export.onnx.graph import INT64, Graph

if TYPE_CHECKING:
    import onnx

AT = "/model/last_token"
SEQUENCE = "sequence_length"


def make_last_token_index(graph: Graph, new: NewTokens) -> str:
    """int64 [B,1,1], the column of each row's last token; for GatherND with batch_dims 1."""
    at = f"{AT}/index"
    last = graph.node("Sub", [new.real_count, graph.int64(1)], f"{at}/Sub", INT64, ["batch_size", 1])
    return graph.node("Unsqueeze", [last, graph.int64([2])], f"{at}/Unsqueeze", INT64, ["batch_size", 1, 1])


def take_last_token(graph: Graph, x: str, index: str, name: str) -> str:
    """x [B,T,n] -> [B,1,n]."""
    value = graph.builder.values[x]
    shape = ["batch_size", 1, value.shape[2]]
    return graph.node("GatherND", [x, index], f"{AT}/{name}/GatherND", value.dtype, shape, batch_dims=1)


def with_all_logits(served: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy of a served model with logits [B,T,vocabulary]; its weights stay where the served model's are.

    served: without external data in memory; not modified.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(served)
    graph = model.graph
    everything = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "GatherND" and node.name.startswith(AT)
    }
    # Whatever is computed from a row's last token has a sequence of 1 in its shape.
    short = set(everything)
    for node in graph.node:
        if short.intersection(node.input):
            short.update(node.output)
        for place, name in enumerate(node.input):
            node.input[place] = everything.get(name, name)
    for value in (*graph.value_info, *graph.output):
        if value.name in short and value.name not in everything:
            value.type.tensor_type.shape.dim[1].dim_param = SEQUENCE
    _remove_unused(graph)
    return model


def _remove_unused(graph: "onnx.GraphProto") -> None:
    """Drop nodes whose results nobody takes, and what is said about their results. Nodes are in topological order."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    values = [value for value in graph.value_info if value.name in used]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.value_info.extend(values)
