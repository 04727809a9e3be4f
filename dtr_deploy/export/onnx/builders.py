"""onnxruntime-genai's model builders, extended by linear layers.

The base builders write everything that is not a linear mixer: embedding, norms, MLP, full attention, LM head,
quantization, `genai_config.json`, tokenizer files. The mixin adds the states, hands linear layers to `mixer.py`, and
leaves all but each row's last token out after the last attention (`last_token.py`).
The builders' API moves between releases, so `build.py` checks the version before this module is imported.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnxruntime_genai.models.builders.llama import LlamaModel
from onnxruntime_genai.models.builders.qwen import Qwen3Model, QwenModel

from dtr_deploy.export.onnx.call import NewTokens, make_new_tokens
from dtr_deploy.export.onnx.graph import Graph
from dtr_deploy.export.onnx.last_token import SEQUENCE, make_last_token_index, take_last_token
from dtr_deploy.export.onnx.mixer import Shared, StateShapes, make_mixer, make_shared

if TYPE_CHECKING:
    from onnxruntime_genai.models.builders.base import Model as Base
else:
    Base = object

# RMSNormalization and Attention came with opset 23.
OPSET = 23


class HybridBuilder(Base):
    """Mixin over a builder. `model` (in memory) is given; everything else is the base's.

    In a hybrid the states of layer N are `past.N.recurrent` [batch, Hkv, Dk, Dv] and `past.N.conv` (`rows.py`), both
    float32 and as large as the largest that any of the model's forms needs.
    """

    def __init__(self, model: Any, *args: Any) -> None:
        self.source = model
        self._new: NewTokens | None = None
        self._shared: Shared | None = None
        self._only_last_token = False
        super().__init__(*args)
        self.graph.opset_imports[""] = OPSET
        self.writer = Graph(self)

    def is_gqa_supported(self) -> bool:
        """As the base says, and float16 on the CPU, whose kernel takes it. The base would write MultiHeadAttention
        there, with caches that are copied every step and a mask that asks for full attention in the first layer."""
        return (self.ep, self.io_dtype) == ("cpu", ir.DataType.FLOAT16) or super().is_gqa_supported()

    def make_inputs_init(self) -> None:
        super().make_inputs_init()
        self._set_state_io(self.input_shapes, self.input_types, "past")

    def make_outputs_init(self) -> None:
        super().make_outputs_init()
        self.output_shapes["logits"] = ["batch_size", 1, self.vocab_size]
        self._set_state_io(self.output_shapes, self.output_types, "present")

    def _forms(self) -> dict[int, Any]:
        """Forms of the linear layers, by layer."""
        layers = enumerate(self.source.model.layers)
        return {i: layer.self_attn.form for i, layer in layers if self.layer_types[i] == "linear_attention"}

    def _states(self) -> StateShapes:
        return StateShapes.of(self._forms().values(), self.num_kv_heads, self.head_size)

    def _set_state_io(self, shapes: dict, types: dict, prefix: str) -> None:
        states = self._states()
        shapes[f"{prefix}.recurrent"] = ["batch_size", *states.recurrent]
        shapes[f"{prefix}.conv"] = ["batch_size", states.rows.count, states.rows.width]
        for kind in ("recurrent", "conv"):
            types[f"{prefix}.{kind}"] = ir.DataType.FLOAT

    def make_node(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], **kwargs: Any) -> None:
        """As the base's, with onnxruntime's old name of the RMS norm replaced by the standard operator's."""
        standard = "RMSNormalization" if op_type == "SimplifiedLayerNormalization" else op_type
        super().make_node(standard, inputs, outputs, **kwargs)

    def make_hidden_state_shape(self, seq_dim: int | str = SEQUENCE, last_dim: int | None = None) -> list[int | str]:
        return super().make_hidden_state_shape(1 if self._only_last_token else seq_dim, last_dim)

    def make_layernorm(self, layer_id: int, layernorm: Any, skip: bool, simple: bool, location: str) -> None:
        if layer_id == self.num_layers - 1 and location == "post_attention":
            self._keep_last_token()
        super().make_layernorm(layer_id, layernorm, skip, simple, location)

    def _keep_last_token(self) -> None:
        """From here on the graph computes one token a row: the residual stream's and the last attention's."""
        index = make_last_token_index(self.writer, self._new_tokens())
        for name in ("root_input", "skip_input"):
            self.layernorm_attrs[name] = take_last_token(self.writer, self.layernorm_attrs[name], index, name)
        self._only_last_token = True

    def _new_tokens(self) -> NewTokens:
        if self._new is None:
            self._new = make_new_tokens(self.writer)
        return self._new

    def load_weights(self, input_path: str) -> Any:
        return self.source

    def has_lm_head(self, module: Any) -> bool:
        """The base goes by the number of outputs, and takes a q_proj as wide as the vocabulary for the head."""
        return module is self.source.lm_head

    def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        if self.layer_types[layer_id] != "linear_attention":
            super().make_attention(layer_id, attention, root_input, **kwargs)
            return
        if self._shared is None:
            self._shared = make_shared(self.writer, self._new_tokens(), self._forms(), self._states())
        make_mixer(self, self.writer, layer_id, attention, root_input, self._shared)


class HybridLlama(HybridBuilder, LlamaModel):
    """Llama: no biases, no QK-norm."""


class HybridQwen2(HybridBuilder, QwenModel):
    """Qwen2: biases on q, k and v."""


class HybridQwen3(HybridBuilder, Qwen3Model):
    """Qwen3: QK-norm."""


# Base architecture (what genai knows) -> builder.
BUILDERS: dict[str, type[HybridBuilder]] = {
    "LlamaForCausalLM": HybridLlama,
    "Qwen2ForCausalLM": HybridQwen2,
    "Qwen3ForCausalLM": HybridQwen3,
}
