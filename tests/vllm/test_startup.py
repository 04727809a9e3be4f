"""What is settled before an engine starts: refusals, one line each, from vLLM's own configuration; and state dtypes."""

import json

import pytest
import torch

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.config import hybrid_config
from dtr_deploy.hybrid.layout import layer_types
from tests.tiny import tiny_backbone, tiny_hybrid
from tests.vllm.reference import random_prompts

pytestmark = pytest.mark.vllm

LAYOUT = (None, "gla", "gated_deltanet", None)


@pytest.fixture
def configure(serve, tmp_path):
    """Engine options -> vLLM's configuration for a hybrid of which there is a config.json only."""
    from vllm.engine.arg_utils import EngineArgs

    def make(family="llama", **options):
        layout, types = options.pop("forms", LAYOUT), options.pop("layer_types", None)
        config = hybrid_config(tiny_backbone(family, hidden=192).config, LAYOUT, 64)
        values = config.to_dict() | {key: options.pop(key) for key in ("attention_bias",) if key in options}
        values["dtr"]["state_dtype"] = options.pop("state_dtype", "float32")
        values["dtr"]["forms"], values["layer_types"] = list(layout), types or layer_types(layout)
        (tmp_path / "config.json").write_text(json.dumps(values))
        options = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, **options}
        return EngineArgs(model=str(tmp_path), **options).create_engine_config()

    return make


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
            "speculative decoding is not supported",
        ),
        ({"enable_lora": True}, "LoRA is not supported"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connectors .* are not supported",
        ),
        ({"kv_offloading_size": 1.0}, "KV connectors .* are not supported"),
        ({"prefix_match_unit": 32}, "--prefix-match-unit is not supported"),
        ({"use_replayssm": True}, "ReplaySSM is for Mamba2"),
        ({"mamba_ssm_cache_dtype": "float16"}, "a recurrent state in float16 is not supported"),
        ({"mamba_cache_dtype": "float16"}, "a recurrent state in float16 is not supported"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "context parallelism is not supported"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3 does not fit 6 query and 2 kv heads"),
        (
            {"forms": (None, "mamba", "gla", None)},
            r"dtr\.forms\[1\] is 'mamba': accepted are null, gated_deltanet, gla",
        ),
        (
            {"layer_types": ["full_attention"] * 4},
            "layer_types has to be 'linear_attention' where",
        ),
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "on a CPU vLLM prepares pipeline stages only while it compiles: start without --enforce-eager",
        ),
        (
            {"pipeline_parallel_size": 4, "distributed_executor_backend": "mp", "enforce_eager": False},
            r"pipeline stage 0 of 4 \(layers 0 to 0\) has no layer with linear attention",
        ),
        (
            {
                "forms": (None, "gla", "gla", "gla"),
                "pipeline_parallel_size": 2,
                "distributed_executor_backend": "mp",
                "enforce_eager": False,
            },
            r"pipeline stage 1 of 2 \(layers 2 to 3\) has no layer with full attention",
        ),
        ({"family": "qwen3", "attention_bias": True}, "Qwen3 with attention_bias is not supported"),
    ],
)
def test_refusals(configure, options, message):
    with pytest.raises(UsageError, match=message) as refusal:
        configure(**options)
    assert "\n" not in str(refusal.value)


def test_what_is_not_refused_starts(configure):
    options = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    config = configure(enforce_eager=False, **options)
    assert config.model_config.is_hybrid and config.cache_config.mamba_cache_mode == "align"


def test_a_refusal_stops_the_start_of_an_engine(serve):
    model = tiny_hybrid("llama", (None, "gla"), 64, 3, hidden=192)
    with pytest.raises(UsageError, match="LoRA is not supported"), serve(model, enable_lora=True):
        pass


def test_an_adapter_asked_for_at_run_time_is_an_error_and_not_ignored(serve):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    model = tiny_hybrid("llama", (None, "gla"), 64, 3, hidden=192)
    (prompt,) = random_prompts([20], seed=3)
    with serve(model) as served:
        with pytest.raises(VLLMValidationError, match="LoRA is not enabled"):
            served.llm.generate(
                [{"prompt_token_ids": prompt}],
                SamplingParams(max_tokens=2, detokenize=False),
                lora_request=LoRARequest("adapter", 1, "/nowhere"),
                use_tqdm=False,
            )
        assert len(served.greedy([prompt], 2)[0]) == 2  # and the engine lives on


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "float32"),
        ({"state_dtype": "bfloat16"}, "bfloat16"),  # the checkpoint's own
        ({"mamba_cache_dtype": "bfloat16"}, "bfloat16"),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "bfloat16"),
        ({"state_dtype": "bfloat16", "mamba_ssm_cache_dtype": "float32"}, "float32"),
        ({"mamba_cache_dtype": "bfloat16", "mamba_ssm_cache_dtype": "float32"}, "float32"),
    ],
)
@pytest.mark.parametrize("avx512_bf16", [False, True])
def test_vllm_keeps_the_state_dtype_asked_for(monkeypatch, configure, options, expected, avx512_bf16):
    """On CPUs with AVX512-BF16 vLLM sets a state dtype back to float32 for models it has no kernel for."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert configure(**options).cache_config.mamba_ssm_cache_dtype == expected
