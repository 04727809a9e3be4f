"""The gate as a build and `dtr-deploy verify` run it: from a run's folders alone."""

from __future__ import annotations

import json
from pathlib import Path

from dtr_deploy.engines.torch import TorchEngine
from dtr_deploy.errors import UsageError
from dtr_deploy.parity.ladder import ParityRow, climb, gate
from dtr_deploy.parity.rungs import ladder_of
from dtr_deploy.progress import Progress
from dtr_deploy.recipe import Recipe
from dtr_deploy.run_dir import write_atomically
from dtr_deploy.serving import base_of, hybrid_of

PROMPTS = "parity/prompts.json"
ROWS = "parity/parity.json"


def read_prompts(run: Path) -> list[list[int]]:
    """The token ids that the build compared on."""
    file = run / PROMPTS
    if not file.is_file():
        raise UsageError(f"{file}: is missing; `dtr-deploy build` writes it before the parity gate")
    return json.loads(file.read_text())


def prove(recipe: Recipe, run: Path, prompts: list[list[int]], progress: Progress) -> list[ParityRow]:
    """Climb the whole ladder with the models in `run` and write `parity/parity.json`.

    Raises `ParityFailed` if a rung fails; the file holds every row then too.
    """
    from dtr_deploy.hybrid.backbone import load_backbone
    from dtr_deploy.hybrid.model import load_hybrid

    hybrid, _ = load_hybrid(hybrid_of(run).checkpoint)
    base = load_backbone(str(base_of(run).checkpoint)).model
    rungs = ladder_of(recipe, run, hybrid, max(len(prompt) for prompt in prompts))
    rows = climb(TorchEngine(hybrid), TorchEngine(base), rungs, prompts, progress)
    for row in rows:
        progress.line(f"parity, {row.engine} {row.precision}: {'passed' if row.passed else 'FAILED'}, {row.reason()}")
    write_atomically(run / ROWS, json.dumps([row.to_dict() for row in rows], indent=1).encode())
    gate(rows)
    return rows
