"""Entries of a layout with a window of their own: how they are written, and how a checkpoint keeps them."""

import json

import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.config import hybrid_config
from dtr_deploy.hybrid.layout import Entry, counts, describe, entries, format_entry, parse_entry, windows
from dtr_deploy.hybrid.model import load_hybrid, make_hybrid, save_hybrid
from tests.tiny import tiny_backbone, tiny_hybrid

LAYOUT = ("gated_deltanet@16", None, "gla@0", "gated_deltanet", "jet@96")


def tokens(batch, length, seed=0):
    return torch.randint(8, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("entry", "expected"), [("gla", ("gla", 64)), ("gla@0", ("gla", 0)), ("jet@4096", ("jet", 4096))]
)
def test_an_entry_is_read_and_written(entry, expected):
    assert parse_entry(entry, 64) == expected
    assert format_entry(*expected, 64) == entry


@pytest.mark.parametrize("entry", ["", "@64", "gla@", "gla@x", "gla@-1", "gla@64@2", "gla@4097", "gla@064", "gla@1.5"])
def test_what_is_no_entry_is_refused_in_one_line(entry):
    with pytest.raises(UsageError, match=r"accepted are FORM and FORM@WINDOW with 0 to 4096 tokens") as failure:
        parse_entry(entry, 64)
    assert repr(entry) in str(failure.value) and "\n" not in str(failure.value)


def test_layouts_count_and_describe_entries():
    assert entries(LAYOUT, 64)[:3] == (Entry("gated_deltanet", 16), None, Entry("gla", 0))
    assert windows(LAYOUT, 64) == (16, 64, 96)
    assert counts(LAYOUT) == {"gated_deltanet": 1, "gated_deltanet@16": 1, "gla@0": 1, "jet@96": 1}
    assert "gla@0 1" in describe(LAYOUT)


def test_the_configuration_keeps_windows_only_where_they_differ():
    config = tiny_backbone(layers=5).config
    plain = hybrid_config(config, ("gla", None, "gla@64", "jet", None), 64)
    assert plain.dtr == {
        "version": 2,
        "forms": ["gla", None, "gla", "jet", None],
        "window": 64,
        "state_dtype": "float32",
    }
    assert plain.layout == ("gla", None, "gla", "jet", None)
    mixed = hybrid_config(config, LAYOUT, 64)
    assert mixed.dtr["forms"] == ["gated_deltanet", None, "gla", "gated_deltanet", "jet"]
    assert mixed.dtr["windows"] == [16, None, 0, 64, 96]
    assert mixed.layout == LAYOUT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([16, None, 0, 64], "dtr.windows needs 5 entries, one a layer"),
        ("16", "dtr.windows needs 5 entries, one a layer"),
        ([16, 8, 0, 64, 96], r"dtr.windows\[1\] is 8: accepted is null, as in dtr.forms"),
        ([16, None, -1, 64, 96], r"dtr.windows\[2\] is -1: accepted are whole numbers of tokens, 0 for none"),
        ([16, None, None, 64, 96], r"dtr.windows\[2\] is None: accepted are whole numbers"),
        ([16, None, True, 64, 96], r"dtr.windows\[2\] is True: accepted are whole numbers"),
    ],
)
def test_windows_that_do_not_fit_are_refused(change, message):
    config = hybrid_config(tiny_backbone(layers=5).config, LAYOUT, 64)
    config.dtr["windows"] = change
    with pytest.raises(UsageError, match=message):
        config.check_dtr()


def test_a_saved_checkpoint_is_the_same_model(tmp_path):
    model, ids = tiny_hybrid("qwen3", LAYOUT, 64), tokens(2, 120)
    save_hybrid(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtr"]["windows"] == [16, None, 0, 64, 96]
    loaded, _ = load_hybrid(tmp_path)
    assert [layer.self_attn.sizes.window for i, layer in enumerate(loaded.model.layers) if i != 1] == [16, 0, 64, 96]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_caches_of_different_lengths_continue_where_they_stopped():
    """A prompt in ragged pieces over every window's border, left-padded rows among them, against one whole call."""
    model, ids = tiny_hybrid("llama", LAYOUT, 64), tokens(2, 150)
    whole = model(ids).logits
    cache, parts = None, []
    for begin, end in ((0, 7), (7, 20), (20, 101), (101, 102), (102, 150)):
        out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-3)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    alone = model.generate(ids[:1, 30:], max_new_tokens=8, do_sample=False)
    assert padded[0, 150:].tolist() == alone[0, 120:].tolist()


def test_a_twin_belongs_to_an_entry():
    backbone = tiny_backbone(layers=2)
    trained = tiny_hybrid("llama", (None, "gla@8"), 64).model.layers[1].self_attn.state_dict()
    hybrid = make_hybrid(backbone, (None, "gla@8"), 64, {(1, "gla@8"): trained})
    torch.testing.assert_close(hybrid.model.layers[1].self_attn.state_dict(), trained, rtol=0, atol=0)
    with pytest.raises(UsageError, match="no distilled twin for layer 1, form 'gla'"):
        make_hybrid(backbone, (None, "gla"), 64, {(1, "gla@8"): trained})
