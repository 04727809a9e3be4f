"""What is settled before vLLM starts a process or reads a weight: what is refused, and the recurrent state's dtype."""

from __future__ import annotations

from typing import Any

from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.config import STATE_DTYPES
from dtr_kernels.forms import FORMS


def requested_state_dtype(vllm_config: Any) -> str:
    """Name of the dtype asked for: `--mamba-ssm-cache-dtype`, else `--mamba-cache-dtype`, else dtr.state_dtype."""
    cache = vllm_config.cache_config
    for name in (cache.mamba_ssm_cache_dtype, cache.mamba_cache_dtype):
        if name != "auto":
            return name
    return vllm_config.model_config.hf_config.dtr["state_dtype"]


def settle_state_dtype(vllm_config: Any) -> None:
    """Write the requested dtype where vLLM looks for it.

    On CPUs with AVX512-BF16 vLLM turns an open `--mamba-ssm-cache-dtype` into float32, which would then outrank
    `--mamba-cache-dtype` and the checkpoint.
    """
    vllm_config.cache_config.mamba_ssm_cache_dtype = requested_state_dtype(vllm_config)


def refuse_unsupported(vllm_config: Any) -> None:
    """Stop what would compute wrong tokens, and what nothing here has been tested with.

    Raises:
        UsageError: one line with the first unsupported option found, and what to do instead.
    """
    config = vllm_config.model_config.hf_config
    config.check_dtr()
    for layer, form in enumerate(config.forms):
        if form is not None and form not in FORMS:
            raise UsageError(f"config.json: dtr.forms[{layer}] is {form!r}: accepted are null, {', '.join(FORMS)}")
    if config.model_type == "dtr_qwen3" and config.attention_bias:
        raise UsageError("dtr_vllm: Qwen3 with attention_bias is not supported: vLLM's Qwen3 has no output bias")
    _refuse_features(vllm_config)
    _refuse_parallelism(vllm_config)


def _refuse_features(vllm_config: Any) -> None:
    if vllm_config.speculative_config is not None:
        raise UsageError(
            "dtr_vllm: speculative decoding is not supported, rejected tokens would stay in the state of linear "
            "layers: start without --speculative-config"
        )
    if vllm_config.lora_config is not None:
        raise UsageError(
            "dtr_vllm: LoRA is not supported on hybrids: start without --enable-lora, or merge the adapter into the "
            "backbone before distilling"
        )
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None:
        raise UsageError(
            "dtr_vllm: KV connectors (disaggregated prefill, offloading) are not supported, they would have to move "
            "the state of linear layers too: start without --kv-transfer-config and --kv-offloading-size"
        )
    if vllm_config.cache_config.use_replayssm:
        raise UsageError("dtr_vllm: ReplaySSM is for Mamba2 layers: start without --use-replayssm")
    if vllm_config.cache_config.prefix_match_unit is not None:
        raise UsageError(
            "dtr_vllm: --prefix-match-unit is not supported, prefixes that end inside a block gave wrong tokens: start "
            "without it"
        )
    dtype = requested_state_dtype(vllm_config)
    if dtype not in STATE_DTYPES:
        raise UsageError(
            f"dtr_vllm: a recurrent state in {dtype} is not supported, it does not fit its range: accepted by "
            f"--mamba-ssm-cache-dtype and --mamba-cache-dtype are auto, {', '.join(STATE_DTYPES)}"
        )


def _refuse_parallelism(vllm_config: Any) -> None:
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise UsageError(
            "dtr_vllm: context parallelism is not supported: leave --decode-context-parallel-size and "
            "--prefill-context-parallel-size at 1"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    ranks = parallel.tensor_parallel_size
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise UsageError(
            f"dtr_vllm: --tensor-parallel-size {ranks} does not fit {heads} query and {kv_heads} kv heads: it must "
            "divide the query heads, and divide the kv heads or be a multiple of them"
        )
    if parallel.pipeline_parallel_size > 1:
        _refuse_stages(vllm_config)


def _refuse_stages(vllm_config: Any) -> None:
    """What vLLM 0.32 starts with and then dies of, at the first request or before it."""
    config, stages = vllm_config.model_config.hf_config, vllm_config.parallel_config.pipeline_parallel_size
    if current_platform.is_cpu() and vllm_config.model_config.enforce_eager:
        raise UsageError(
            "dtr_vllm: on a CPU vLLM prepares pipeline stages only while it compiles: start without --enforce-eager, "
            "or with --pipeline-parallel-size 1"
        )
    for stage in range(stages):
        first, end = get_pp_indices(config.num_hidden_layers, stage, stages)
        linear = sum(form is not None for form in config.forms[first:end])
        if any(config.forms) and linear in (0, end - first):
            missing = "linear attention" if linear == 0 else "full attention"
            raise UsageError(
                f"dtr_vllm: pipeline stage {stage} of {stages} (layers {first} to {end - 1}) has no layer with "
                f"{missing}, which vLLM needs in each: choose another --pipeline-parallel-size, or other borders with "
                "VLLM_PP_LAYER_PARTITION"
            )
