"""An exported folder as plain onnxruntime sees it: its files, its sessions, and the states that its graph wants.

`StatePool` allocates the states and makes the calls, `OrtRunner` serves requests with them, `OrtEngine` scores.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dtr_deploy.errors import UsageError

MODEL_FILE = "model.onnx"
ALL_LOGITS_FILE = "model_all_logits.onnx"
CONFIG_FILE = "genai_config.json"
ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def available() -> tuple[bool, str]:
    """(True, version) or (False, what is missing). Imports nothing heavy."""
    if find_spec("onnxruntime") is None:
        return False, "onnxruntime is not installed (pip install onnxruntime)"
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return True, f"onnxruntime {importlib.metadata.version(name)}"
    return True, "onnxruntime"


def available_cores() -> int:
    """Physical cores this process may use: its affinity without hyperthread siblings, and the container's quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        try:
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            cores.add(("", str(cpu)))
    count = len(cores)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return max(1, count)


def check_folder(folder: str | Path) -> Path:
    """The folder, if it is an export; UsageError names the file that is missing."""
    folder = Path(folder)
    for name in (MODEL_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: no {name}; expected a folder written by dtr-deploy export")
    return folder


@dataclass(frozen=True)
class StateShape:
    """One state of the graph. cache: whether it is a KV cache, which has a row for every token of a text.

    row: shape for one sequence, without the number of tokens that a cache holds: (kv heads, head size) for a cache,
    the whole shape for others.
    """

    name: str
    present: str
    cache: bool
    row: tuple[int, ...]
    dtype: Any

    def of(self, rows: int, capacity: int) -> tuple[int, ...]:
        """Shape for `rows` sequences of at most `capacity` tokens."""
        if self.cache:
            heads, head_size = self.row
            return rows, heads, capacity, head_size
        return rows, *self.row


class OrtModel:
    """The served graph in a session, and on demand the one that gives the logits of all tokens.

    Attributes:
        folder: as given.
        session: of model.onnx.
        states: of the graph, in its order.
        takes_positions: whether the graph has an input `position_ids`.
        all_logits: whether the served graph gives the logits of all tokens (exports of earlier releases did).
        vocabulary, context: sizes in tokens.
        ends: ids that end a text.

    Raises UsageError if onnxruntime or a file is missing, or if past and present of a KV cache may not be one buffer.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """threads: of one operator; `available_cores()` if None."""
        found, reason = available()
        if not found:
            raise UsageError(reason)
        self.folder = check_folder(folder)
        config = json.loads((self.folder / CONFIG_FILE).read_text())
        if not config["search"].get("past_present_share_buffer", False):
            raise UsageError(
                f"{self.folder}: its KV caches cannot be written in place ({CONFIG_FILE}: past_present_share_buffer), "
                "as in fp16 exports of earlier releases; export the model again"
            )
        self._threads, self._providers = threads or available_cores(), list(providers)
        self.session: Any = self._open(MODEL_FILE)
        self._scoring: Any = None
        head_size = int(config["model"]["decoder"]["head_size"])
        ends = config["model"]["eos_token_id"]
        self.ends = frozenset(map(int, ends)) if isinstance(ends, list) else frozenset({int(ends)})
        self.context = int(config["model"]["context_length"])
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.takes_positions = "position_ids" in inputs
        self.states = [_state(value, head_size) for name, value in inputs.items() if name.startswith("past")]
        logits = next(value for value in self.session.get_outputs() if value.name == "logits")
        self.vocabulary = int(logits.shape[-1])
        self.logits_dtype = ELEMENT_TYPES[logits.type]
        self.all_logits = logits.shape[1] != 1

    def scoring_session(self) -> Any:
        """The session whose logits are those of all tokens. Raises UsageError if the folder has no such graph."""
        if self.all_logits:
            return self.session
        if self._scoring is None:
            if not (self.folder / ALL_LOGITS_FILE).is_file():
                raise UsageError(f"{self.folder}: no {ALL_LOGITS_FILE}, which scores need; export the model again")
            self._scoring = self._open(ALL_LOGITS_FILE)
        return self._scoring

    def close(self) -> None:
        self.session = self._scoring = None

    def _open(self, name: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # A memory pattern is kept for every combination of input shapes, and the mask's shape changes with the text:
        # the plans would pile up, and none would be used twice.
        options.enable_mem_pattern = False
        return onnxruntime.InferenceSession(str(self.folder / name), options, providers=self._providers)


def _state(value: Any, head_size: int) -> StateShape:
    """value: an input of the graph, past_key_values.N.* or past.N.*"""
    name = value.name
    if name.startswith("past_key_values."):
        present = name.replace("past_key_values.", "present.")
        return StateShape(name, present, True, (int(value.shape[1]), head_size), ELEMENT_TYPES[value.type])
    sizes = tuple(int(size) for size in value.shape[1:])
    return StateShape(name, name.replace("past.", "present."), False, sizes, ELEMENT_TYPES[value.type])
