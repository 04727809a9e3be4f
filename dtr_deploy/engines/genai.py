"""Stock onnxruntime-genai: the way an exported folder is served. For throughput and generated text, not for scores."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dtr_deploy.engines.base import Throughput, TokenScores, Workload
from dtr_deploy.engines.ort_model import CONFIG_FILE, available_cores, check_folder
from dtr_deploy.engines.timing import WorkloadTimer
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
        # Only the pad token ends a text, and `min_length` holds it back. genai's own overlay only adds to a list, so
        # the changed settings lie in a folder of links.
        config["model"]["eos_token_id"] = [self._pad]
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads or available_cores()
        with tempfile.TemporaryDirectory(prefix="dtr-genai-") as linked:
            for file in self.folder.resolve().iterdir():
                if file.name != CONFIG_FILE:
                    (Path(linked) / file.name).symlink_to(file)
            (Path(linked) / CONFIG_FILE).write_text(json.dumps(config))
            self._model: Any = onnxruntime_genai.Model(linked)
        ordinary = np.setdiff1d(np.arange(self._vocabulary), [self._pad])
        self._timer = WorkloadTimer(self.name, precision, ordinary, self.run_batch)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Not offered: genai gives the logits of the last position only. `OrtEngine` scores the same folder."""
        raise UsageError("engine genai does not score prompts; use engine ort on the same folder")

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy, end-of-text ignored, one prompt after another.

        genai ends a text at the pad token whatever it is told, so tokens are chosen here from its logits and appended.
        """
        outputs = []
        for prompt in prompts:
            if len(prompt) == 0:
                raise UsageError("a prompt has no tokens; give each at least one")
            generator = self._generator(1, len(prompt), max_new_tokens)
            generator.append_tokens(np.array([list(prompt)], np.int32))
            tokens = [int(generator.get_logits()[0, -1].argmax())]
            while len(tokens) < max_new_tokens:
                generator.append_tokens(np.array([tokens[-1:]], np.int32))
                tokens.append(int(generator.get_logits()[0, -1].argmax()))
            outputs.append(tokens)
        return outputs

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        """`concurrency` rows in one batch, by genai's own loop; the end-of-text token is kept from being chosen."""
        return self._timer.measure(workload, repeats)

    def close(self) -> None:
        self._model = None

    def run_batch(self, batch: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
        """Rows of one length -> new tokens (never the pad token), seconds until the first, seconds for the others."""
        length = len(batch[0])
        began = time.perf_counter()
        generator = self._generator(len(batch), length, new_tokens)
        generator.append_tokens(np.array(batch, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        rest = time.perf_counter() - first
        return [generator.get_sequence(row)[length:].tolist() for row in range(len(batch))], first - began, rest

    def _generator(self, rows: int, length: int, new_tokens: int) -> Any:
        total = length + new_tokens
        if total > self._context:
            raise UsageError(f"{self.folder}: {length} + {new_tokens} tokens exceed its context of {self._context}")
        parameters = self._genai.GeneratorParams(self._model)
        # Beams, which a folder's settings may ask for, would give wrong text without an error: genai does not move
        # recurrent states when beams change places.
        parameters.set_search_options(
            batch_size=rows, max_length=total, min_length=total, do_sample=False, num_beams=1, num_return_sequences=1
        )
        return self._genai.Generator(self._model, parameters)
