"""The softmax branch of a linear layer: attention over the last W tokens, in blocks, with a cache of W rows.

One formula serves prefill (blocks of W queries, work linear in T) and decoding (one block of one query), so the graph
needs no branch. The cache is part of the layer's carried rows (`rows.py`): keys (after rotary embedding) and values of
the last W tokens, oldest first. Which of its rows hold a token follows from `attention_mask`, so that zeros are an
empty cache.
"""

from dtr_deploy.export.onnx.call import LEAD, Blocks
from dtr_deploy.export.onnx.graph import FLOAT, Graph, Shape


def make_window_attention(
    graph: Graph,
    blocks: Blocks,
    at: str,
    *,
    q: str,
    rows: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
) -> str:
    """q [B,T,Hq*D], rows [B, W + T, 2*Hkv*D] (k and v), float32 -> [B,T,Hq*D]."""
    q_size, kv_size = q_heads * head_dim, kv_heads * head_dim
    by_block = blocks.of_keys
    near = graph.node("GatherND", [rows, blocks.keys], f"{at}/near/GatherND", FLOAT, [*by_block, 2 * kv_size])
    keys, values = graph.split(near, [kv_size, kv_size], f"{at}/near/Split", FLOAT, by_block)
    query_shape: Shape = [*blocks.of_queries, q_size]
    queries = graph.node("GatherND", [q, blocks.queries], f"{at}/q/GatherND", FLOAT, query_shape)
    out = graph.node(
        "Attention",
        [queries, keys, values, blocks.visible],
        f"{at}/Attention",
        FLOAT,
        query_shape,
        q_num_heads=q_heads,
        kv_num_heads=kv_heads,
        scale=head_dim**-0.5,
    )
    return graph.node("GatherND", [out, blocks.tokens], f"{at}/out/GatherND", FLOAT, [*LEAD, q_size])
