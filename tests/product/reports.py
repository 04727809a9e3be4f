"""A report with made-up figures, one row of everything."""

from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.report.schema import (
    BackboneRow,
    DistillRow,
    LayerRow,
    LmEvalReportRow,
    ParityReportRow,
    Report,
    ScoreRow,
    SearchSummary,
    TaskRow,
    ThroughputRow,
)


def throughput(prefill: float, decode: float, workload: Workload) -> Throughput:
    return Throughput("ort", "int4", workload, 3, prefill, decode, prefill + decode)


def small_report() -> Report:
    workload = Workload(4096, 512, 2)
    controls = {"no_op": 1.0, "window_only": 0.4}
    return Report(
        recipe={"name": "small", "window": 64},
        backbone=BackboneRow(spec="package:some", family="llama", layers=4, parameters=1000, fingerprint="ab"),
        layout=[LayerRow(layer=layer, form="gla" if layer else None) for layer in range(4)],
        distill=[
            DistillRow(
                layer=1,
                form="gla",
                relative_error=0.2,
                cosine=0.9,
                start_relative_error=0.7,
                start_cosine=0.6,
                controls=controls,
            )
        ],
        scores={
            "search": ScoreRow(base=0.86, hybrid=0.85, ci=(-0.03, 0.01), tasks={"recall": TaskRow(base=1, hybrid=0.9)})
        },
        throughput=[ThroughputRow.compare(throughput(8, 20, workload), throughput(4, 10, workload), target=True)],
        parity=[
            ParityReportRow(
                engine="vllm",
                precision="bf16",
                prompts=64,
                tokens=1000,
                max_abs_dlogprob=0.01,
                mean_kl=1e-4,
                base_kl=2e-4,
                greedy_agreement=0.99,
                limit=3e-4,
                passed=True,
            )
        ],
        lm_eval=[
            LmEvalReportRow(task="arc_easy", documents=40, ours=0.5, lm_eval=0.525, standard_error=0.08, passed=True)
        ],
        search=SearchSummary(strategy="racing", trials=10, layer_forwards=100, seconds=60.0),
        environment={"hardware": {"processor": "P", "cores": 2, "gpus": []}},
        seconds={"distill": 600.0, "search": 61.0},
    )
