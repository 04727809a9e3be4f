"""One linear layer's mixer as nodes: projections, QK-norm, rotary embedding, form, read-out, window.

hidden -> qkv_proj -> [q | k], v -> QK-norm -> rotary -+-> form's operands -> LinearAttention -> read-out -+
                                                       +----------------------------> window attention <---+-> o_proj
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dtr_deploy.export.onnx.call import LEAD, Blocks, Call, NewTokens, make_blocks, make_call, make_masked_biases
from dtr_deploy.export.onnx.conv import make_dynamic_conv, make_neighbours
from dtr_deploy.export.onnx.forms import EMITTERS
from dtr_deploy.export.onnx.forms.base import HeadLayout, OperandNames
from dtr_deploy.export.onnx.graph import FLOAT, Graph, Shape, parameter_name
from dtr_deploy.export.onnx.rows import CarriedRows, conv_rows, make_kept, make_rows, make_zero_row, window_rows
from dtr_deploy.export.onnx.window import make_window_attention


class MixerWithOutput:
    """What `make_attention_output_proj` reads of an attention module."""

    def __init__(self, o_proj: Any) -> None:
        self.o_proj = o_proj


@dataclass(frozen=True)
class StateShapes:
    """Shapes of a linear layer's two states, the same in all layers of a model: onnxruntime-genai reads them from the
    first. recurrent: (Hkv, Dk, Dv), the largest of the forms used; rows: of `past.N.conv`, with the largest window."""

    recurrent: tuple[int, int, int]
    rows: CarriedRows

    @classmethod
    def of(cls, forms: Iterable[Any], kv_heads: int, head_dim: int) -> "StateShapes":
        """forms: of the linear layers; none in a backbone."""
        forms = list(forms)
        dims = [EMITTERS[form.name].state_dims(head_dim) for form in forms] or [(head_dim, head_dim)]
        recurrent = (kv_heads, max(keys for keys, _ in dims), max(values for _, values in dims))
        return cls(recurrent, CarriedRows.of(forms, kv_heads * head_dim))


@dataclass(frozen=True)
class Shared:
    """What all linear layers use: nodes that run once a call. blocks: by window. kept: by the rows a layer carries.
    zeros: a row, by its width. neighbours: None where no layer needs them. biases: masked ones, by layer."""

    call: Call
    states: StateShapes
    blocks: dict[int, Blocks]
    kept: dict[int, str]
    zeros: dict[int, str]
    neighbours: str | None
    biases: dict[int, str]


def make_shared(graph: Graph, new: NewTokens, forms: Mapping[int, Any], states: StateShapes) -> Shared:
    """forms: of the linear layers, by layer."""
    call, kv_size = make_call(graph, new), states.rows.kv_size
    own = [CarriedRows.of([form], kv_size) for form in forms.values()]
    windows = sorted({rows.window for rows in own} - {0})
    counts = sorted({rows.count for rows in own if rows.used})
    wanted = {layer: EMITTERS[form.name].shared_bias(form) for layer, form in forms.items()}
    biases = {layer: bias for layer, bias in wanted.items() if bias is not None}
    names = make_masked_biases(graph, call, list(biases.values()), "gates") if biases else []
    return Shared(
        call,
        states,
        {window: make_blocks(graph, call, window) for window in windows},
        {count: make_kept(graph, call, count) for count in counts},
        {width: make_zero_row(graph, call, width) for width in sorted({rows.width for rows in own if rows.window})},
        make_neighbours(graph, call, states.rows.conv + 1) if states.rows.conv else None,
        dict(zip(biases, names, strict=True)),
    )


def make_mixer(builder: Any, graph: Graph, layer: int, mixer: Any, root_input: str, shared: Shared) -> None:
    """Write layer `layer`. mixer: q_proj, k_proj, v_proj, o_proj, form, q_norm and k_norm (None but in Qwen3).

    root_input: the layer's input after its norm, [B,T,hidden] in the builder's I/O dtype. Leaves the result where the
    builder's next norm looks for it.
    """
    at = f"/model/layers.{layer}/attn"
    heads = HeadLayout(builder.num_attn_heads, builder.num_kv_heads, builder.head_size)
    q_size, kv_size = heads.q_heads * heads.head_dim, heads.kv_heads * heads.head_dim
    narrow = builder.io_dtype != FLOAT

    def to_float(x: str, name: str, size: int) -> str:
        return graph.cast(x, f"{at}/{name}/Cast", FLOAT, [*LEAD, size]) if narrow else x

    queries_keys, v = _project(builder, graph, at, mixer, root_input, q_size, kv_size)
    queries_keys = _qk_norm(builder, graph, at, mixer, queries_keys, heads)
    cos, sin = builder.make_rotary_embedding_caches()
    queries_keys = graph.nodes(
        "RotaryEmbedding",
        [queries_keys, shared.call.position_ids, cos, sin],
        f"{at}/qk_rotary/RotaryEmbedding",
        [(builder.io_dtype, [*LEAD, q_size + kv_size])],
        domain="com.microsoft",
        interleaved=builder.rope_attrs["interleaved"],
    )[0]
    queries_keys = to_float(queries_keys, "qk_rotary", q_size + kv_size)
    v = to_float(v, "v", kv_size)
    form, rows = mixer.form, CarriedRows.of([mixer.form], kv_size)
    emitter = EMITTERS[form.name](graph, form, heads, f"{at}/{form.name}", shared.biases.get(layer))
    hidden = to_float(root_input, "hidden", builder.hidden_size) if emitter.reads_hidden else ""

    past = {kind: builder.input_names[f"past.{kind}"][layer] for kind in ("recurrent", "conv")}
    present = {kind: builder.output_names[f"present.{kind}"][layer] for kind in ("recurrent", "conv")}
    q, every, values = "", "", v
    if rows.used:
        k = ""
        if rows.window:
            q, k = graph.split(queries_keys, [q_size, kv_size], f"{at}/window/Split", FLOAT, LEAD)
        kept = shared.kept[rows.count]
        zeros = shared.zeros.get(rows.width, "")
        every = make_rows(
            graph, f"{at}/rows", rows, shared.states.rows, kept, zeros, k, v, past["conv"], present["conv"]
        )
    else:
        # Stock onnxruntime-genai wants a convolution state for every layer with a recurrent one.
        builder.make_node("Identity", inputs=[past["conv"]], outputs=[present["conv"]], name=f"{at}/no_rows/Identity")
    if form.conv_kernel:
        assert shared.neighbours is not None
        near_rows = conv_rows(graph, f"{at}/conv/rows", rows, every, form.conv_kernel)
        taps = emitter.taps(hidden)
        values = make_dynamic_conv(graph, f"{at}/conv", near_rows, taps, shared.neighbours, form.conv_kernel, kv_size)
    operands = emitter.operands(queries_keys, values, hidden, shared.call)
    out = _linear_attention(
        builder, graph, at, form, heads, operands, shared.states, past["recurrent"], present["recurrent"]
    )
    linear = emitter.read_out(out)
    if rows.window:
        mixed = make_window_attention(
            graph,
            shared.blocks[rows.window],
            f"{at}/window",
            q=q,
            rows=window_rows(graph, f"{at}/window/rows", rows, every),
            rest_logit=form.rest_logit,
            rest=linear,
            q_heads=heads.q_heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
        )
    else:
        mixed = emitter.flat_heads(linear)
    if narrow:
        mixed = graph.cast(mixed, f"{at}/mix/Cast", builder.io_dtype, [*LEAD, q_size])
    builder.attention_attrs["o_path"] = mixed
    builder.make_attention_output_proj(layer, MixerWithOutput(mixer.o_proj), root_input)


def _project(
    builder: Any, graph: Graph, at: str, mixer: Any, root_input: str, q_size: int, kv_size: int
) -> tuple[str, str]:
    """One packed product -> [q | k] and v, with the family's biases."""
    name = builder.make_packed_matmul(mixer.q_proj, mixer.k_proj, mixer.v_proj, f"{at}/qkv_proj/MatMul", root_input)
    packed = f"{name}/output_0"
    biases = [projection.bias for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    if any(bias is not None for bias in biases):
        filled = [
            torch.zeros(size) if bias is None else bias
            for bias, size in zip(biases, (q_size, kv_size, kv_size), strict=True)
        ]
        builder.make_packed_add(*filled, f"{at}/qkv_proj/Add", packed)
        packed = f"{at}/qkv_proj/Add/output_0"
    queries_keys, v = graph.split(packed, [q_size + kv_size, kv_size], f"{at}/qkv_proj/Split", builder.io_dtype, LEAD)
    return queries_keys, v


def _qk_norm(builder: Any, graph: Graph, at: str, mixer: Any, queries_keys: str, heads: HeadLayout) -> str:
    """Qwen3's RMS norm of each q and k head, both in one node with a scale per head; others pass."""
    if mixer.q_norm is None:
        return queries_keys
    count, dim = heads.q_heads + heads.kv_heads, heads.head_dim
    weight = torch.cat(
        [
            mixer.q_norm.weight.detach().expand(heads.q_heads, dim),
            mixer.k_norm.weight.detach().expand(heads.kv_heads, dim),
        ]
    )
    scale = graph.initializer(weight, f"{parameter_name(at)}.qk_norm.weight", builder.io_dtype)
    by_head = graph.reshape(
        queries_keys, [0, 0, count, dim], f"{at}/qk_norm/Reshape", builder.io_dtype, [*LEAD, count, dim]
    )
    normed = graph.node(
        "RMSNormalization",
        [by_head, scale],
        f"{at}/qk_norm/RMSNormalization",
        builder.io_dtype,
        [*LEAD, count, dim],
        axis=-1,
        epsilon=builder.layernorm_attrs["epsilon"],
    )
    return graph.reshape(normed, [0, 0, count * dim], f"{at}/qk_norm/Reshape_1", builder.io_dtype, [*LEAD, count * dim])


def _linear_attention(
    builder: Any,
    graph: Graph,
    at: str,
    form: Any,
    heads: HeadLayout,
    operands: OperandNames,
    states: StateShapes,
    past: str,
    present: str,
) -> str:
    """The operator over one layer: its output [B,T,padded heads*Dv]; writes the graph output `present`.

    A form whose state is smaller than the model's keeps it in the corner of it: cheaper than padded operands, which
    would cost with every token. `past` is read by one node only, before the node that writes `present`.
    """
    kv_heads, *largest = states.recurrent
    keys, values = EMITTERS[form.name].state_dims(heads.head_dim)
    own: Shape = ["batch_size", kv_heads, keys, values]
    fits = [keys, values] == largest
    if not fits:
        inputs = [past, graph.int64([0, 0]), graph.int64([keys, values]), graph.int64([2, 3])]
        past = graph.node("Slice", inputs, f"{at}/state/Slice", FLOAT, own)
    name = f"{at}/LinearAttention"
    new = present if fits else f"{name}/output_1"
    builder.make_node(
        "LinearAttention",
        inputs=[operands.q, operands.k, operands.v, past, operands.decay, operands.beta],
        outputs=[f"{name}/output_0", new],
        name=name,
        domain="com.microsoft",
        q_num_heads=heads.padded_heads,
        kv_num_heads=heads.kv_heads,
        update_rule=form.rule,
        scale=form.scale,
    )
    builder.make_value(f"{name}/output_0", FLOAT, shape=[*LEAD, heads.padded_heads * values])
    if not fits:
        builder.make_value(new, FLOAT, shape=own)
        pads = graph.int64([0] * 6 + [largest[0] - keys, largest[1] - values])
        builder.make_node("Pad", inputs=[new, pads], outputs=[present], name=f"{at}/state/Pad")
    return f"{name}/output_0"
