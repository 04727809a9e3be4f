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


@dataclass(frozen=True)
class Prefills:
    """The P prefills of a step. Tensors are on the host, because the prefill operators loop over sequences."""

    cu_seqlens: torch.Tensor
    """[P+1] int32, borders of the sequences among the prefill tokens."""
    start: torch.Tensor
    """[P] int32, tokens of each sequence in its state already, so the position of its first token in this step."""
    slots: torch.Tensor
    """[P] int32, the page of each sequence."""


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
        start, cu_seqlens = self._prefill_cpu_metadata(
            common_attn_metadata, metadata.num_reqs, metadata.num_prefills, metadata.num_decode_tokens
        )
        return replace(metadata, prefills=Prefills(cu_seqlens, start, _host_slots(metadata)))

    def update_block_table(
        self, metadata: DtrMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> DtrMetadata:
        """The same step for another cache group, whose sequences have other pages."""
        metadata = super().update_block_table(metadata, blk_table, slot_mapping)
        if metadata.prefills is None:
            return metadata
        return replace(metadata, prefills=replace(metadata.prefills, slots=_host_slots(metadata)))


def _host_slots(metadata: DtrMetadata) -> torch.Tensor:
    """On a GPU this waits for the device: once a step and group, and only in steps that prefill."""
    assert metadata.state_indices_tensor_p is not None
    return metadata.state_indices_tensor_p.cpu()


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
