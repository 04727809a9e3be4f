"""The softmax branch of a linear layer: attention over the last W tokens, in blocks, with a cache of W rows.

One formula serves prefill (blocks of W queries, work linear in T) and decoding (one block of one query), so the graph
needs no branch. The cache is the layer's `past.N.conv`, [batch, W, 2*Hkv*D] float32: keys (after rotary embedding) and
values of the last W tokens, oldest first. Which of its rows hold a token follows from `attention_mask`, so that zeros
are an empty cache.
"""

from dtr_deploy.export.onnx.call import Blocks
from dtr_deploy.export.onnx.graph import FLOAT, Graph, Shape


def make_window_attention(
    graph: Graph,
    blocks: Blocks,
    at: str,
    *,
    q: str,
    k: str,
    v: str,
    past: str,
    present: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    scale: float,
) -> str:
    """q [B,T,Hq*D], k and v [B,T,Hkv*D], float32 -> [B,T,Hq*D]; writes the new cache to the graph output `present`.

    `past` is read by one node only, on whose result the node that writes `present` depends: the two may be one buffer.
    """
    q_size, kv_size = q_heads * head_dim, kv_heads * head_dim
    by_block: Shape = ["batch_size*blocks", "block_keys"]
    lead: Shape = ["batch_size", "sequence_length"]
    new = graph.node("Concat", [k, v], f"{at}/new/Concat", FLOAT, [*lead, 2 * kv_size], axis=2)
    rows = graph.node("Concat", [past, new], f"{at}/rows/Concat", FLOAT, ["batch_size", "rows", 2 * kv_size], axis=1)
    graph.builder.make_node(
        "GatherND", inputs=[rows, blocks.kept], outputs=[present], name=f"{at}/present/GatherND", batch_dims=1
    )
    near = graph.node("GatherND", [rows, blocks.keys], f"{at}/near/GatherND", FLOAT, [*by_block, 2 * kv_size])
    keys, values = graph.split(near, [kv_size, kv_size], f"{at}/near/Split", FLOAT, by_block)
    query_shape: Shape = ["batch_size*blocks", "block_size", q_size]
    queries = graph.node("GatherND", [q, blocks.queries], f"{at}/q/GatherND", FLOAT, query_shape)
    out = graph.node(
        "Attention",
        [queries, keys, values, blocks.visible],
        f"{at}/Attention",
        FLOAT,
        query_shape,
        q_num_heads=q_heads,
        kv_num_heads=kv_heads,
        scale=scale,
    )
    return graph.node("GatherND", [out, blocks.tokens], f"{at}/out/GatherND", FLOAT, [*lead, q_size])
