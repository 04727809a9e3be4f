"""The softmax branch of a linear layer: attention over the last W tokens, in blocks, with a cache of W rows, and over
all that lies before them as one more key, whose value is the linear branch.

One formula serves prefill (blocks of W queries, work linear in T) and decoding (one block of one query), so the graph
needs no branch. The cache is part of the layer's carried rows (`rows.py`): keys (after rotary embedding) and values of
the last W tokens, oldest first. Which of its rows hold a token follows from `attention_mask`, so that zeros are an
empty cache.

The one more key is a row of zeros, so its logit is what the mask adds: the learned one of each head. Its value is
another for every query, which `Attention` has no input for; its value there is zero, and its weight, which
`Attention` gives out, is multiplied in afterwards.
"""

import torch

from dtr_deploy.export.onnx.call import LEAD, Blocks
from dtr_deploy.export.onnx.graph import FLOAT, Graph, Shape, parameter_name

WEIGHTS = 3
"""`qk_matmul_output_mode`: what comes out beside the values is after the softmax."""


def make_window_attention(
    graph: Graph,
    blocks: Blocks,
    at: str,
    *,
    q: str,
    rows: str,
    rest_logit: torch.Tensor,
    rest: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
) -> str:
    """q [B,T,Hq*D], rows [B, W + T + 1, 2*Hkv*D] (k and v), the rest [B,T,Hq,D] with its logits [Hq], float32 ->
    [B,T,Hq*D]."""
    q_size, kv_size = q_heads * head_dim, kv_heads * head_dim
    by_block = blocks.of_keys
    near = graph.node("GatherND", [rows, blocks.keys], f"{at}/near/GatherND", FLOAT, [*by_block, 2 * kv_size])
    keys, values = graph.split(near, [kv_size, kv_size], f"{at}/near/Split", FLOAT, by_block)
    query_shape: Shape = [*blocks.of_queries, q_size]
    queries = graph.node("GatherND", [q, blocks.queries], f"{at}/q/GatherND", FLOAT, query_shape)
    logits = graph.initializer(rest_logit.detach().view(1, q_heads, 1, 1), f"{parameter_name(at)}.rest_logit")
    all_blocks, block_size, block_keys = blocks.of_queries[0], blocks.of_queries[1], blocks.of_keys[1]
    weights_shape: Shape = [all_blocks, q_heads, block_size, block_keys]
    mask = graph.node("Where", [blocks.rest, logits, blocks.visible], f"{at}/mask/Where", FLOAT, weights_shape)
    name = f"{at}/Attention"
    out, weights = f"{name}/output_0", f"{name}/output_3"
    graph.builder.make_node(
        "Attention",
        inputs=[queries, keys, values, mask],
        outputs=[out, "", "", weights],
        name=name,
        q_num_heads=q_heads,
        kv_num_heads=kv_heads,
        scale=head_dim**-0.5,
        qk_matmul_output_mode=WEIGHTS,
    )
    graph.builder.make_value(out, FLOAT, shape=query_shape)
    graph.builder.make_value(weights, FLOAT, shape=weights_shape)
    share = graph.node(
        "Gather", [weights, graph.int64([0])], f"{at}/share/Gather", FLOAT, [*weights_shape[:3], 1], axis=3
    )
    share_shape: Shape = [all_blocks, block_size, q_heads, 1]
    share = graph.node("Transpose", [share], f"{at}/share/Transpose", FLOAT, share_shape, perm=[0, 2, 1, 3])
    share = graph.node("GatherND", [share, blocks.tokens], f"{at}/share/GatherND", FLOAT, [*LEAD, q_heads, 1])
    scaled = graph.node("Mul", [rest, share], f"{at}/rest/Mul", FLOAT, [*LEAD, q_heads, head_dim])
    scaled = graph.reshape(scaled, [0, 0, q_size], f"{at}/rest/Reshape", FLOAT, [*LEAD, q_size])
    near = graph.node("GatherND", [out, blocks.tokens], f"{at}/out/GatherND", FLOAT, [*LEAD, q_size])
    return graph.node("Add", [near, scaled], f"{at}/Add", FLOAT, [*LEAD, q_size])
