"""States over several calls: padded batches, split prefill, decoding, and stock onnxruntime-genai."""

import json

import numpy as np
import pytest
import torch

from dtr_deploy.engines.base import Workload
from dtr_deploy.engines.genai import GenaiEngine
from dtr_deploy.engines.torch import TorchEngine
from dtr_deploy.errors import UsageError

LENGTHS = (1, 7, 63, 64, 65, 130)
# Reordered float32 sums, as in test_parity.
TOLERANCE = 2e-4
# Plain states, and states that are the larger of what several forms need.
LAYOUTS = pytest.mark.parametrize(
    "forms", ((None, "gated_deltanet", "gla", "gated_deltanet"), (None, "gla", "hedgehog", "jet"))
)


@LAYOUTS
def test_ragged_batch_scores_as_single_prompts(forms, exported, engine, prompts):
    _, folder = exported("qwen2", forms)
    texts = prompts(*LENGTHS)
    together = engine(folder).score(texts)
    for text, score in zip(texts, together, strict=True):
        alone = engine(folder).score([text])[0]
        np.testing.assert_allclose(score.logprobs, alone.logprobs, atol=TOLERANCE)


@LAYOUTS
@pytest.mark.parametrize("window", (0, 2, 64))
def test_decoding_after_a_ragged_batch(window, forms, exported, engine, prompts):
    """The states of a padded row must be those at its last real token."""
    model, folder = exported("qwen3", forms, window)
    texts = prompts(*LENGTHS)
    assert engine(folder).generate(texts, 70) == TorchEngine(model).generate(texts, 70)


@LAYOUTS
@pytest.mark.parametrize("chunk", (1, 2, 5, 64, 100))
def test_prefill_split_over_calls(chunk, forms, exported, engine, prompts):
    _, folder = exported("llama", forms)
    texts = prompts(1, 64, 65, 130)
    whole = engine(folder).score(texts)
    split = engine(folder, prefill_chunk=chunk).score(texts)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)


@LAYOUTS
def test_batch_filled_row_by_row_decodes_alike(forms, exported, engine, prompts):
    _, folder = exported("llama", forms)
    texts = prompts(30, 90, 131)
    assert engine(folder, prefill_chunk=40).generate(texts, 12) == engine(folder).generate(texts, 12)


@LAYOUTS
@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_genai_generates_what_hugging_face_does(family, forms, exported, prompts):
    model, folder = exported(family, forms)
    texts = prompts(1, 64, 130)
    assert GenaiEngine(folder, "fp32", threads=1).generate(texts, 40) == TorchEngine(model).generate(texts, 40)


def test_genai_batch(exported, prompts):
    """genai's own batches and loop; up to where the reference chooses the pad token, which the engine holds back."""
    model, folder = exported()
    texts = prompts(70, 70, 70)
    tokens, _, _ = GenaiEngine(folder, "fp32", threads=1).run_batch(texts, 20)
    for ours, theirs in zip(tokens, TorchEngine(model).generate(texts, 20), strict=True):
        end = theirs.index(0) if 0 in theirs else 20
        assert end > 0
        assert ours[:end] == theirs[:end]


@LAYOUTS
def test_genai_runs_a_model_without_a_window(forms, exported, prompts):
    model, folder = exported("llama", forms, 0)
    texts = prompts(70)
    assert GenaiEngine(folder, "fp32", threads=1).generate(texts, 20) == TorchEngine(model).generate(texts, 20)


def test_genai_continues_a_text(exported, prompts):
    """append_tokens after a generation (a chat's next turn), against one forward over all of it."""
    import onnxruntime_genai

    model, folder = exported()
    first, second = prompts(50, 30)
    genai_model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(genai_model)
    parameters.set_search_options(max_length=200, do_sample=False)
    generator = onnxruntime_genai.Generator(genai_model, parameters)
    generator.append_tokens(np.array([first], np.int32))
    for _ in range(5):
        generator.generate_next_token()
    generator.get_logits()  # computes the last token, which genai else drops from the states, a backbone's too
    generator.append_tokens(np.array([second], np.int32))
    history = generator.get_sequence(0).tolist()
    assert len(history) == 85
    with torch.no_grad():
        expected = model(torch.tensor([history])).logits[0, -1].log_softmax(-1)
    actual = torch.from_numpy(generator.get_logits()[0, -1]).log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_quantized_folder_runs_under_genai(exported, engine, prompts):
    """Same folder, two programs, the same kernels."""
    _, folder = exported(precision="int4")
    texts = prompts(70)
    ours = engine(folder, "int4").generate(texts, 4)
    assert GenaiEngine(folder, "int4", threads=1).generate(texts, 4) == ours


@pytest.mark.parametrize("make", (lambda f: GenaiEngine(f, "fp32", threads=1), None), ids=("genai", "ort"))
def test_throughput(make, exported, engine):
    _, folder = exported()
    subject = make(folder) if make else engine(folder)
    result = subject.throughput(Workload(prompt=40, output=6, concurrency=2), repeats=2)
    assert result.workload == Workload(40, 6, 2)
    assert 0 < result.prefill_seconds < result.end_to_end_seconds
    assert 0 < result.decode_seconds < result.end_to_end_seconds


def test_genai_refuses_to_score(exported):
    _, folder = exported()
    with pytest.raises(UsageError, match="engine ort"):
        GenaiEngine(folder, "fp32", threads=1).score([[1, 2]])


def test_folder_without_a_model(tmp_path, engine):
    with pytest.raises(UsageError, match=r"model\.onnx"):
        engine(tmp_path)


def test_genai_leaves_the_folder_as_it_is(exported):
    _, folder = exported()
    before = json.loads((folder / "genai_config.json").read_text())
    GenaiEngine(folder, "fp32", threads=1).close()
    assert json.loads((folder / "genai_config.json").read_text()) == before
