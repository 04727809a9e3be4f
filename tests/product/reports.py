"""A report with made-up figures, one row of everything."""

from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.report.schema import (
    BackboneRow,
    DistillRow,
    LayerRow,
    LmEvalReportRow,
    MemoryRow,
    ParityReportRow,
    Report,
    ScoreRow,
    SearchSummary,
    TaskRow,
    ThroughputRow,
)


def throughput(prefill: float, decode: float, workload: Workload) -> Throughput:
    return Throughput("ort", "int4", workload, 3, prefill, decode, prefill + decode)


def full_report() -> Report:
    """`small_report` with what a search leaves, twins of two forms, several prompts and engines, and memory."""
    report = small_report()
    names = ("gla", "gated_deltanet")
    report.distill = [
        report.distill[0].model_copy(update={"layer": layer, "form": form, "relative_error": 0.01 * (7 * layer + n)})
        for layer in range(1, 4)
        for n, form in enumerate(names, start=1)
    ]
    swaps = [
        {"layer": row.layer, "form": row.form, "kl": 0.011 * row.layer, "recall": 0.13 * row.layer, "margin": None}
        for row in report.distill
    ]

    def visit(replaced: int, score: float, passes: bool) -> dict[str, object]:
        loss = round(0.86 - score, 3)
        interval = [loss - 0.02, loss + 0.03] if replaced else None
        speedup = 1 + 0.31 * replaced
        return dict(replaced=replaced, score=score, loss=loss, interval=interval, speedup=speedup, passes=passes)

    kept, failed = visit(3, 0.85, True), visit(4, 0.79, False)
    steps = [
        {"action": "base", "score": 0.86},
        {"action": "rank", "ranking": [], "swaps": swaps},
        {"action": "commit", "changes": [[1, "gla"], [2, "gla"], [3, "gla"]], **kept},
        {"action": "reject", "changes": [[0, "gla"]], **failed},
        {"action": "confirm", **kept},
    ]
    assert report.search is not None
    report.search.steps, report.search.speedup = steps, 1.87
    report.search.frontier = [visit(0, 0.86, True), kept, failed]
    report.scores["test"] = report.scores["search"].model_copy(update={"hybrid": 0.84, "ci": (-0.06, 0.02)})
    for prompt in (512, 2048):
        for engine, precision in (("vllm", "bf16"), ("genai", "int4")):
            workload = Workload(prompt, 64)
            base, hybrid = (
                Throughput(engine, precision, workload, 3, prompt / rate, 63 / rate, (prompt + 63) / rate)
                for rate in (prompt / 7, prompt / 5)
            )
            report.throughput.append(ThroughputRow.compare(base, hybrid))
    report.parity.append(report.parity[0].model_copy(update={"engine": "genai", "passed": False, "mean_kl": 0.004}))
    report.memory = [
        MemoryRow(engine="ort", precision="int4", tokens=n, base_bytes=4096 * n, hybrid_bytes=1024 * n + 99_000)
        for n in (512, 1024, 2048)
    ]
    return report


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
