"""The cost model's study as a page: calibration, predictions beside measurements, errors."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe
from benchmarks.table import machine_lines
from dtr_deploy.engines.base import Workload
from dtr_deploy.hybrid.layout import counts
from dtr_deploy.progress import seconds_text
from dtr_deploy.run_dir import write_atomically
from dtr_deploy.throughput.measure import AGREEMENT, PATIENCE

if TYPE_CHECKING:
    from benchmarks.studies.cost_model import EngineStudy
    from dtr_deploy.throughput.measure import Comparison

SCHEMA = 1
PLACES = ("half, spread", "half, the first", "half, the last")
"""Layouts of equal counts: what differs between them is noise, or what places cost."""


def write_page(
    out: Path, found: Sequence[EngineStudy], model: str, workload: Workload, repeats: int, small: bool
) -> None:
    """`summary.json` and `cost_model.md` in `out`."""
    environment = describe("cpu", 0)
    engines = [_engine(study) for study in found]
    settings = {"model": model, "workload": workload.to_dict(), "repeats": repeats, "small": small}
    summary = {"schema": SCHEMA, "settings": settings, "environment": environment, "engines": engines}
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
    write_atomically(out / "cost_model.md", _page(summary, str(workload)).encode())


def _command(summary: dict[str, Any]) -> str:
    """What makes the page again, every option that its figures depend on written out."""
    settings, engines = summary["settings"], summary["engines"]
    options = {
        "prompt": settings["workload"]["prompt"],
        "output": settings["workload"]["output"],
        "repeats": settings["repeats"],
    }
    words = ["python", "-m", "benchmarks.studies.cost_model", "--out", "FOLDER"]
    words += [word for engine in engines for word in ("--engines", engine["engine"])]
    if settings["small"]:
        return " ".join([*words, "--small"])
    options = {"model": settings["model"], **options}
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(words)


def _engine(study: EngineStudy) -> dict[str, Any]:
    """One engine's figures: its model, a row for each unseen layout, errors over them, and what was spent."""
    rows = [_row(study, name, comparison) for name, comparison in study.measured.items()]
    errors = {
        part: {"mean": statistics.mean(sizes), "largest": max(sizes)}
        for part in ("speedup", "prefill", "decode")
        for sizes in [[abs(row["error"][part]) for row in rows]]
    }
    places = [study.measured[name].speedup for name in PLACES]
    return {
        "engine": study.engine,
        "precision": study.precision,
        "calibration": study.cost.to_dict(),
        "rows": rows,
        "errors": errors,
        "places": {"speedups": places, "spread": max(places) / min(places) - 1},
        "spent": {"trials": study.trials, "layer_forwards": 0, "seconds": {"throughput": study.seconds}},
    }


def _row(study: EngineStudy, name: str, found: Comparison) -> dict[str, Any]:
    """Speeds over the backbone's (of prefill and decode: seconds, turned over), predicted, measured and the error."""
    ahead, (prefill, decode) = study.cost.predicted(found.layout), study.cost.model.predict(found.layout)
    predicted = {"speedup": ahead.speedup, "prefill": 1 / prefill, "decode": 1 / decode}
    measured = {"speedup": found.speedup, "prefill": 1 / found.prefill_ratio, "decode": 1 / found.decode_ratio}
    return {
        "name": name,
        "layout": list(found.layout),
        "counts": counts(found.layout),
        "predicted": predicted,
        "measured": measured,
        "error": {part: predicted[part] / measured[part] - 1 for part in predicted},
        "standard_error": dict(found.errors),
        "first_token_seconds": {"predicted": ahead.first_token_seconds, "measured": found.hybrid.prefill_seconds},
        "cache_bytes": ahead.cache_bytes,
    }


def _page(summary: dict[str, Any], workload: str) -> str:
    settings = summary["settings"]
    machine = machine_lines(summary["environment"])
    machine[0] = machine[0].split("; ")[0] + f"; {summary['environment']['cores']} cores"
    parts = [
        "# Predicted and measured throughput",
        f"`{_command(summary)}`",
        "\n".join(machine),
        f"Backbone: {settings['model']}, start weights. Workload: {workload}. Every layout and the backbone were open "
        f"at once and timed in turns, in rounds until {settings['repeats']} agreed within {AGREEMENT:.0%}, "
        f"{PATIENCE * settings['repeats']} at most; a figure is the median of the ratios taken within a round. ONNX "
        "Runtime (onnxruntime-genai) computes with all cores, vLLM with all but one. The cost model saw the "
        "layouts of its calibration only; the ones in the tables were measured afterwards.",
    ]
    for engine in summary["engines"]:
        parts += [
            f"## {engine['engine']}, {engine['precision']}",
            _calibration(engine),
            _table(engine),
            _verdict(engine),
        ]
    return "\n\n".join(parts) + "\n"


def _calibration(engine: dict[str, Any]) -> str:
    found = engine["calibration"]
    base = found["base"]
    points = ", ".join(
        f"{entry} at {' and '.join(str(point['replaced']) for point in curve[1:])}"
        for entry, curve in found["curves"].items()
    )
    group = found["group_cost"]["decode"]
    return (
        f"Fitted to {points} layers; checked on a mixture of all ({found['largest_relative_error']:.1%} off). "
        f"Backbone: {base['prefill_seconds']:.2f} s until the first token, {base['decode_seconds']:.2f} s for the "
        "others." + (f" A cache group costs {group:.2%} of the backbone's decoding time." if group else "")
    )


def _table(engine: dict[str, Any]) -> str:
    """Tokens per second over the backbone's: predicted, measured, and the relative error of the prediction."""
    parts = ("speedup", "prefill", "decode")
    header = ["layout", "layers", *("end to end", "prefill", "decode")]
    lines = [header, ["---"] * len(header)]
    for row in engine["rows"]:
        layers = ", ".join(f"{entry} {count}" for entry, count in row["counts"].items())
        cells = [_cell(row, part) for part in parts]
        lines.append([row["name"], layers, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "Tokens per second over the backbone's: predicted / measured ± relative standard error of the measurement "
        f"(error of the prediction):\n\n{table}"
    )


def _cell(row: dict[str, Any], part: str) -> str:
    noise = row["standard_error"].get(part)
    measured = f"{row['measured'][part]:.3f}" + ("" if noise is None else f" ± {noise:.1%}")
    return f"{row['predicted'][part]:.3f} / {measured} ({row['error'][part]:+.1%})"


def _verdict(engine: dict[str, Any]) -> str:
    errors, places, spent = engine["errors"], engine["places"], engine["spent"]
    names = {"speedup": "end to end", "prefill": "prefill", "decode": "decode"}
    means = ", ".join(f"{names[part]} {e['mean']:.1%} (largest {e['largest']:.1%})" for part, e in errors.items())
    return (
        f"Mean relative error over {len(engine['rows'])} layouts: {means}. The same counts in three places (spread, "
        f"the first layers, the last) differ by {places['spread']:.1%}. Spent: {spent['trials']} layouts measured, "
        f"{seconds_text(spent['seconds']['throughput'])} of runs, besides opening engines."
    )
