"""Files of stage 1: each appears whole under its name or not at all, also when the process is killed."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def twin_file(folder: Path, layer: int, form: str) -> Path:
    """Where the weights of one twin lie."""
    return folder / f"layer{layer:02d}_{form}.safetensors"


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write or replace a file. tensors: on any device."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, partial, metadata)
    _commit(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write or replace a file, UTF-8."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _commit(partial, path)


def _commit(partial: Path, path: Path) -> None:
    """Make a finished file appear under its name at once, and last through a power cut."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
