"""Peak memory of one call above what lay there before it, in a process of its own (`python -m benchmarks.memory`).

The process loads the libraries, prepares the operands, calls a small problem once so that everything is loaded, sets
the kernel's high-water mark of resident memory back, calls once and reads the mark. A GPU's is torch's own count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.problem import Problem

WARM_UP_TOKENS = 64

# glibc keeps freed memory resident and would hand it out again unseen: here every larger block comes from the kernel.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def peak_bytes(problem: Problem, contender: str, timeout: float = 600.0) -> int:
    """Start the process and return its answer. Raises RuntimeError with the last line it wrote if it fails."""
    question = json.dumps({"problem": problem.to_dict(), "contender": contender})
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(problem.threads)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        input=question,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _status(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _measure(problem: Problem, contender: str) -> int:
    import torch

    from benchmarks.contenders import contenders
    from benchmarks.problem import Inputs

    torch.set_num_threads(problem.threads)

    def ready(asked: Problem) -> Any:
        return next(c for c in contenders(asked) if c.name == contender).prepare(Inputs(asked))

    ready(replace(problem, length=min(WARM_UP_TOKENS, problem.length))).call()
    call = ready(problem).call
    if problem.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return peak - before


if __name__ == "__main__":
    question = json.loads(sys.stdin.read())
    print(json.dumps({"peak_bytes": _measure(Problem.from_dict(question["problem"]), question["contender"])}))
