"""What a build will cost: counts held to transformers' own models and to hand calculations."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtr_deploy.benchmark import median, workloads_of
from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.errors import UsageError
from dtr_deploy.parity.rungs import base_precisions, benchmarked, served_precisions
from dtr_deploy.plan import ModelSizes, check_disk, disk_bytes, make_plan
from dtr_deploy.recipe import load_recipe
from dtr_deploy.run_dir import RunDir
from tests.product.recipes import write_recipe
from tests.tiny import tiny_backbone


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sizes_are_those_of_the_model(family: str) -> None:
    """Biases and QK-norms are left out: less than 2% of any real model."""
    model = tiny_backbone(family)
    sizes = ModelSizes.of(model.config)
    attention = model.model.layers[0].self_attn
    weights = sum(getattr(attention, f"{name}_proj").weight.numel() for name in "qkvo")
    assert sizes.attention == weights and sizes.layers == 4
    assert sizes.embedding == model.get_input_embeddings().weight.numel()
    assert sizes.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))


def test_what_is_served_and_compared(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    assert served_precisions(recipe) == [("ort", "fp32"), ("ort", "int4"), ("vllm", "fp32"), ("vllm", "bf16")]
    assert base_precisions(recipe) == [("ort", "int4"), ("vllm", "bf16")]
    assert benchmarked(recipe) == [("ort", "int4"), ("vllm", "bf16")]
    only_fp32 = load_recipe(write_recipe(tmp_path, "export: {vllm: {dtype: bfloat16}, onnx: {precision: [fp32, int4]}}",
                                         "export: {onnx: {precision: int4}}"))  # fmt: skip
    assert served_precisions(only_fp32) == [("ort", "int4")]


@pytest.mark.parametrize(("native", "served"), [(True, ["fp32", "bf16"]), (False, ["fp32"])])
def test_auto_is_what_the_processor_multiplies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, served: list[str]
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = load_recipe(write_recipe(tmp_path, "dtype: bfloat16", "dtype: auto"))
    assert [precision for engine, precision in served_precisions(recipe) if engine == "vllm"] == served


def test_more_work_costs_more(tmp_path: Path) -> None:
    config = tiny_backbone().config
    usual = make_plan(load_recipe(write_recipe(tmp_path)), config, multiply_flops=1e9)
    assert {stage.stage for stage in usual.stages} == {
        "distill", "throughput curve", "search", "export", "parity", "throughput",
    }  # fmt: skip
    assert usual.twins == 8 and "100,000 tokens, 8 twins (4 layers)" in usual.stages[0].work
    assert usual.seconds == pytest.approx(sum(stage.seconds for stage in usual.stages)) and usual.seconds > 0
    more = make_plan(load_recipe(write_recipe(tmp_path, "tokens: 100_000", "tokens: 200_000")), config, 1e9)
    assert more.stages[0].seconds == pytest.approx(2 * usual.stages[0].seconds)
    exhaustive = make_plan(load_recipe(write_recipe(tmp_path, "racing", "exhaustive")), config, 1e9)
    assert "20 scorings" in exhaustive.stages[2].work  # 8 + 6 + 4 + 2 candidates of two forms
    bounded = make_plan(load_recipe(write_recipe(tmp_path, "racing", "racing, minutes: 0.5")), config, 1e6)
    assert bounded.stages[2].seconds == 30 and "at most 0.5 minutes" in bounded.stages[2].work
    fewer = make_plan(load_recipe(write_recipe(tmp_path, "layers: all", "layers: [1, 2]")), config, 1e9)
    assert fewer.twins == 4 and fewer.disk_bytes < usual.disk_bytes
    asked = "{name: recall, synthetic: needle, lengths: [1024, 4096]}"
    by_lm_eval = make_plan(load_recipe(write_recipe(tmp_path, asked, "{name: a, lm_eval: arc_easy}")), config, 1e9)
    (stage,) = (stage for stage in by_lm_eval.stages if stage.stage == "lm-eval")
    assert stage.work == "the test split of 1 tasks" and stage.seconds > 0


def test_workers_share_twins_and_scorings_and_each_group_has_its_teacher(tmp_path: Path) -> None:
    config = tiny_backbone().config

    def stages(*change: str) -> tuple[dict, int]:
        made = make_plan(load_recipe(write_recipe(tmp_path, *change)), config, 1e9)
        return {stage.stage: stage for stage in made.stages}, made.memory_bytes

    (alone, memory), line = stages(), "tokens: 100_000"
    teacher = 100_000 * 2 * (ModelSizes.of(config).parameters - ModelSizes.of(config).embedding) / 0.5e9
    grouped, less = stages(line, f"{line}, twins_at_once: 3")  # 8 twins: three groups
    assert grouped["distill"].seconds == pytest.approx(alone["distill"].seconds + 2 * teacher) and less < memory

    cluster = "cluster: {address: auto, workers: 4}\nname: small"
    shared, _ = stages("name: small", cluster)
    assert shared["distill"].seconds == pytest.approx(alone["distill"].seconds / 4)
    four, less = stages("name: small", cluster.replace("4}", "4, share_teacher: 1}"))
    assert four["distill"].work.endswith("on 4 workers") and four["search"].work.endswith("on 4 workers")
    assert four["distill"].seconds == pytest.approx(teacher + (alone["distill"].seconds - teacher) / 4)
    assert four["search"].seconds == pytest.approx(alone["search"].seconds / 4) and less < memory
    assert four["parity"].seconds == alone["parity"].seconds
    unknown, _ = stages("name: small", "cluster: auto\nname: small")
    assert unknown["distill"].seconds == alone["distill"].seconds


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    run = RunDir(tmp_path / "run")
    config = tiny_backbone().config
    check_disk(recipe, run, config)
    needed = disk_bytes(recipe, ModelSizes.of(config))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 1}))
    with pytest.raises(UsageError, match="disk too full, the build needs about"):
        check_disk(recipe, run, config)
    (run.path / "distilled").write_bytes(b"x" * 100)  # what is there already need not be written again
    check_disk(recipe, run, config)


def test_workloads_that_do_not_fit_the_context(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    fitting, too_long = workloads_of(recipe, context=8192)
    assert fitting == [Workload(512, 32), Workload(4096, 32), Workload(8000, 32), Workload(4096, 512)] and not too_long
    fitting, too_long = workloads_of(recipe, context=4200)
    assert fitting == [Workload(512, 32), Workload(4096, 32)]
    assert too_long == [Workload(8000, 32), Workload(4096, 512)]


def test_medians_part_by_part() -> None:
    workload = Workload(10, 5)
    runs = [Throughput("ort", "int4", workload, 1, prefill, decode, prefill + decode)
            for prefill, decode in [(1.0, 9.0), (2.0, 1.0), (9.0, 2.0)]]  # fmt: skip
    assert median(runs) == Throughput("ort", "int4", workload, 3, 2.0, 2.0, 10.0)
