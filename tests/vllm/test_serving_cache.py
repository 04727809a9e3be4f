"""`benchmarks.serving_cache`: the load it sends, and the hits it reports where they are known beforehand."""

import pytest

from benchmarks.serving_cache import Load, engine_option, main, possible_rate
from dtr_deploy.hybrid.model import save_hybrid
from tests.tiny import tiny_backbone, tiny_hybrid

pytestmark = pytest.mark.vllm


def test_the_load_shares_prefixes_and_nothing_else():
    load = Load(prefixes=2, prefix_tokens=50, tail_tokens=20, requests=10, wave=4, output_tokens=1, seed=3)
    waves = load.waves()
    assert waves == load.waves() and [len(wave) for wave in waves] == [4, 4, 2]
    prompts = [prompt for wave in waves for prompt in wave]
    assert len({tuple(prompt[:50]) for prompt in prompts}) == 2
    assert len({tuple(prompt[:60]) for prompt in prompts}) == 10
    assert all(60 <= len(prompt) <= 70 for prompt in prompts)
    assert possible_rate(waves, 50) == 8 * 50 / sum(map(len, prompts))


def test_hits_of_base_and_hybrid(serve, tmp_path, capsys):
    """One request after the other, blocks of 128 tokens, a prefix of 300, tails past the border at 384: the base finds
    two blocks from the second request on; the hybrid from the third, since the second one shows where prompts part and
    leaves the state there."""
    save_hybrid(tiny_backbone("llama", hidden=192), None, tmp_path / "base")
    hybrid = tiny_hybrid("llama", (None, "gated_deltanet", "gla", None), 64, 3, hidden=192)
    save_hybrid(hybrid, None, tmp_path / "hybrid")
    load = {"prefixes": 1, "prefix-tokens": 300, "tail-tokens": 200, "requests": 5, "wave": 1, "output-tokens": 2}
    options = [f"--{name}={value}" for name, value in load.items()]
    folders = [str(tmp_path / "base"), str(tmp_path / "hybrid")]
    assert main([*folders, *options, "--dtype", "float32", "--kv-cache-gib", "0.1"]) == 0
    header, base, hybrid = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["checkpoint", "block"]
    assert (base.split()[:2], hybrid.split()[:2]) == ([folders[0], "128"], [folders[1], "128"])
    assert base.split()[3] == f"{4 * 256:,}" and hybrid.split()[3] == f"{3 * 256:,}"


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"serving_cache: {tmp_path}: no config.json there\n"
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--wave", "0"])
    assert capsys.readouterr().err.endswith("argument --wave: 0: accepted are 1 or more\n")
    assert engine_option("a=3") == ("a", 3) and engine_option("a=align") == ("a", "align")
