"""How much memory the caches of a workload take: keys and values of full attention, states of linear layers.

What is counted is what the engines hold for a request: their allocators round it up (vLLM to pages of an attention
block, see `dtr_vllm.sizing`), and keep room for other requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch

from dtr_deploy.engines.base import Workload
from dtr_deploy.hybrid.layout import Layout, parse_entry, replaced
from dtr_deploy.hybrid.mixer import form_config
from dtr_kernels.forms import make_form

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cache_dtypes(engine: str, precision: str) -> tuple[torch.dtype, torch.dtype]:
    """(of full attention's keys and values, of a linear layer's rows of them). ONNX Runtime exports with quantized
    weights compute in float32, and linear layers keep their rows in it even where the model is float16."""
    if engine == "vllm":
        return DTYPES[precision], DTYPES[precision]
    return DTYPES.get(precision, torch.float32), torch.float32


@dataclass(frozen=True)
class CacheSize:
    """Layout -> bytes of keys, values and states of all requests of a workload at their longest.

    config: the backbone's. window: of entries that name none. kv_dtype, row_dtype: as `cache_dtypes` says; recurrent
    states are float32.
    """

    config: Any
    window: int
    kv_dtype: torch.dtype
    row_dtype: torch.dtype
    workload: Workload
    _sizes: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, layout: Layout) -> int:
        """Linear layers of a model have states of one size, the largest that any of them needs: both engines ask for
        that."""
        linear = replaced(layout)
        state = max((self.state_bytes(entry) for entry in set(layout) if entry is not None), default=0)
        tokens = self.workload.prompt + self.workload.output
        return self.workload.concurrency * ((len(layout) - linear) * tokens * self.token_bytes + linear * state)

    def padded(self, layout: Layout) -> float:
        """Linear layers whose state is smaller than the largest of the layout: engines make them equal."""
        sizes = [self.state_bytes(entry) for entry in layout if entry is not None]
        return float(sum(size < max(sizes) for size in sizes))

    @cached_property
    def token_bytes(self) -> int:
        """Keys and values of one token in one full-attention layer."""
        sizes = form_config(self.config, 0)
        return 2 * sizes.num_kv_heads * sizes.head_dim * self.kv_dtype.itemsize

    def state_bytes(self, entry: str) -> int:
        """One sequence's state in one layer with this entry."""
        if entry not in self._sizes:
            form, window = parse_entry(entry, self.window)
            with torch.device("meta"):  # only the shapes are wanted
                spec = make_form(form, form_config(self.config, window)).state_spec(self.row_dtype)
            self._sizes[entry] = sum(prod(part.shape) * part.dtype.itemsize for part in spec.values())
        return self._sizes[entry]
