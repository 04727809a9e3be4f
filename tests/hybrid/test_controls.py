"""Controls against transformers: no attention is a zero output projection, a window is a band mask."""

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.controls import CONTROLS, WindowAttention, make_control
from tests.tiny import FAMILIES, tiny_backbone

LAYOUT = ("gla", None, "gated_deltanet@8", None)
ALL = ("gla",) * 4
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}  # float32 sums in another order, over four layers of logits of size 10


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(8, 500, (batch, length), generator=torch.Generator().manual_seed(3))


def zero_projections(backbone: Any, layout: tuple[str | None, ...]) -> Any:
    """The backbone's layers with nothing coming out of their attention."""
    for layer, form in zip(backbone.model.layers, layout, strict=True):
        if form is not None:
            layer.self_attn.o_proj.weight.zero_()
            if layer.self_attn.o_proj.bias is not None:
                layer.self_attn.o_proj.bias.zero_()
    return backbone


def banded(backbone: Any, window: int) -> MistralForCausalLM:
    """transformers' own sliding window: Mistral is Llama with one."""
    config = backbone.config.to_dict()
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
    )
    model = MistralForCausalLM(MistralConfig(**{key: config[key] for key in keys}, sliding_window=window)).eval()
    model.load_state_dict(backbone.state_dict())
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_no_op_is_a_residual_branch_without_output(family: str) -> None:
    ids = tokens(2, 40)
    ours = make_control(tiny_backbone(family), LAYOUT, "no_op", 16)(ids).logits
    torch.testing.assert_close(ours, zero_projections(tiny_backbone(family), LAYOUT)(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("window", [1, 7, 200])
def test_window_only_is_transformers_sliding_window(window: int) -> None:
    backbone, ids = tiny_backbone("llama"), tokens(2, 60)
    ours = make_control(backbone, ALL, "window_only", window)(ids).logits
    torch.testing.assert_close(ours, banded(backbone, window)(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_window_attention_is_the_teachers_under_a_band_mask(family: str) -> None:
    backbone, window, length = tiny_backbone(family), 9, 50
    teacher = backbone.model.layers[1].self_attn
    hidden = torch.randn(2, length, backbone.config.hidden_size, generator=torch.Generator().manual_seed(0))
    position_embeddings = backbone.model.rotary_emb(hidden, torch.arange(length)[None])
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    mask = torch.where((distance >= 0) & (distance < window), 0.0, float("-inf"))[None, None]
    backbone.set_attn_implementation("eager")
    expected, _ = teacher(hidden, position_embeddings=position_embeddings, attention_mask=mask)
    ours, _ = WindowAttention(teacher, backbone.config, window, 1)(hidden, position_embeddings)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("layout", [LAYOUT, ALL], ids=["some", "all"])
def test_generation_with_a_cache_is_generation_without(control: Any, layout: tuple[str | None, ...]) -> None:
    """In prompts both longer and shorter than the window, against whole forwards of the same text."""
    model = make_control(tiny_backbone(), layout, control, 16)
    for length in (5, 40):
        written = model.generate(tokens(1, length), max_new_tokens=12, do_sample=False, eos_token_id=None)
        for end in range(length, written.shape[1]):
            logits = model(written[:, :end], use_cache=False).logits[0, -1]
            top = logits.topk(2).values
            assert written[0, end] == logits.argmax() or top[0] - top[1] < 1e-3


def test_every_layer_has_its_own_window() -> None:
    backbone, ids = tiny_backbone(), tokens(1, 50)
    layout = ("gla@5", None, "gla", "jet@20")
    ours = make_control(backbone, layout, "window_only", 9)
    for index, window in ((0, 5), (2, 9), (3, 20)):
        assert ours.model.layers[index].self_attn.window == window
    one_window = make_control(backbone, ("gla", None, "gla", "gla"), "window_only", 9)
    assert not torch.allclose(ours(ids).logits, one_window(ids).logits, atol=1e-2)


def test_right_padding_changes_nothing() -> None:
    model, ids = make_control(tiny_backbone(), LAYOUT, "window_only", 16), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[1, :20], model(ids[1:, :20]).logits[0], **TOLERANCE
    )


def test_the_backbone_is_left_as_it_was() -> None:
    backbone, ids = tiny_backbone(), tokens(1, 30)
    before = backbone(ids).logits
    make_control(backbone, LAYOUT, "no_op", 16)
    controlled = make_control(backbone, LAYOUT, "window_only", 16)
    assert torch.equal(backbone(ids).logits, before)
    assert controlled.lm_head is backbone.lm_head and controlled.model.layers[1] is backbone.model.layers[1]


@pytest.mark.parametrize(
    ("layout", "control", "window", "message"),
    [
        (LAYOUT[:2], "no_op", 16, "layout has 2 entries, the model has 4 layers"),
        (LAYOUT, "noop", 16, "'noop': accepted are no_op, window_only"),
        (LAYOUT, "window_only", 0, "window of 1 token or more, layer 0 has 0"),
    ],
)
def test_mistakes_are_named(layout: Any, control: Any, window: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_control(tiny_backbone(), layout, control, window)
