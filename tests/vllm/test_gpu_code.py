"""What the plugin runs on a GPU, in Triton's interpreter: the Triton kernels inside the custom operator, and nothing in
it that would make a GPU wait for the host."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtr_kernels.compiled.library import disabled
from tests.tiny import tiny_hybrid

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-3  # as in test_parity.py
# Their result, or its shape, has to be known on the host.
SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


class NoSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in SYNCHRONISING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu_code(monkeypatch):
    """Counts calls of the Triton entry points, which are taken as if tensors were on a GPU."""
    if torch.cuda.is_available():
        pytest.fail("on a GPU the engine itself runs this code: point this test at it")
    from dtr_kernels import operator, pack_plan, triton, window
    from dtr_kernels.forms import base, gated_deltanet
    from dtr_vllm import mixer
    from dtr_vllm.mixer import LinearMixer

    calls = dict.fromkeys(
        (
            "linear_attention_prefill", "window_attention_prefill",
            "linear_attention_decode", "window_attention_decode", "mixer_step",
        ),
        0,
    )  # fmt: skip

    def counted(name):
        run = getattr(triton, name)

        def call(*args, **kwargs):
            calls[name] += 1
            if name.endswith("prefill"):
                assert kwargs["plan"] is not None, "the plan is made once a step, not in every layer"
            return run(*args, **kwargs)

        return call

    for module in (operator, pack_plan, window, base, gated_deltanet, mixer):
        monkeypatch.setattr(module, "on_gpu", lambda *tensors: True)
    for name in calls:
        monkeypatch.setattr(triton, name, counted(name))
    mix = LinearMixer.mix

    def watched(*args):
        with NoSynchronisation():
            mix(*args)

    monkeypatch.setattr(LinearMixer, "mix", watched)
    return calls


@pytest.mark.parametrize("form", ["gated_deltanet", "gla", "jet", "hedgehog"])
def test_triton_kernels_in_the_engine(serve, gpu_code, hugging_face_distributions, form):
    """A ragged batch in chunks of 48 tokens: prefills that begin and that go on, and decodes beside them."""
    model = tiny_hybrid("llama", (None, form, form), 32, 3, hidden=192)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 33, 70)]
    with disabled(), serve(model, max_num_batched_tokens=48) as served:
        results = served.distributions(prompts, 4)
    for tokens, ours in results:
        assert np.abs(ours - hugging_face_distributions(model, tokens)).max() <= TOLERANCE
    # Forms whose gates depend on the input alone decode in one function, which calls its kernels itself.
    apart = {"linear_attention_decode", "window_attention_decode"}
    used = gpu_code.keys() - ({"mixer_step"} if form == "hedgehog" else apart)
    assert {name for name, calls in gpu_code.items() if calls} == used, gpu_code
