"""The state page of a sequence: sizes on this rank, dtypes, and where each part lies.

Every linear layer keeps its state in one page of the same size, seen by vLLM as a row of bytes. Different shapes per
form or window would multiply vLLM's KV-cache groups, and each group costs a metadata build in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from dtr_kernels.forms import Form, FormConfig, make_form
from dtr_vllm.startup import requested_state_dtype

ALIGNMENT = 64  # bytes: a cache line, and more than any vector load needs


def local_sizes(config: Any, window: int, tensor_parallel_size: int) -> FormConfig:
    """Sizes of a form with a softmax window of `window` tokens on one tensor-parallel rank of a hybrid.

    vLLM's rule for heads: kv heads are split over the ranks, or repeated when there are more ranks than kv heads.
    """
    return FormConfig(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads // tensor_parallel_size,
        num_kv_heads=max(1, config.num_key_value_heads // tensor_parallel_size),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        window=window,
    )


def recurrent_dtype(form: Form, vllm_config: VllmConfig) -> torch.dtype:
    """dtype the recurrent state is stored in; it is computed in float32 whatever this is.

    `requested_state_dtype` decides. A form whose state is a plain sum (rule "linear") keeps float32 always: nothing
    decays, and bfloat16, with 8 bits, would stop counting after some hundreds of tokens.
    """
    if form.rule == "linear":
        return torch.float32
    return STR_DTYPE_TO_TORCH_DTYPE[requested_state_dtype(vllm_config)]


@dataclass(frozen=True)
class StatePage:
    """Where each part of one sequence's state lies in a layer's page of bytes."""

    parts: dict[str, tuple[int, tuple[int, ...], torch.dtype]]  # name -> (offset in bytes, shape, dtype)
    size: int  # bytes

    @classmethod
    def of(cls, form: Form, vllm_config: VllmConfig) -> StatePage:
        """Lay out the parts of `form.state_spec` one after another, each on an aligned offset.

        Rows of keys and values (window, convolution) are kept in the model's dtype, the recurrent state in
        `recurrent_dtype`.
        """
        parts, offset = {}, 0
        for name, spec in form.state_spec(vllm_config.model_config.dtype).items():
            dtype = recurrent_dtype(form, vllm_config) if name == "recurrent" else spec.dtype
            parts[name] = (offset, tuple(spec.shape), dtype)
            size = prod(spec.shape) * dtype.itemsize
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(parts, offset)

    def views(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views [S, *shape] into pages [S, bytes] int8, which they share memory with."""
        views = {}
        for name, (offset, shape, dtype) in self.parts.items():
            part = pages[:, offset : offset + prod(shape) * dtype.itemsize]
            views[name] = part.view(dtype).unflatten(1, shape)
        return views


def page_size(vllm_config: VllmConfig) -> int:
    """Bytes of one sequence's state in one linear layer, the largest over the forms and windows of the checkpoint."""
    config = vllm_config.model_config.hf_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    with torch.device("meta"):  # only the shapes are wanted
        forms = [
            make_form(entry.form, local_sizes(config, entry.window, ranks))
            for entry in set(config.entries)
            if entry is not None
        ]
    return max((StatePage.of(form, vllm_config).size for form in forms), default=0)
