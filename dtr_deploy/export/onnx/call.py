"""What the graph needs to know about one call of the model, computed once from the inputs.

A call brings T tokens for each of B rows; right padding is marked by zeros in the last T columns of `attention_mask`,
whose other columns say how many tokens each row has already (onnxruntime-genai and `engines.ort` both pass it so).
These nodes run once a call, not once a layer, but a decoding step notices each of them: keep them few.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtr_deploy.export.onnx.graph import BOOL, END, FLOAT, INT64, Graph, Shape

# Added to a gate's logit at padding: softplus and sigmoid of it are exactly 0 in float32.
PADDING_LOGIT = 1e4
# Added to the logit of a key that may not be seen: its softmax weight is exactly 0.
HIDDEN_KEY = -1e30

LEAD: Shape = ["batch_size", "sequence_length"]


@dataclass(frozen=True)
class NewTokens:
    """Names of what every graph needs to know about a call's tokens, a backbone's too.

    rows, length: int64 scalars, B and T.
    mask: int64 [B,T], 1 for a token and 0 for padding.
    real_count: int64 [B,1], tokens each row brings.
    """

    rows: str
    length: str
    mask: str
    real_count: str


def make_new_tokens(graph: Graph) -> NewTokens:
    at = "/model/call"
    int64 = graph.int64
    shape = graph.node("Shape", ["input_ids"], f"{at}/Shape", INT64, [2])
    rows = graph.node("Gather", [shape, int64(0)], f"{at}/rows/Gather", INT64, [], axis=0)
    length = graph.node("Gather", [shape, int64(1)], f"{at}/length/Gather", INT64, [], axis=0)
    first = graph.node("Mul", [length, int64([-1])], f"{at}/mask/Mul", INT64, [1])
    mask = graph.node("Slice", ["attention_mask", first, int64([END]), int64([1])], f"{at}/mask/Slice", INT64, LEAD)
    real_count = graph.node("ReduceSum", [mask, int64([1])], f"{at}/real_count/ReduceSum", INT64, ["batch_size", 1])
    return NewTokens(rows, length, mask, real_count)


@dataclass(frozen=True)
class Call:
    """Names of values shared by all linear layers.

    new: the call's tokens.
    offsets: int64 [T], 0 to T-1.
    position_ids: int64 [B,T], position of each token in its row.
    start: int64 [B,1], tokens each row had before this call.
    real: float32 [B,T,1], 1 for a token and 0 for padding.
    gate_mask: float32 [B,T,1], 0 for a token and -PADDING_LOGIT for padding.
    """

    new: NewTokens
    offsets: str
    position_ids: str
    start: str
    real: str
    gate_mask: str


def make_call(graph: Graph, new: NewTokens) -> Call:
    at = "/model/call"
    int64 = graph.int64
    total = graph.node("ReduceSum", ["attention_mask", int64([1])], f"{at}/total/ReduceSum", INT64, ["batch_size", 1])
    start = graph.node("Sub", [total, new.real_count], f"{at}/start/Sub", INT64, ["batch_size", 1])
    offsets = graph.node("Range", [int64(0), new.length, int64(1)], f"{at}/offsets/Range", INT64, ["sequence_length"])
    position_ids = graph.node("Add", [start, offsets], f"{at}/position_ids/Add", INT64, LEAD)
    mask = graph.node("Unsqueeze", [new.mask, int64([2])], f"{at}/real/Unsqueeze", INT64, [*LEAD, 1])
    real = graph.cast(mask, f"{at}/real/Cast", FLOAT, [*LEAD, 1])
    absent = graph.node("Sub", [real, graph.float32(1.0)], f"{at}/gate_mask/Sub", FLOAT, [*LEAD, 1])
    scale = graph.float32(PADDING_LOGIT)
    gate_mask = graph.node("Mul", [absent, scale], f"{at}/gate_mask/Mul", FLOAT, [*LEAD, 1])
    return Call(new, offsets, position_ids, start, real, gate_mask)


def make_masked_biases(graph: Graph, call: Call, biases: Sequence[torch.Tensor], name: str) -> list[str]:
    """Each bias [n] plus the padding mask, float32 [B,T,n]: one addition for all layers, then one in each layer."""
    at, sizes = f"/model/call/{name}", [bias.shape[0] for bias in biases]
    stored = graph.initializer(torch.cat([bias.detach() for bias in biases]), f"model.call.{name}.bias")
    masked = graph.node("Add", [call.gate_mask, stored], f"{at}/Add", FLOAT, [*LEAD, sum(sizes)])
    return graph.split(masked, sizes, f"{at}/Split", FLOAT, LEAD)


@dataclass(frozen=True)
class Blocks:
    """How the window branch cuts one call into blocks of C = min(T, W) queries, N = ceil(T / C) of them.

    Rows are counted in the concatenation of the W cached rows and the T new ones. Block n of queries sees rows
    [n*C, n*C + W + C): the W rows before its first query and its own C. The indices are for GatherND, which goes from
    rows to blocks and back in one node.

    No query of a block sees the block's key 0, W rows before its first query. That place is the rest's, the one more
    key of `dtr_kernels.window.Rest`: it points behind the last row, to one of zeros.

    keys: int64 [B*N, W+C, 2], (b, row) of each block's keys, clipped at the last row; what is clipped is never visible.
    rest: bool [W+C], true for key 0.
    queries: int64 [B*N, C, 2], (b, t) of each block's queries, clipped at T-1; what is clipped is dropped by `tokens`.
    tokens: int64 [B, T, 2], (block, query in it) of each token.
    visible: float32 [B*N, 1, C, W+C], 0 where query i may see key j, HIDDEN_KEY elsewhere.
    of_keys, of_queries: the dimensions [B*N, W+C] and [B*N, C]; onnxruntime takes dimensions of one name for equal
    ones, so each window has names of its own.
    """

    keys: str
    rest: str
    queries: str
    tokens: str
    visible: str
    of_keys: Shape
    of_queries: Shape


def make_blocks(graph: Graph, call: Call, window: int) -> Blocks:
    """Once a call and window."""
    at = f"/model/window_{window}"
    int64 = graph.int64
    all_blocks, block_size, block_keys = f"batch_size*blocks_{window}", f"block_size_{window}", f"block_keys_{window}"
    queries_of_block: Shape = [all_blocks, block_size]
    keys_of_block: Shape = [all_blocks, block_keys]

    def node(op: str, inputs: list[str], name: str, shape: Shape) -> str:
        return graph.node(op, inputs, f"{at}/{name}/{op}", INT64, shape)

    def count(limit: str, name: str, dimension: str) -> str:
        return node("Range", [int64(0), limit, int64(1)], name, [dimension])

    def second(index: str, name: str, shape: Shape) -> str:
        """index [...] -> [..., (0, index)], to which the first half of a pair is added."""
        column = node("Unsqueeze", [index, int64([-1])], name, [*shape, 1])
        return node("Mul", [column, int64([0, 1])], name, [*shape, 2])

    def first(index: str, axes: list[int], name: str, shape: Shape) -> str:
        """index [n] -> [n, 1, (index, 0)]."""
        column = node("Unsqueeze", [index, int64(axes)], name, shape)
        return node("Mul", [column, int64([1, 0])], name, [*shape[:-1], 2])

    # Scalars
    size = node("Min", [call.new.length, int64(window)], "block_size", [])
    near = node("Add", [size, int64(window)], "block_keys", [])
    last = node("Sub", [call.new.length, int64(1)], "last_token", [])
    last_row = node("Add", [last, int64(window)], "last_row", [])
    blocks = node("Add", [node("Div", [last, size], "blocks", []), int64(1)], "blocks", [])
    total = node("Mul", [blocks, call.new.rows], "total", [])

    # Blocks of all rows in one dimension
    block = count(total, "block", all_blocks)
    query, key = count(size, "query", block_size), count(near, "key", block_keys)
    row_of_block = node("Div", [block, blocks], "row_of_block", [all_blocks])
    row_pair = first(row_of_block, [1, 2], "row_of_block", [all_blocks, 1, 1])
    begin = node("Mul", [node("Mod", [block, blocks], "begin", [all_blocks]), size], "begin", [all_blocks])
    begin = node("Unsqueeze", [begin, int64([1])], "begin", [all_blocks, 1])

    key_rows = node("Add", [begin, key], "key_rows", keys_of_block)
    rest = graph.node("Equal", [key, int64(0)], f"{at}/rest/Equal", BOOL, [block_keys])
    zeros = node("Add", [last_row, int64(1)], "zeros", [])
    clipped = node("Min", [key_rows, last_row], "keys", keys_of_block)
    clipped = node("Where", [rest, zeros, clipped], "keys", keys_of_block)
    keys = node("Add", [second(clipped, "keys", keys_of_block), row_pair], "keys", [*keys_of_block, 2])
    clipped = node(
        "Min", [node("Add", [begin, query], "query_rows", queries_of_block), last], "queries", queries_of_block
    )
    queries = node("Add", [second(clipped, "queries", queries_of_block), row_pair], "queries", [*queries_of_block, 2])

    in_row = node("Div", [call.offsets, size], "block_of_token", ["sequence_length"])
    before_row = node("Mul", [count(call.new.rows, "row", "batch_size"), blocks], "row", ["batch_size"])
    before_row = node("Unsqueeze", [before_row, int64([1])], "row", ["batch_size", 1])
    of_token = node("Add", [before_row, in_row], "block_of_token", LEAD)
    of_token = first(of_token, [2], "block_of_token", [*LEAD, 1])
    in_block = second(
        node("Mod", [call.offsets, size], "query_of_token", ["sequence_length"]), "tokens", ["sequence_length"]
    )
    tokens = node("Add", [of_token, in_block], "tokens", [*LEAD, 2])

    # In a block, query i is row i + W: it sees rows j with 0 <= i + W - j < W that hold a token. Cached rows are
    # right-aligned: of W rows the last min(W, start) hold one.
    band: Shape = [block_size, block_keys]
    ahead = node("Sub", [key, node("Unsqueeze", [query, int64([1])], "ahead", [block_size, 1])], "ahead", band)
    not_old = graph.node("Greater", [ahead, int64(0)], f"{at}/band/Greater", BOOL, band)
    causal = graph.node("LessOrEqual", [ahead, int64(window)], f"{at}/band/LessOrEqual", BOOL, band)
    in_band = graph.node("And", [not_old, causal], f"{at}/band/And", BOOL, band)
    empty = node("Sub", [int64(window), call.start], "empty", ["batch_size", 1])
    empty = graph.node("Gather", [empty, row_of_block], f"{at}/empty/Gather", INT64, [all_blocks, 1], axis=0)
    filled = graph.node("GreaterOrEqual", [key_rows, empty], f"{at}/filled/GreaterOrEqual", BOOL, keys_of_block)
    filled_shape: Shape = [all_blocks, 1, 1, block_keys]
    filled = graph.node("Unsqueeze", [filled, int64([1, 2])], f"{at}/filled/Unsqueeze", BOOL, filled_shape)
    full_shape: Shape = [all_blocks, 1, *band]
    seen = graph.node("And", [filled, in_band], f"{at}/visible/And", BOOL, full_shape)
    choice = [seen, graph.float32(0.0), graph.float32(HIDDEN_KEY)]
    visible = graph.node("Where", choice, f"{at}/visible/Where", FLOAT, full_shape)
    return Blocks(keys, rest, queries, tokens, visible, keys_of_block, queries_of_block)
