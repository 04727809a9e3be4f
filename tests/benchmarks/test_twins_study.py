"""The twins study on a tiny random model: its whole path, resumed; its figures are worth nothing there."""

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from benchmarks.studies.small_model import small_backbone
from benchmarks.studies.twin_variants import StudentPrefix
from benchmarks.studies.twins import app
from dtr_deploy.distill.teacher import attention_activations
from dtr_deploy.hybrid.model import make_hybrid


def test_every_variant_is_trained_scored_and_kept(tmp_path: Path) -> None:
    command = ["--out", str(tmp_path), "--small", "--threads", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["variant"]: row for row in summary["rows"]}
    assert list(rows) == [
        "base", "no-op", "window only", "form only", "form + window", "+ calibration", "+ student prefix",
        "+ heal", "+ heal of the layout",
    ]  # fmt: skip
    assert rows["base"]["scores"]["0"]["kl"] == 0.0
    (count,) = rows["no-op"]["scores"]
    assert int(count) >= 2 and len(rows["base"]["kept"][count]) == 4 - int(count)
    assert rows["no-op"]["error"] == 1.0
    assert all(row["scores"][count]["kl"] > 0 for name, row in rows.items() if name != "base")
    assert rows["+ heal"]["error"] != rows["+ calibration"]["error"] != rows["+ student prefix"]["error"]
    assert rows["+ heal of the layout"]["error"] is None
    kl = {name: row["scores"][count]["kl"] for name, row in rows.items() if name != "base"}
    assert len(set(kl.values())) == len(kl)
    assert rows["+ calibration"]["checkpoints"]["twins"] == 4
    page = (tmp_path / "twins.md").read_text()
    assert f"{count} layers replaced, attention kept in" in page and "| all |" in page and "no-op" in page
    assert "of 4 had their lowest error before the end" in page

    scores = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json") if path.name != "summary.json"}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert scores == {path: path.stat().st_mtime_ns for path in scores}
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == summary["rows"]

    fewer = CliRunner().invoke(app, [*command, "--all-up-to", "1000"])
    assert fewer.exit_code == 0, fewer.output
    left = [row["variant"] for row in json.loads((tmp_path / "summary.json").read_text())["rows"]]
    assert left == [name for name in rows if name not in ("+ student prefix", "+ heal of the layout")]

    layouts = json.loads((tmp_path / "layouts.json").read_text())["layouts"]
    more = CliRunner().invoke(app, [*command, "--tokens", "1024", "1100", "--all-up-to", "0"])
    assert more.exit_code == 0, more.output
    assert json.loads((tmp_path / "layouts.json").read_text())["layouts"] == layouts
    assert not (tmp_path / "1100" / "layouts.sqlite").exists(), "one search for all budgets"


@torch.no_grad()
def test_a_student_prefix_hands_on_what_a_hybrid_does() -> None:
    backbone, layout = small_backbone().model, ("gated_deltanet", None, "gated_deltanet", None)
    hybrid = make_hybrid(backbone, layout, 16)
    mixers = {(layer, "gated_deltanet"): hybrid.model.layers[layer].self_attn for layer in (0, 2)}
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out}))
        for index, layer in enumerate(hybrid.model.layers)
    ]
    tokens = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    hybrid.model(tokens, use_cache=False)
    for hook in hooks:  # the norms are the backbone's own
        hook.remove()

    prefix = StudentPrefix(backbone, "gated_deltanet")
    late, early = prefix(tokens, mixers, 0.5), prefix(tokens, mixers, 0.4)
    teacher = attention_activations(backbone, tokens, [0, 2])
    assert sorted(late.inputs) == sorted(late.outputs) == [0, 2]
    for layer in (0, 2):
        torch.testing.assert_close(late.inputs[layer], seen[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(early.inputs[layer], teacher.inputs[layer])
    torch.testing.assert_close(late.outputs[0], teacher.outputs[0], atol=1e-5, rtol=1e-5)
    assert (late.inputs[2] - teacher.inputs[2]).abs().max() > 1e-3


def test_a_count_the_model_does_not_have_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--out", str(tmp_path), "--small", "--replaced", "4"])
    assert done.exit_code == 1 and "--replaced" in done.output and "Traceback" not in done.output
