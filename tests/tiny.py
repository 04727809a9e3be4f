"""Tiny random models of every family, with dials a test turns. Weights are large enough that logits matter."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dtr_deploy.hybrid.model import make_hybrid

VOCABULARY = 512
FAMILIES = ("llama", "qwen2", "qwen3")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_backbone(
    family: str = "llama",
    group: int = 3,
    seed: int = 0,
    layers: int = 4,
    head_dim: int = 32,
    kv_heads: int = 2,
    hidden: int | None = None,
) -> Any:
    """A causal LM with `group` query heads for each of `kv_heads` kv heads, vocabulary 512, float32.

    The hidden size is 96 and not heads times head size, which a family may not mix up; Qwen2 has it equal, since
    vLLM's Qwen2 derives the head size from it.
    """
    heads = group * kv_heads
    if hidden is None:
        hidden = heads * head_dim if family == "qwen2" else 96
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=[model_class.__name__],
    )
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
            elif "norm" in name:
                p.uniform_(0.7, 1.3)
            elif "embed" in name:
                p.normal_(std=0.5)
            else:
                p.normal_(std=1.5 / p.shape[1] ** 0.5)
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def randomise_forms(model: Any, seed: int = 1) -> Any:
    """Form parameters away from their start, so that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if ".form." in name:
                p.add_(torch.randn(p.shape, generator=generator) * (0.5 if p.ndim == 1 else 0.2))
    return model


def tiny_hybrid(
    family: str = "llama",
    forms: tuple[str | None, ...] = (None, "gated_deltanet", "gla", "gated_deltanet"),
    window: int = 64,
    group: int = 3,
    seed: int = 0,
    **sizes: int,
) -> Any:
    """A hybrid of a tiny backbone with random form parameters."""
    backbone = tiny_backbone(family, group, seed, layers=len(forms), **sizes)
    return randomise_forms(make_hybrid(backbone, forms, window), seed + 1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of vocabulary 512 with a chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    while len(vocabulary) < VOCABULARY:
        vocabulary[f"<unused{len(vocabulary)}>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=special[4:],
        model_max_length=8192,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
