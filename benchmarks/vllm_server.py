"""`vllm serve FOLDER` as a user starts it, for benchmarks: a process group, a free local port, a log, and its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtr_deploy.engines.vllm import available, last_error
from dtr_deploy.errors import DtrError, UsageError

START_TIMEOUT = 900.0  # seconds; 20 to 60 are usual on 2 cores
STOP_TIMEOUT = 30.0


class VllmServer:
    """A running server. url: of its root; pid: of its process group's leader; log: what it prints."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folder, self.port, self.log = folder, port, log
        self.url, self.pid, self._process = f"http://127.0.0.1:{port}", process.pid, process

    @property
    def alive(self) -> bool:
        """Whether the process runs and its health route answers."""
        if self._process.poll() is not None:
            return False
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=10).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """The server's Prometheus counters and gauges, summed over labels: {"vllm:prefix_cache_hits_total": 384.0}."""
        totals: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            for line in response.read().decode().splitlines():
                if line and not line.startswith("#"):
                    name, value = line.rsplit(" ", 1)
                    name = name.split("{", 1)[0]
                    totals[name] = totals.get(name, 0.0) + float(value)
        return totals


def vllm_command() -> str:
    """The `vllm` command of this Python's environment."""
    usable, reason = available()
    command = Path(sys.executable).parent / "vllm"
    if not usable or not command.is_file():
        raise UsageError(reason if not usable else f"no command {command}: is vLLM installed in this environment?")
    return str(command)


@contextmanager
def vllm_server(
    folder: Path, options: Sequence[str], log: Path, kv_cache_gib: float = 3.0, timeout: float = START_TIMEOUT
) -> Iterator[VllmServer]:
    """Start `vllm serve folder *options` on a free port of 127.0.0.1, wait until it is healthy, stop it at the end.

    Raises:
        UsageError: vLLM is not installed, or `folder` is no checkpoint.
        DtrError: it did not start; the message ends with its own last words.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no config.json there; a Hugging Face checkpoint folder is needed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [vllm_command(), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), *options]
    command += ["--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30))]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that stopping it reaches the processes it starts
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
        )
    server = VllmServer(folder, port, process, log)
    try:
        deadline = time.monotonic() + timeout
        while not server.alive:
            if process.poll() is not None:
                raise DtrError(f"vllm serve {folder} ended: {last_error(log)} (log: {_kept(log)})")
            if time.monotonic() > deadline:
                raise DtrError(f"vllm serve {folder}: not healthy after {timeout:.0f} s (log: {_kept(log)})")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _kept(log: Path) -> Path:
    """A copy of a log that outlives the caller's temporary folder."""
    descriptor, kept = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
    os.close(descriptor)
    return Path(shutil.copyfile(log, kept))
