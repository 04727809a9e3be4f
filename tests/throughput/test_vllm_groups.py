"""vLLM's own grouping, through our stub of its configuration, gives the counts that were seen in running engines."""

import subprocess
import sys

import pytest

from dtr_deploy.throughput.vllm_groups import vllm_group_count

ASK = """
import sys
from dtr_deploy.throughput.vllm_groups import vllm_group_count
state_bytes = 3 * 64 * 64 * 4 + 2 * 64 * 3 * 64 * 4  # recurrent, and a window of 64
groups = vllm_group_count(kv_heads=3, head_dim=64, state_bytes=state_bytes, max_model_len=8192)
assert groups is not None, "the installed vLLM cannot be asked"
for linear in map(int, sys.argv[1:]):
    print(groups(("gla",) * linear + (None,) * (30 - linear)))
"""


def test_known_counts():
    pytest.importorskip("vllm", reason="asks vLLM itself", exc_type=ImportError)
    # In a process of its own: importing vLLM takes over logging and starts a platform.
    asked = {0: 1, 2: 15, 15: 2, 22: 4}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n" + ASK, *map(str, asked)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert dict(zip(asked, map(int, done.stdout.split()[-4:]), strict=True)) == asked


def test_without_vllm_there_is_no_count(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.v1.core", None)
    assert vllm_group_count(3, 64, 1000, 8192) is None
