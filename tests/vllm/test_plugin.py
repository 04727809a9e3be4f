"""The plugin's own parts, without an engine: versions, the state page, sharding."""

from types import SimpleNamespace

import pytest
import torch

import dtr_vllm
from dtr_deploy.hybrid.config import hybrid_config
from dtr_kernels.conv import dynamic_conv
from dtr_kernels.forms import FORMS, FormConfig, make_form
from dtr_kernels.operator import linear_attention
from dtr_kernels.window import window_attention
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.vllm

SIZES = FormConfig(192, 6, 2, 32, window=64)


def vllm_config(model_config=None, **changes):
    """As much of a VllmConfig as the plugin reads."""
    config = model_config or hybrid_config(tiny_backbone("llama", hidden=192).config, (None, "gla", "gla", None), 64)
    cache = {"mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto"}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, dtype=changes.get("dtype", torch.bfloat16)),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(**{k: changes.get(k, v) for k, v in cache.items()}),
    )


def test_register_twice_and_names_only():
    from transformers import AutoConfig
    from vllm import ModelRegistry

    dtr_vllm.register()
    dtr_vllm.register()
    assert set(dtr_vllm.ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())
    for family in ("llama", "qwen2", "qwen3"):
        assert AutoConfig.for_model(f"dtr_{family}").model_type == f"dtr_{family}"


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.1rc1", True),
        ("0.32.0+cpu", True),
        ("0.33.0", False),
        ("0.3.2", False),
        ("0.320", False),
    ],
)
def test_supported_versions(version, supported):
    assert dtr_vllm.is_supported_vllm(version) is supported


def test_another_vllm_is_refused_when_a_hybrid_is_loaded(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    dtr_vllm.register()  # other models in the same environment are none of our business
    with pytest.raises(ImportError, match=r"0\.32\.x, but vLLM 0\.33\.0 is installed"):
        _ = dtr_vllm.DtrLlamaForCausalLM


@pytest.mark.parametrize(
    ("ssm", "mamba", "expected"),
    [
        ("auto", "auto", torch.float32),  # the checkpoint's own
        ("auto", "bfloat16", torch.bfloat16),
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "bfloat16", torch.float32),  # the narrower flag decides
    ],
)
def test_dtype_flags_of_the_recurrent_state(serve, ssm, mamba, expected):
    from dtr_vllm.layout import recurrent_dtype

    config = vllm_config(mamba_ssm_cache_dtype=ssm, mamba_cache_dtype=mamba)
    form_dtypes = {name: recurrent_dtype(make_form(name, SIZES), config) for name in FORMS}
    # A sum over all tokens cannot be kept in 8 bits.
    assert form_dtypes == dict.fromkeys(FORMS, expected) | {"hedgehog": torch.float32}


def test_state_page_views_are_apart_and_share_the_page(serve):
    """Writing one part of one slot changes that part alone, also when vLLM pads the page."""
    from dtr_vllm.layout import ALIGNMENT, StatePage, page_size

    config = vllm_config(mamba_ssm_cache_dtype="float32")
    form = make_form("gated_deltanet", SIZES)
    page = StatePage.of(form, config)
    assert page.size == page_size(config) == 2 * 32 * 32 * 4 + 2 * (64 * 2 * 32 * 2)
    assert all(offset % ALIGNMENT == 0 for offset, _, _ in page.parts.values())

    padded = torch.zeros(5, page.size + 4096, dtype=torch.int8)
    views = page.views(padded)
    assert {name: (tuple(view.shape), view.dtype) for name, view in views.items()} == {
        "recurrent": ((5, 2, 32, 32), torch.float32),
        "window_k": ((5, 64, 2, 32), torch.bfloat16),
        "window_v": ((5, 64, 2, 32), torch.bfloat16),
    }
    for slot, (name, view) in enumerate(views.items(), start=1):
        view[slot] = 1
        assert all(other.sum() == 0 for key, other in views.items() if key != name and key not in list(views)[:slot])
    assert padded[0].count_nonzero() == 0 and padded[4].count_nonzero() == 0
    assert padded[:, page.size :].count_nonzero() == 0


def test_pages_are_as_large_as_the_largest_form_needs(serve):
    from dtr_vllm.layout import StatePage, page_size

    config = vllm_config(hybrid_config(tiny_backbone("llama", hidden=192).config, (None, "jet", "hedgehog", "gla"), 64))
    window, rows = 2 * (64 * 2 * 32 * 2), 3 * 2 * 32 * 2
    sizes = {name: StatePage.of(make_form(name, SIZES), config).size for name in FORMS}
    assert sizes == {
        "gla": 2 * 32 * 32 * 4 + window,
        "gated_deltanet": 2 * 32 * 32 * 4 + window,
        "jet": 2 * 32 * 32 * 4 + rows + window,
        "hedgehog": 2 * 64 * 33 * 4 + window,
    }
    assert page_size(config) == sizes["hedgehog"]


@pytest.mark.parametrize(("kv_heads", "ranks"), [(2, 2), (4, 2), (2, 4), (1, 4)])
@pytest.mark.parametrize("name", FORMS)
def test_tensor_parallel_ranks_together_are_the_whole_form(serve, monkeypatch, name, kv_heads, ranks):
    """Each rank loads its heads (kv heads repeated when there are more ranks) and computes that part of the output."""
    from dtr_vllm import mixer

    heads, dim, hidden_size, tokens = 8, 32, 48, 40
    whole = make_form(name, FormConfig(hidden_size, heads, kv_heads, dim, window=16))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    q = torch.randn(1, tokens, heads, dim)
    k, v = torch.randn(2, 1, tokens, kv_heads, dim)
    hidden = torch.randn(1, tokens, hidden_size)

    def run(form, q, k, v):
        taps = form.taps(hidden)
        o = form.operands(q, k, v if taps is None else dynamic_conv(v, taps)[0], hidden)
        out, _ = linear_attention(o.q, o.k, o.v, rule=form.rule, log_decay=o.log_decay, beta=o.beta, scale=form.scale)
        return window_attention(q, k, v, window=16, rest=form.rest(form.readout(out, hidden)))[0]

    parts = []
    local_heads, local_kv = heads // ranks, max(1, kv_heads // ranks)
    for rank in range(ranks):
        monkeypatch.setattr(mixer, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(mixer, "get_tensor_model_parallel_world_size", lambda: ranks)
        form = make_form(name, FormConfig(hidden_size, local_heads, local_kv, dim, window=16))
        mixer.shard_form_weights(form, kv_heads)
        weights = dict(whole.named_parameters())
        for key, parameter in form.named_parameters():
            getattr(parameter, "weight_loader", mixer.default_weight_loader)(parameter, weights[key].detach())
        q_part = slice(rank * local_heads, (rank + 1) * local_heads)
        first_kv = rank * kv_heads // ranks
        kv_part = slice(first_kv, first_kv + local_kv)
        parts.append(run(form, q[:, :, q_part], k[:, :, kv_part], v[:, :, kv_part]))
    # The same sums in the same order; only the shapes of the matrix products differ.
    torch.testing.assert_close(torch.cat(parts, 2), run(whole, q, k, v), rtol=1e-4, atol=1e-4)
