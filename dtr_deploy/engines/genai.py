"""Stock onnxruntime-genai: the way an exported folder is served. For throughput and for generated text, not for scores."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dtr_deploy.engines.base import Throughput, TokenScores, Workload
from dtr_deploy.engines.ort import CONFIG_FILE, available_cores, check_folder
from dtr_deploy.errors import UsageError


def available() -> tuple[bool, str]:
    """(True, version) or (False, what is missing). Imports nothing heavy."""
    if find_spec("onnxruntime_genai") is None:
        return False, "onnxruntime-genai is not installed (pip install onnxruntime-genai)"
    for name in ("onnxruntime-genai", "onnxruntime-genai-cuda"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return True, f"onnxruntime-genai {importlib.metadata.version(name)}"
    return True, "onnxruntime-genai"


class GenaiEngine:
    """`Engine` over a folder written by `dtr_deploy.export.onnx`, without `score`.

    Args:
        folder: holds model.onnx and genai_config.json; not modified.
        precision: what the folder was exported as; reported, not checked.
        threads: of one operator; `available_cores()` if None.

    Raises UsageError if onnxruntime-genai or a file is missing.
    """

    name = "genai"

    def __init__(self, folder: str | Path, precision: str, *, threads: int | None = None) -> None:
        found, reason = available()
        if not found:
            raise UsageError(reason)
        import onnxruntime_genai

        self.folder = check_folder(folder)
        self.precision = precision
        config = json.loads((self.folder / CONFIG_FILE).read_text())
        self._pad = int(config["model"]["pad_token_id"])
        self._vocabulary = int(config["model"]["vocab_size"])
        self._context = int(config["model"]["context_length"])
        self._genai: Any = onnxruntime_genai
        # No token ends a text. genai's own overlay only adds to a list, so the changed settings lie in a folder of links.
        config["model"]["eos_token_id"] = []
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads or available_cores()
        with tempfile.TemporaryDirectory(prefix="dtr-genai-") as linked:
            for file in self.folder.resolve().iterdir():
                if file.name != CONFIG_FILE:
                    (Path(linked) / file.name).symlink_to(file)
            (Path(linked) / CONFIG_FILE).write_text(json.dumps(config))
            self._model: Any = onnxruntime_genai.Model(linked)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Not offered: genai gives the logits of the last position only. `OrtEngine` scores the same folder."""
        raise UsageError("engine genai does not score prompts; use engine ort on the same folder")

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy, end-of-text ignored. Prompts of one length run as a batch."""
        outputs: list[list[int]] = [[] for _ in prompts]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UsageError("a prompt has no tokens; give each at least one")
            # In a batch genai takes trailing pad tokens for padding, so a prompt that ends in one runs alone.
            alone = i if prompt[-1] == self._pad else -1
            groups.setdefault((len(prompt), alone), []).append(i)
        for indices in groups.values():
            tokens, _, _ = self._generate([list(prompts[i]) for i in indices], max_new_tokens)
            for i, row in zip(indices, tokens, strict=True):
                outputs[i] = row
        return outputs

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        """`concurrency` rows in one batch."""
        random = np.random.default_rng(0)
        ordinary = np.setdiff1d(np.arange(self._vocabulary), [self._pad])
        prefill, decode, whole = [], [], []
        for repeat in range(repeats + 1):
            prompts = random.choice(ordinary, (workload.concurrency, workload.prompt)).tolist()
            # The first run warms caches and the allocator, and counts for nothing.
            output = workload.output if repeat else min(workload.output, 4)
            began = time.perf_counter()
            _, first, rest = self._generate(prompts, output)
            if repeat:
                prefill.append(first)
                decode.append(rest)
                whole.append(time.perf_counter() - began)
        return Throughput(
            self.name,
            self.precision,
            workload,
            repeats,
            statistics.median(prefill),
            statistics.median(decode),
            statistics.median(whole),
        )

    def close(self) -> None:
        self._model = None

    def _generate(self, batch: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
        """Rows of one length -> new tokens, seconds until the first of them, seconds for the others."""
        length = len(batch[0])
        if length + new_tokens > self._context:
            raise UsageError(
                f"{self.folder}: {length} + {new_tokens} tokens are more than its context of {self._context}"
            )
        began = time.perf_counter()
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length + new_tokens, batch_size=len(batch), do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(batch, dtype=np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        rest = time.perf_counter() - first
        return [generator.get_sequence(row)[length:].tolist() for row in range(len(batch))], first - began, rest
