"""Compiles what the Triton launchers launch, for a GPU that is not there. A program of its own: the kernels must have
been imported without the interpreter.

    python triton_compile.py ARCH [CASE ...]

prints one line of JSON for each kernel: case, kernel, warps, shared (bytes), registers and stack (bytes of local memory
a thread, which is where spilled registers go). Without cases, all of them. The launchers run as they are, on CPU
tensors that are never read, with a driver that names the target and compiles without launching.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dtr_kernels.triton import (
    linear_attention_decode,
    linear_attention_prefill,
    rows,
    window_attention_decode,
    window_attention_prefill,
)
from dtr_kernels.triton.training import carry, inverse

RULE_DECAYS = [
    ("linear", "head"), ("gated", "head"), ("gated", "key"), ("delta", "head"), ("gated_delta", "head"),
    ("gated_delta", "key"),
]  # fmt: skip
# query heads of a kv head, Dk, Dv: Llama 8B, SmolLM2, Hedgehog's normaliser, Qwen2.5 7B, heads of 256
SHAPES = [(4, 128, 128), (3, 64, 64), (2, 128, 65), (7, 128, 128), (1, 256, 256)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KV_HEADS, ROWS = 2, 40


class AbsentGpu:
    """What JITFunction.run asks a driver for before it compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def operands(rule, decay, group, key_dim, value_dim, dtype, sequences):
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype)  # noqa: E731
    return dict(
        q=empty(ROWS, KV_HEADS * group, key_dim, dtype=dtype), k=empty(ROWS, KV_HEADS, key_dim, dtype=dtype),
        v=empty(ROWS, KV_HEADS, value_dim, dtype=dtype), rule=rule,
        log_decay=empty(*((ROWS, KV_HEADS) if decay == "head" else (ROWS, KV_HEADS, key_dim)))
        if rule in ("gated", "gated_delta") else None,
        beta=empty(ROWS, KV_HEADS) if rule in ("delta", "gated_delta") else None,
        scale=1.0, pool=empty(4, KV_HEADS, key_dim, value_dim), slots=torch.zeros(sequences, dtype=torch.int32),
    )  # fmt: skip


def prefill(rule, decay, dtype, shape, sequences):
    """Few sequences split the state pass finely, many coarsely."""
    borders, initial = torch.zeros(sequences + 1, dtype=torch.int32), torch.zeros(sequences, dtype=torch.bool)
    inputs = operands(rule, decay, *shape, dtype, sequences)
    linear_attention_prefill(**inputs, cu_seqlens=borders, has_initial_state=initial, out_dtype=dtype)


def decode(rule, decay, dtype, shape):
    linear_attention_decode(**operands(rule, decay, *shape, dtype, ROWS))


def extend(rule, decay, dtype, shape):
    borders, initial = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    linear_attention_decode(**operands(rule, decay, *shape, dtype, 2), cu_seqlens=borders, has_initial_state=initial)


def fused(rule, decay, dtype, shape):
    """The whole of gated_deltanet, gla and hedgehog."""
    group, _, value_dim = shape
    options = dict(readout_gain=torch.empty(KV_HEADS * group, value_dim))
    if rule == "gated_delta":
        rate = torch.empty(KV_HEADS)
        options |= dict(l2_normalise=True, decay_from="softplus", decay_log_rate=rate, beta_from="logits")
    if rule == "gated":
        options |= dict(decay_from="logsigmoid")
    if rule == "linear":
        options = dict(
            normaliser=True, rms_readout=False, readout_gain=torch.empty(KV_HEADS * group, value_dim - 1)
        )  # fmt: skip
    linear_attention_decode(**operands(rule, decay, *shape, dtype, ROWS), **options)


def window(launch, dtype, shape):
    group, dim, _ = shape
    q, k = torch.empty(ROWS, KV_HEADS * group, dim, dtype=dtype), torch.empty(ROWS, KV_HEADS, dim, dtype=dtype)
    ring, rows = torch.empty(4, 64, KV_HEADS, dim, dtype=dtype), torch.zeros(ROWS, dtype=torch.int32)
    kwargs = dict(window=64, scale=1.0, ring_k=ring, ring_v=ring)
    if launch == "decode":
        window_attention_decode(q, k, k, slots=rows, positions=rows, **kwargs)
    else:
        borders = torch.zeros(3, dtype=torch.int32)
        window_attention_prefill(q, k, k, slots=rows[:2], cu_seqlens=borders, start=rows[:2], **kwargs)


def training(corrected, per_key, key_dim, value_dim):
    tokens, chunks = 64, 3
    empty = lambda *shape: torch.empty(KV_HEADS, *shape)  # noqa: E731
    around = empty(chunks, tokens, key_dim) if corrected else None
    decay = empty(chunks, key_dim if per_key else 1)
    carry(empty(chunks, key_dim, value_dim), empty(key_dim, value_dim), decay, around, around)
    inverse(empty(chunks, tokens, tokens))


def around_the_operator(dtype, shape):
    group, dim, _ = shape
    hidden = torch.empty(ROWS, 1024, dtype=dtype)
    rows.unit_rows(torch.empty(ROWS, KV_HEADS * group, dim, dtype=dtype), 1e-6)
    rows.readout(torch.empty(ROWS, KV_HEADS * group, dim), torch.empty(KV_HEADS * group, dim), 1e-6)
    rows.gates(hidden, *(torch.nn.Linear(1024, KV_HEADS), torch.empty(KV_HEADS), torch.nn.Linear(1024, KV_HEADS)))


def all_cases():
    cases = {
        f"training-{name}-{key_dim}-{value_dim}": partial(training, corrected, per_key, key_dim, value_dim)
        for name, corrected, per_key in (("delta", True, False), ("delta-key", True, True), ("gated-key", False, True))
        for key_dim, value_dim in ((64, 64), (128, 128), (96, 65))
    }
    for type_name, dtype in DTYPES.items():
        for shape in SHAPES:
            shape_name = "-".join(map(str, shape))
            for rule, decay in RULE_DECAYS:
                name = f"{rule}-{decay}-{type_name}-{shape_name}"
                cases[f"prefill-{name}"] = partial(prefill, rule, decay, dtype, shape, 2)
                cases[f"prefill-many-{name}"] = partial(prefill, rule, decay, dtype, shape, 300)
                for launch in (decode, extend, fused):
                    cases[f"{launch.__name__}-{name}"] = partial(launch, rule, decay, dtype, shape)
            cases[f"around-{type_name}-{shape_name}"] = partial(around_the_operator, dtype, shape)
            for launch in ("prefill", "decode"):
                cases[f"window-{launch}-{type_name}-{shape_name}"] = partial(window, launch, dtype, shape)
    return cases


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower() + "s" * (name == "REGISTER"): int(re.search(f"{key}:(\\d+)", text)[1])
            for name, key in (("REGISTER", "REG"), ("STACK", "STACK"))}  # fmt: skip


def main(arch: int, cases: list[str]) -> None:
    triton.runtime.driver.set_active(AbsentGpu(arch))
    run, compiled = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(kernel.hash, kernel)
        return kernel

    JITFunction.run = compile_only
    known, shown = all_cases(), set()
    for case in cases or known:
        known[case]()
        for key in compiled.keys() - shown:
            shown.add(key)
            kernel = compiled[key]
            use = {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
            print(
                json.dumps({"case": case, "kernel": kernel.name, **use, **resources(kernel.asm["cubin"])}), flush=True
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
