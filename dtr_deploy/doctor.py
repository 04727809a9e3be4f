"""What this machine has: processor, memory, accelerators, engines. Imports no engine and no torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtr_deploy.engines import availability
from dtr_deploy.run_dir import versions

INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "sve": "SVE",
}
"""Flags of /proc/cpuinfo that engines choose kernels by -> their names."""


@dataclass(frozen=True)
class Hardware:
    """cores: those this process may use. Memory in bytes; 0 where the system does not say."""

    processor: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    available_memory_bytes: int
    gpus: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def hardware() -> Hardware:
    """Read what this machine is."""
    cpu = _fields(Path("/proc/cpuinfo"), ":")
    memory = _fields(Path("/proc/meminfo"), ":")
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return Hardware(
        processor=cpu.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        instruction_sets=tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags),
        memory_bytes=_kibibytes(memory.get("MemTotal", "0")),
        available_memory_bytes=_kibibytes(memory.get("MemAvailable", "0")),
        gpus=_gpus(),
    )


def _fields(file: Path, separator: str) -> dict[str, str]:
    """`name : value` lines of a file in /proc, each name once; empty where there is no such file."""
    if not file.is_file():
        return {}
    found: dict[str, str] = {}
    for line in file.read_text(errors="replace").splitlines():
        name, _, value = line.partition(separator)
        found.setdefault(name.strip(), value.strip())
    return found


def _kibibytes(text: str) -> int:
    number = text.split()[0] if text.split() else "0"
    return int(number) * 1024 if number.isdigit() else 0


def _gpus() -> tuple[str, ...]:
    """Name and memory of each NVIDIA GPU, as the driver's own tool says it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


def compiled_kernels() -> tuple[bool, str]:
    """Whether the CPU kernels are there, or could be compiled now; the library's file, or why not."""
    from dtr_kernels.compiled.build import BuildError, build

    try:
        return True, str(build())
    except BuildError as error:
        return False, str(error)


def environment() -> dict[str, Any]:
    """The report's `environment`: hardware and versions."""
    return {"hardware": hardware().to_dict(), "versions": versions(), "platform": platform.platform()}


def examine() -> tuple[Hardware, dict[str, tuple[bool, str]], dict[str, str]]:
    """Hardware, engines (usable here, version or reason), versions."""
    return hardware(), availability(), versions()
