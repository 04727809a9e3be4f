"""`vllm serve FOLDER`, as a user starts it: the OpenAI routes answer; concurrent requests get Hugging Face's tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dtr_deploy.hybrid.model import save_hybrid
from tests.tiny import tiny_hybrid, tiny_tokenizer
from tests.vllm.serving import NEW_TOKENS, Server, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a window?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("served")
    model = tiny_hybrid("qwen3", (None, "gated_deltanet", "gla", "gated_deltanet"), 64, 3, hidden=192)
    save_hybrid(model, tiny_tokenizer(), folder / "hybrid")
    options = ["--dtype", "float32", "--max-model-len", "4352", "--max-num-seqs", "16", "--enforce-eager"]
    with serving(model, folder, options) as started:
        yield started


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
