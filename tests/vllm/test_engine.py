"""`VllmEngine`: what the search and the parity gate ask of vLLM, over the process boundary."""

import json
import os

import numpy as np
import pytest
import torch

from dtr_deploy.engines.base import Engine, Workload
from dtr_deploy.engines.vllm import VllmEngine, last_error
from dtr_deploy.errors import DtrError, UsageError
from dtr_deploy.hybrid.model import save_hybrid
from tests.tiny import tiny_backbone, tiny_hybrid

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOLERANCE = 1e-3  # as in test_parity.py


@pytest.fixture(scope="module")
def model():
    return tiny_hybrid("llama", (None, "gated_deltanet", "gla"), 64, 3, hidden=192)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    save_hybrid(model, None, folder)
    with VllmEngine(folder, dtype="float32", max_model_len=1024, kv_cache_gib=0.25, threads=1) as engine:
        yield engine


def random_prompts(lengths):
    generator = torch.Generator().manual_seed(23)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]


def test_scores_equal_hugging_face(engine, model):
    assert isinstance(engine, Engine) and (engine.name, engine.precision) == ("vllm", "fp32")
    prompts = random_prompts([1, 2, 65, 400])
    for prompt, scores in zip(prompts, engine.score(prompts), strict=True):
        assert scores.tokens == prompt
        with torch.no_grad():
            reference = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        actual = reference.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()
        assert scores.logprobs.shape == (len(prompt) - 1,) and scores.logprobs.dtype == np.float32
        assert scores.top_ids.shape == scores.top_logprobs.shape == (len(prompt) - 1, 32)
        np.testing.assert_allclose(scores.logprobs, actual, atol=TOLERANCE)
        top = reference.gather(1, torch.tensor(scores.top_ids, dtype=torch.long)).numpy()
        np.testing.assert_allclose(scores.top_logprobs, top, atol=TOLERANCE)
        np.testing.assert_allclose(scores.top_logprobs, reference.topk(32).values.numpy(), atol=TOLERANCE)


def test_generates_what_hugging_face_does(engine, model):
    prompts = random_prompts([1, 64, 200])
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert engine.generate(prompts, 9) == expected


def test_throughput_adds_up(engine):
    measured = engine.throughput(Workload(prompt=200, output=8, concurrency=2), repeats=1)
    assert measured.prefill_seconds > 0 and measured.decode_seconds > 0
    # One repeat: the medians are that run's own parts.
    assert measured.prefill_seconds + measured.decode_seconds == pytest.approx(measured.end_to_end_seconds)
    assert (measured.engine, measured.precision, measured.repeats) == ("vllm", "fp32", 1)


def test_requests_that_do_not_fit_are_refused_and_the_engine_lives_on(engine):
    with pytest.raises(UsageError, match="prompt 1 has 1,020 tokens: with 9 more they do not fit"):
        engine.generate([[5], [5] * 1020], 9)
    with pytest.raises(UsageError, match="prompt 0 is empty"):
        engine.score([[]])
    with pytest.raises(UsageError, match="longer than the engine's max_model_len of 1,024"):
        engine.throughput(Workload(prompt=1000, output=100), repeats=1)
    assert len(engine.generate([[5]], 3)[0]) == 3


def test_layout_is_measured_from_its_config_alone_and_close_ends_the_process(tmp_path):
    """Also an ordinary backbone, and a second close."""
    tiny_backbone("llama", hidden=192).config.save_pretrained(tmp_path)
    engine = VllmEngine(tmp_path, load_format="dummy", max_model_len=512, kv_cache_gib=0.25, threads=1)
    assert engine.throughput(Workload(prompt=100, output=4), repeats=2).tokens_per_second > 0
    pid = engine._process.pid
    engine.close()
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not engine._scratch.exists()


def test_a_start_that_fails_says_why_in_one_line(tmp_path):
    config = tiny_hybrid("llama", (None, "gla"), 64, 3, hidden=192).config.to_dict()
    config["dtr"]["forms"][1] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(config))
    log = tmp_path / "vllm.log"
    with pytest.raises(DtrError, match=r"dtr\.forms\[1\] is 'mamba': accepted are null") as failure:
        VllmEngine(tmp_path, load_format="dummy", max_model_len=512, kv_cache_gib=0.25, threads=1, log=log)
    assert "\n" not in str(failure.value) and str(log) in str(failure.value)
    assert "Traceback" in log.read_text()


def test_wrong_arguments_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json there"):
        VllmEngine(tmp_path)
    with pytest.raises(UsageError, match="dtype 'int4': accepted are float32"):
        VllmEngine(tmp_path, dtype="int4")


def test_last_error_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "(EngineCore pid=7) ERROR 11-24 08:06:07 [core.py:133] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-24 08:06:07 [core.py:133] ValueError: window is -1\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    assert last_error(log) == "ValueError: window is -1"
    log.write_text(
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, dtr_vllm: LoRA is not supported: leave it out [type=value_error, input_value=ArgsKwargs(...\n"
        "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n"
    )
    assert last_error(log) == "ValueError: dtr_vllm: LoRA is not supported: leave it out"
    log.write_text("Killed\n\n")
    assert last_error(log) == "Killed"
