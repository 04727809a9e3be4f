"""Two worker processes over gloo compute what one process of Hugging Face computes: tensor and pipeline parallel."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dtr_deploy.hybrid.model import save_hybrid
from tests.tiny import tiny_hybrid
from tests.vllm.conftest import OPTIONS
from tests.vllm.reference import greedy, log_probabilities, random_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NEW_TOKENS = 8
TOLERANCE = 1e-3  # as in test_parity.py; the ranks' sums add up in another order
TIMEOUT = 300  # seconds; 20 are usual on 2 cores
# vLLM's CPU workers prepare pipeline stages only while they compile; this compiles without the C++ compiler.
COMPILED = {"enforce_eager": False, "enable_prefix_caching": True, "compilation_config": {"backend": "eager"}}
ALL_FORMS = (None, "gated_deltanet", "hedgehog", "jet", None, "gla")


def run(folder, prompts, **options):
    options = {**OPTIONS, "distributed_executor_backend": "mp", "model": str(folder), **options}
    given = {"options": options, "prompts": prompts, "new_tokens": NEW_TOKENS}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.vllm.parallel_run"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core needs no third process
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCHDYNAMO_DISABLE": "1" if options["enforce_eager"] else "0",  # other tests of this process set it
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers of the test share whatever cores there are
        },
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("RESULT ")]
    assert finished.returncode == 0 and lines, finished.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.mark.parametrize(
    ("family", "forms", "kv_heads", "options"),
    [
        ("llama", ALL_FORMS, 2, {"tensor_parallel_size": 2}),
        ("qwen3", ALL_FORMS, 1, {"tensor_parallel_size": 2}),  # one kv head, on both ranks
        ("qwen2", (None, "gla", "jet", None), 2, {"pipeline_parallel_size": 2, **COMPILED}),
    ],
    ids=["tensor", "tensor, one kv head", "pipeline"],
)
def test_two_workers_equal_one(tmp_path, family, forms, kv_heads, options):
    model = tiny_hybrid(family, forms, 64, 4, kv_heads=kv_heads, hidden=4 * kv_heads * 32)
    save_hybrid(model, None, tmp_path)
    prompts = random_prompts([1, 64, 65, 200], seed=73)
    results = run(tmp_path, prompts, **options)
    expected = greedy(model, prompts, NEW_TOKENS)
    assert [tokens for tokens, _ in results] == expected * 2
    for prompt, (tokens, ours) in zip(prompts * 2, results, strict=True):
        rows = log_probabilities(model, prompt + tokens)[len(prompt) - 1 : -1]
        theirs = [row[token] for row, token in zip(rows, tokens, strict=True)]
        assert np.abs(np.array(ours) - theirs).max() <= TOLERANCE
