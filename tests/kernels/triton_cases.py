"""Ragged packs for the Triton kernels and the truth they are held to: the float64 token loop, sequence by sequence."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from dtr_kernels.reference import linear_attention_reference
from tests.kernels.cases import assert_close, operands

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# rule, decay per key dimension
RULE_DECAYS = [
    ("linear", False), ("gated", False), ("gated", True), ("delta", False), ("gated_delta", False),
    ("gated_delta", True),
]  # fmt: skip
# float32: rounding of at most a few hundred steps of products of unit scale; bfloat16: one rounding of operands, state
# and output each; float16 inputs are rounded to bfloat16 first.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-2}


@dataclass(frozen=True)
class Pack:
    """Tokens of R sequences in float64 (already rounded to the inputs' dtype) and a pool of 8 slots, all on DEVICE."""

    rule: str
    lengths: list[int]
    slots: list[int]
    initial: list[bool]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    beta: torch.Tensor | None
    pool: torch.Tensor
    dtype: torch.dtype
    scale: float = 0.4

    @property
    def borders(self):
        return [0, *accumulate(self.lengths)]

    def inputs(self):
        """Keyword arguments of the launchers, without borders and initial flags."""
        narrow = lambda x, dtype: None if x is None else x.to(dtype)  # noqa: E731
        return dict(
            q=narrow(self.q, self.dtype), k=narrow(self.k, self.dtype), v=narrow(self.v, self.dtype), rule=self.rule,
            log_decay=narrow(self.log_decay, torch.float32), beta=narrow(self.beta, torch.float32), scale=self.scale,
            pool=self.pool.clone(), slots=torch.tensor(self.slots, device=DEVICE, dtype=torch.int32),
        )  # fmt: skip

    def packing(self):
        return dict(
            cu_seqlens=torch.tensor(self.borders, device=DEVICE, dtype=torch.int32),
            has_initial_state=torch.tensor(self.initial, device=DEVICE),
        )

    def truth(self):
        """Outputs [N,Hq,Dv] and the pool, float64."""
        out = torch.zeros(*self.q.shape[:2], self.v.shape[2], dtype=torch.float64, device=DEVICE)
        pool = self.pool.double()
        for r, slot in enumerate(self.slots):
            a, b = self.borders[r], self.borders[r + 1]
            if slot <= 0 or a == b:
                continue
            cut = [None if x is None else x[None, a:b] for x in (self.q, self.k, self.v, self.log_decay, self.beta)]
            start = pool[slot] if self.initial[r] else torch.zeros_like(pool[slot])
            y, final = linear_attention_reference(
                *cut[:3], rule=self.rule, log_decay=cut[3], beta=cut[4], scale=self.scale, state=start[None]
            )
            out[a:b], pool[slot] = y[0], final[0]
        return out, pool

    def check(self, out, pool):
        """Outputs and states against the truth; slots that no sequence has are untouched, null slots give zeros."""
        truth, states = self.truth()
        tolerance = TOLERANCE[self.dtype]
        if len(out):
            assert_close(out, truth, tolerance)
        assert_close(pool, states, 1e-2 if pool.dtype == torch.bfloat16 else tolerance)
        for slot in set(range(len(pool))) - set(self.slots) | {0}:
            assert torch.equal(pool[slot], self.pool[slot])
        for r, slot in enumerate(self.slots):
            if slot <= 0:
                assert not out[self.borders[r] : self.borders[r + 1]].any()

    def with_decays(self, log_decay, beta):
        return replace(self, log_decay=log_decay, beta=beta)


def pack(
    rule, per_key, lengths, *, slots=None, initial=None, kv_heads=2, group=3, key_dim=24, value_dim=17, decay=-0.3,
    beta=None, dtype=torch.float32, pool_dtype=torch.float32, seed=0,
):  # fmt: skip
    q, k, v, log_decay, strength, _ = operands(
        rule, 1, sum(lengths), kv_heads, group, key_dim, value_dim, per_key, decay, beta, seed
    )
    pool = torch.randn(8, kv_heads, key_dim, value_dim, generator=torch.Generator().manual_seed(seed)).to(pool_dtype)
    at = lambda x, dtype: None if x is None else x[0].to(dtype).double().to(DEVICE)  # noqa: E731
    return Pack(
        rule, lengths, slots or [6, 2, 5, 1, 3, 7, 4][: len(lengths)], initial or [True] * len(lengths),
        at(q, dtype), at(k, dtype), at(v, dtype), at(log_decay, torch.float32), at(strength, torch.float32),
        pool.to(DEVICE), dtype,
    )  # fmt: skip


def huge_pool(kv_heads, key_dim, value_dim):
    """A pool and a slot of it whose first element lies past 2^31. Its memory is never touched but for that slot's.

    As much memory lies before the pool, so that an offset that wraps around to -2^31 reads what is not the slot.
    """
    stride, slot = 1 << 16, (1 << 15) + 1
    size = kv_heads * key_dim * value_dim
    storage = torch.empty(2 * slot * stride + size, dtype=torch.bfloat16, device=DEVICE)
    strides = (stride, key_dim * value_dim, value_dim, 1)
    pool = storage.as_strided((slot + 1, kv_heads, key_dim, value_dim), strides, slot * stride)
    pool[slot] = torch.randn(kv_heads, key_dim, value_dim).to(torch.bfloat16)
    return pool, slot
