"""The hybrid models: Llama, Qwen2 and Qwen3 whose layers are full attention or linear mixers, as the layout says.

Importing this module makes `AutoModelForCausalLM` load hybrid checkpoints. `generate`, caches (transformers' own
`LinearAttentionLayer`), padding and batches work as for any model; nothing needs `trust_remote_code`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.config import (
    DtrLlamaConfig,
    DtrQwen2Config,
    DtrQwen3Config,
    hybrid_config,
    register_configs,
)
from dtr_deploy.hybrid.layout import FULL, LINEAR, Layout
from dtr_deploy.hybrid.mixer import HybridMixer, own_parameters
from dtr_deploy.hybrid.placement import take_hooks

Twins = Mapping[tuple[int, str], Mapping[str, Tensor]]


class HybridModelMixin:
    """The decoder stack: puts mixers in and gives each kind of layer its kind of mask."""

    def __init__(self, config: Any) -> None:
        config.check_dtr()
        super().__init__(config)  # type: ignore[call-arg]
        for i, entry in enumerate(config.entries):
            if entry is not None:
                layer = self.layers[i]  # type: ignore[attr-defined]
                layer.self_attn = HybridMixer(layer.self_attn, config, entry.form, entry.window, i)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the family's own; attention_mask [B, past + T] with 1 for tokens, either side padded."""
        this: Any = self
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = this.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=this.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        masks = attention_mask
        if not isinstance(masks, dict):
            arguments = {
                "config": this.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            masks = {FULL: create_causal_mask(**arguments), LINEAR: create_recurrent_attention_mask(**arguments)}
        hidden_states = inputs_embeds
        position_embeddings = this.rotary_emb(hidden_states, position_ids)
        for layer, layer_type in zip(this.layers, this.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=this.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class DtrLlamaModel(HybridModelMixin, LlamaModel):
    config: DtrLlamaConfig


class DtrQwen2Model(HybridModelMixin, Qwen2Model):
    config: DtrQwen2Config


class DtrQwen3Model(HybridModelMixin, Qwen3Model):
    config: DtrQwen3Config


class HybridForCausalLMMixin:
    """The causal LM head over a hybrid stack."""

    # Decays and gates do not survive bfloat16; they stay float32 whatever dtype a checkpoint is loaded in.
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"form"}
    stack: ClassVar[type]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        this: Any = self
        this.model = self.stack(config)
        this.post_init()


class DtrLlamaForCausalLM(HybridForCausalLMMixin, LlamaForCausalLM):
    config_class = DtrLlamaConfig
    config: DtrLlamaConfig
    stack = DtrLlamaModel


class DtrQwen2ForCausalLM(HybridForCausalLMMixin, Qwen2ForCausalLM):
    config_class = DtrQwen2Config
    config: DtrQwen2Config
    stack = DtrQwen2Model


class DtrQwen3ForCausalLM(HybridForCausalLMMixin, Qwen3ForCausalLM):
    config_class = DtrQwen3Config
    config: DtrQwen3Config
    stack = DtrQwen3Model


MODELS: dict[type, type[PreTrainedModel]] = {
    DtrLlamaConfig: DtrLlamaForCausalLM,
    DtrQwen2Config: DtrQwen2ForCausalLM,
    DtrQwen3Config: DtrQwen3ForCausalLM,
}

register_configs()
for _config, _model in MODELS.items():
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def make_hybrid(backbone: PreTrainedModel, layout: Layout, window: int, twins: Twins | None = None) -> Any:
    """A hybrid of `backbone` with layers replaced as `layout` says.

    Args:
        backbone: a Llama, Qwen2 or Qwen3 causal LM; not modified. What is not replaced is shared with it.
        layout: an entry (`hybrid.layout`) or None for each layer.
        window: tokens of the softmax branch, 0 for none, of entries that name none.
        twins: state dictionaries of `HybridMixer` by (layer, entry). None leaves the forms at their uncalibrated start
            and shares the projections with the backbone.

    Raises:
        UsageError: unsupported family, a layout that does not fit, or a twin that is missing.
    """
    config = hybrid_config(backbone.config, layout, window)
    config._attn_implementation = backbone.config._attn_implementation
    source: Any = backbone.model
    with torch.device("meta"):
        hybrid: Any = MODELS[type(config)](config)
    stack = hybrid.model
    hybrid.lm_head = backbone.lm_head
    stack.embed_tokens, stack.norm, stack.rotary_emb = source.embed_tokens, source.norm, source.rotary_emb
    for i, form in enumerate(layout):
        layer, theirs = stack.layers[i], source.layers[i]
        take_hooks(layer, theirs)
        layer.mlp = theirs.mlp
        layer.input_layernorm, layer.post_attention_layernorm = theirs.input_layernorm, theirs.post_attention_layernorm
        if form is None:
            layer.self_attn = theirs.self_attn
        else:
            layer.self_attn = make_twin(theirs.self_attn, config, i, form, window, twins)
    hybrid.generation_config = backbone.generation_config
    hybrid.train(backbone.training)
    return hybrid


def make_twin(
    teacher: torch.nn.Module, config: Any, layer: int, form: str, window: int, twins: Twins | None = None
) -> HybridMixer:
    """The mixer for one layer, where its teacher lies: sharing its projections, or holding the weights of `twins`."""
    mixer = HybridMixer(teacher, config, form, window, layer)
    if twins is not None:
        if (layer, form) not in twins:
            raise UsageError(f"no distilled twin for layer {layer}, form {form!r}")
        weights = twins[layer, form]
        own_parameters(mixer, weights)
        mixer.form.load_state_dict({k.removeprefix("form."): w for k, w in weights.items() if k.startswith("form.")})
    mixer.form.to(mixer.q_proj.weight.device)
    return mixer.requires_grad_(False)


def save_hybrid(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Write a normal Hugging Face folder: config.json, safetensors, tokenizer."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_hybrid(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model (evaluation mode) and tokenizer (None if the folder has none) of a hybrid checkpoint."""
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{folder}: no config.json; expected a folder written by dtr-deploy")
    if "dtr" not in json.loads(config.read_text()):
        raise UsageError(f"{config}: no key 'dtr'; expected a hybrid checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
