"""What the linear layers need to know about a step, built once a step and cache group.

vLLM's own `LinearAttentionMetadataBuilder` counts a one-token first prompt as a decode and so reads whatever state the
slot last held. The base class used here keeps first prompts among the prefills, whatever their length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder

from dtr_kernels.pack_plan import PackPlan, pack_plan


@dataclass(frozen=True)
class Prefills:
    """The P prefills of a step. Tensors are on the model's device: nothing is read on the host."""

    cu_seqlens: torch.Tensor
    """[P+1] int32, borders of the sequences among the prefill tokens."""
    start: torch.Tensor
    """[P] int32, tokens of each sequence in its state already, so the position of its first token in this step."""
    slots: torch.Tensor
    """[P] int32, the page of each sequence."""
    plan: PackPlan | None
    """How GPU kernels cut these tokens into chunks, the same in every layer."""


@dataclass
class DtrMetadata(BaseMambaAttentionMetadata):
    """A step's tokens: those of decodes, one a sequence, then those of prefills (first prompts and further chunks)."""

    prefills: Prefills | None = None
    """None in a step that only decodes."""


class DtrMetadataBuilder(BaseMambaAttentionMetadataBuilder[DtrMetadata]):
    metadata_cls = DtrMetadata
    needs_causal_conv1d_metadata = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> DtrMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if metadata.num_prefills == 0:
            return metadata
        first, last = metadata.num_reqs - metadata.num_prefills, metadata.num_reqs
        cu_seqlens, slots = metadata.query_start_loc_p, metadata.state_indices_tensor_p
        assert cu_seqlens is not None and slots is not None
        start = common_attn_metadata.seq_lens[first:last] - cu_seqlens.diff()
        plan = pack_plan(cu_seqlens, metadata.num_prefill_tokens, self.vllm_config.model_config.dtype)
        return replace(metadata, prefills=Prefills(cu_seqlens, start, slots, plan))

    def update_block_table(
        self, metadata: DtrMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> DtrMetadata:
        """The same step for another cache group, whose sequences have other pages."""
        metadata = super().update_block_table(metadata, blk_table, slot_mapping)
        if metadata.prefills is None:
            return metadata
        assert metadata.state_indices_tensor_p is not None
        return replace(metadata, prefills=replace(metadata.prefills, slots=metadata.state_indices_tensor_p))


class DtrBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "DTR_LINEAR"

    @staticmethod
    def get_builder_cls() -> type[DtrMetadataBuilder]:
        return DtrMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True
