"""`linear_attention(backend="triton")`: batches and packs, prefill and single tokens, and what it cannot do."""

import pytest
import torch

from dtr_kernels.operator import available_backends, linear_attention
from dtr_kernels.reference import linear_attention_reference
from tests.kernels.cases import assert_close, narrow, operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize(("rule", "per_key"), [("gated_delta", False), ("gated", True), ("linear", False)])
def test_a_batch_equals_the_token_loop(rule, per_key, length):
    q, k, v, log_decay, beta, state = operands(rule, 2, length, 2, 3, 16, 16, per_key, -0.5, None, 1)
    kwargs = dict(rule=rule, scale=0.4)
    truth, final = linear_attention_reference(q, k, v, log_decay=log_decay, beta=beta, state=state, **kwargs)
    ours = [None if x is None else x.to(DEVICE) for x in narrow((q, k, v, log_decay, beta, state))]
    before = ours[5].clone()
    out, new = linear_attention(*ours[:3], log_decay=ours[3], beta=ours[4], state=ours[5], backend="triton", **kwargs)
    assert_close(out.cpu(), truth, 1e-5)
    assert_close(new.cpu(), final, 1e-5)
    assert torch.equal(ours[5], before)


def test_gradients_are_refused_and_a_cpu_does_not_list_it():
    tensors = narrow(operands("gated_delta", 1, 4, 1, 1, 16, 16, False, -0.5, None, 0))
    q, k, v, log_decay, beta, _ = (x.to(DEVICE) for x in tensors)
    with pytest.raises(ValueError, match="'triton' has no gradient"):
        linear_attention(q.requires_grad_(), k, v, rule="gated_delta", log_decay=log_decay, beta=beta, backend="triton")
    assert "triton" not in available_backends("cpu") and "compiled" not in available_backends("cuda")
