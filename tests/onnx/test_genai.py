"""What stock onnxruntime-genai does with exported folders: batches, snapshots, and what it must not be asked for."""

import json
import shutil

import numpy as np
import pytest
import torch

from dtr_deploy.engines.genai import GenaiEngine
from dtr_deploy.engines.torch import TorchEngine

LAYOUTS = pytest.mark.parametrize(
    "forms", ((None, "gated_deltanet", "gla", "gated_deltanet"), (None, "gla", "hedgehog", "jet"))
)
PAD, END = 0, 2


@pytest.fixture
def generator():
    """A generator over a folder, greedy, for texts of at most 300 tokens."""
    import onnxruntime_genai

    def make(folder, **options):
        model = onnxruntime_genai.Model(str(folder))
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(**{"max_length": 300, "do_sample": False, **options})
        return onnxruntime_genai.Generator(model, parameters)

    return make


def append(generator, tokens):
    generator.append_tokens(np.array([tokens], np.int32))


def logits(generator):
    return generator.get_logits()[0, -1].copy()


def greedy(generator, count):
    """Tokens chosen from the logits and appended, so that all of them are in the states."""
    tokens = []
    for _ in range(count):
        tokens.append(int(logits(generator).argmax()))
        append(generator, tokens[-1:])
    return tokens


def until_end(tokens):
    """Up to where genai ends a row: at end-of-text, and at the pad token."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in (PAD, END)), len(tokens))]


def batch(generator, folder, texts, count):
    """New tokens of rows padded on the right."""
    longest = max(map(len, texts))
    subject = generator(folder, batch_size=len(texts), max_length=longest + count)
    subject.append_tokens(np.array([text + [PAD] * (longest - len(text)) for text in texts], np.int32))
    while not subject.is_done():
        subject.generate_next_token()
    return [until_end(subject.get_sequence(row)[longest:].tolist()) for row in range(len(texts))]


@LAYOUTS
@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_ragged_batch_gives_what_single_prompts_give(family, forms, exported, prompts, generator):
    _, folder = exported(family, forms)
    texts = prompts(1, 7, 64, 65, 130)
    alone = GenaiEngine(folder, "fp32", threads=1).generate(texts, 30)
    assert batch(generator, folder, texts, 30) == [until_end(tokens) for tokens in alone]
    assert max(map(len, map(until_end, alone))) == 30


def test_pad_token_at_a_prompts_end_is_taken_for_padding(exported, prompts, generator):
    """Why a prompt that ends in the pad token (end-of-text, in many models) must run alone."""
    model, folder = exported()
    short, long = prompts(20, 40)
    with_pad, without = TorchEngine(model).generate([[*short, PAD], short], 8)
    assert until_end(with_pad) != until_end(without)
    assert batch(generator, folder, [[*short, PAD], long], 8)[0] == until_end(without)
    assert GenaiEngine(folder, "fp32", threads=1).generate([[*short, PAD]], 8) == [with_pad]


@LAYOUTS
def test_going_back_to_a_snapshot_leaves_no_trace(forms, exported, prompts, generator):
    """KV caches, recurrent states and carried rows: bit for bit what they are if nothing was generated in between."""
    _, folder = exported("llama", forms)
    text, more = prompts(70, 20)
    fresh = generator(folder)
    append(fresh, text)
    append(fresh, more)
    expected = logits(fresh)
    subject = generator(folder)
    append(subject, text)
    subject.snapshot_state()
    for _ in range(2):
        append(subject, more[:3])
        greedy(subject, 30)
        subject.rewind_to(70)
        append(subject, more)
        assert (logits(subject) == expected).all()
        subject.rewind_to(70)
    for _ in range(5):
        append(subject, more[:1])
        subject.generate_next_token()
    subject.rewind_to(70)
    append(subject, more)
    assert (logits(subject) == expected).all()


def test_logits_must_not_be_read_right_after_going_back(exported, prompts, generator):
    """With any model, genai then computes one more token, which nobody gave it: append a token first."""
    for forms in (None, (None, "gated_deltanet", "gla", "gated_deltanet")):
        _, folder = exported("llama", forms)
        subject = generator(folder)
        append(subject, prompts(40)[0])
        first = logits(subject)
        subject.snapshot_state()
        greedy(subject, 3)
        subject.rewind_to(40)
        assert not np.allclose(logits(subject), first, atol=0.1)
        assert subject.token_count() == 41


def test_rewind_to_other_lengths_is_refused(exported, prompts, generator):
    _, folder = exported()
    text = prompts(40)[0]
    subject = generator(folder)
    append(subject, text)
    with pytest.raises(RuntimeError, match=r"RewindTo\(5\) is not supported without a snapshot"):
        subject.rewind_to(5)
    for length in (20, 29, 31):
        subject = generator(folder)
        append(subject, text[:20])
        subject.snapshot_state()
        append(subject, text[20:30])
        subject.snapshot_state()  # takes the place of the one at 20
        append(subject, text[30:])
        with pytest.raises(RuntimeError, match=rf"RewindTo\({length}\) cannot restore snapshot at length 30"):
            subject.rewind_to(length)
        # The refusal has cut the text and not the states: from here only 0 is left.
        assert subject.token_count() == length
        subject.rewind_to(0)
        append(subject, text)
        fresh = generator(folder)
        append(fresh, text)
        assert (logits(subject) == logits(fresh)).all()


def test_rewind_in_a_batch_is_refused(exported, prompts, generator):
    _, folder = exported()
    subject = generator(folder, batch_size=2)
    subject.append_tokens(np.array(prompts(10, 10), np.int32))
    subject.snapshot_state()
    subject.generate_next_token()
    with pytest.raises(RuntimeError, match="new_length=0 when batch_size > 1"):
        subject.rewind_to(10)


def test_beam_search_is_wrong_with_recurrent_states(exported, prompts, generator):
    """genai moves the KV caches of beams that change places, and not their recurrent states. It says nothing."""
    text, count = prompts(40)[0], 24

    def search(forms):
        model, folder = exported("llama", forms)
        subject = generator(folder, num_beams=4, max_length=40 + count, min_length=40 + count)
        append(subject, text)
        while not subject.is_done():
            subject.generate_next_token()
        ours = subject.get_sequence(0)[40:].tolist()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "early_stopping": True}
        theirs = model.generate(torch.tensor([text]), num_beams=4, **options)[0, 40:].tolist()
        return ours, theirs, model

    ours, theirs, _ = search(None)
    assert ours == theirs
    ours, theirs, model = search((None, "gated_deltanet", "gla", "gated_deltanet"))
    with torch.no_grad():
        scores = [
            model(torch.tensor([text + tokens])).logits[0, 39:-1].log_softmax(-1)[range(count), tokens].sum().item()
            for tokens in (ours, theirs, TorchEngine(model).generate([text], count)[0])
        ]
    beams, expected, greedy_text = scores
    assert expected > greedy_text > beams + 1


def test_engine_is_greedy_whatever_the_folder_asks_for(tmp_path, exported, prompts):
    _, folder = exported()
    shutil.copytree(folder, tmp_path / "onnx")
    path = tmp_path / "onnx" / "genai_config.json"
    config = json.loads(path.read_text())
    config["search"] |= {"num_beams": 4, "do_sample": True, "num_return_sequences": 2}
    path.write_text(json.dumps(config))
    texts = prompts(50, 50)
    ours, _, _ = GenaiEngine(tmp_path / "onnx", "fp32", threads=1).run_batch(texts, 20)
    assert ours == GenaiEngine(folder, "fp32", threads=1).run_batch(texts, 20)[0]
