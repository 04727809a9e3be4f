"""The kernels compile for GPUs that are not there, fit their shared memory and keep their values in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A few of the cases of triton_compile.py; all of them take minutes.
CASES = [
    "prefill-gated_delta-head-bf16-4-128-128",
    "prefill-many-gated_delta-key-bf16-7-128-128",
    "prefill-gated-key-fp32-3-64-64",
    "prefill-delta-head-fp32-4-128-128",
    "decode-gated_delta-head-bf16-4-128-128",
    "extend-gated-key-bf16-3-64-64",
    "fused-gated_delta-head-bf16-7-128-128",
    "fused-linear-head-bf16-2-128-65",
    "window-prefill-bf16-4-128-128",
    "window-decode-fp32-3-64-64",
    "around-bf16-4-128-128",
    "training-delta-128-128",
    "training-gated-key-96-65",
]
KERNELS = {
    "plan_kernel", "key_decay_products_kernel", "prepare_kernel", "state_kernel", "output_kernel", "decode_kernel",
    "window_prefill_kernel", "ring_write_kernel", "window_decode_kernel", "rows_kernel", "gates_kernel", "carry_kernel",
    "inverse_kernel",
}  # fmt: skip
# What a block may have on the smallest GPUs since Ampere (sm_86, sm_89); sm_80 has 163 KiB, sm_90 227 KiB.
SHARED_LIMIT = 99 * 1024
# Bytes a thread; the compiler keeps a few values in local memory where registers are just short.
STACK_LIMIT = 128


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_a_gpu_and_fit(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    run = subprocess.run(
        [sys.executable, str(script), str(arch), *CASES], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    assert all(kernel["registers"] > 0 for kernel in kernels)
    assert not [kernel for kernel in kernels if kernel["shared"] > SHARED_LIMIT or kernel["stack"] > STACK_LIMIT]


def test_the_package_does_without_triton_until_it_is_asked_for():
    code = """
import sys
import dtr_kernels, dtr_kernels.operator, dtr_kernels.forms, dtr_kernels.window
assert "triton" not in sys.modules
sys.modules["triton"] = None
try:
    import dtr_kernels.triton
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install triton" in run.stdout
