"""onnxruntime's `com.microsoft.LinearAttention`: a graph of one node, with inputs and outputs bound to torch's memory.

Query heads go in as they are and padded to the 1, 2, 4 or 8 a kv head that the operator's fast path on a CPU wants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders.base import Contender, Ready, Unavailable, cast, directions
from benchmarks.problem import Inputs, Problem

FAST_GROUPS = (1, 2, 4, 8)
INPUTS = ("q", "k", "v", "state", "log_decay", "beta")
OUTPUTS = ("out", "new_state")


def contenders(problem: Problem) -> list[Contender]:
    group = problem.shape.group
    wanted = [group]
    if group not in FAST_GROUPS and group < FAST_GROUPS[-1]:
        wanted.append(next(size for size in FAST_GROUPS if size > group))
    return [
        Contender(
            "onnxruntime" if size == group else f"onnxruntime, {size} query heads a kv head",
            "rule",
            _prepare(size),
            directions("forward", "decode"),
        )
        for size in wanted
    ]


def _prepare(group: int) -> Callable[[Inputs], Ready]:
    def prepare(inputs: Inputs) -> Ready:
        problem = inputs.problem
        s, pad = problem.shape, group - problem.shape.group
        dtype = problem.torch_dtype
        if dtype == torch.bfloat16 or (dtype != torch.float32 and problem.device == "cpu"):
            raise Unavailable(f"LinearAttention has no {problem.dtype} kernel on {problem.device}")
        operands = {name: x.to(dtype) for name, x in cast(inputs).items() if x is not None}
        queries = operands["q"].unflatten(2, (s.kv_heads, s.group))
        operands["q"] = torch.nn.functional.pad(queries, (0, 0, 0, pad)).flatten(2)
        # [B,T,H,D] and [B,T,H] -> the operator's [B,T,H*D] and [B,T,H]
        tensors = {name: (x if name == "state" else x.flatten(2)).clone().contiguous() for name, x in operands.items()}
        width = s.kv_heads * group * s.head_dim
        out = torch.empty(problem.batch, problem.tokens, width, dtype=dtype, device=problem.device)
        # Decoding binds the old and the new state to one buffer, as a runtime does.
        new_state = tensors["state"] if problem.direction == "decode" else torch.empty_like(tensors["state"])
        run = _bound_session(problem, group, tensors, {"out": out, "new_state": new_state})

        def convert(result: dict[str, Tensor]) -> dict[str, Tensor]:
            heads = result["out"].unflatten(2, (s.kv_heads, group, s.head_dim))[:, :, :, : s.group]
            return {"out": heads.flatten(2, 3), "state": result["new_state"]}

        return Ready(run, convert, problem.dtype)

    return prepare


def _bound_session(
    problem: Problem, group: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    """A function that runs the node on this memory and returns `outputs`."""
    try:
        import onnx
        import onnxruntime
        from onnx import helper
    except ImportError as error:
        raise Unavailable(f"onnx and onnxruntime are not importable: {error}") from error
    provider = "CUDAExecutionProvider" if problem.device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Unavailable(f"this onnxruntime has no {provider}")
    element = onnx.TensorProto.FLOAT if problem.dtype == "float32" else onnx.TensorProto.FLOAT16

    def values(tensors: dict[str, Tensor]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, element, list(tensor.shape)) for name, tensor in tensors.items()]

    node = helper.make_node(
        "LinearAttention",
        [name if name in inputs else "" for name in INPUTS],
        list(OUTPUTS),
        domain="com.microsoft",
        q_num_heads=problem.shape.kv_heads * group,
        kv_num_heads=problem.shape.kv_heads,
        update_rule=problem.rule,
        scale=problem.shape.head_dim**-0.5,
    )
    graph = helper.make_graph([node], "one_node", values(inputs), values(outputs))
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.log_severity_level = 3
    # Its threads may spin inside a run, not after it: there they would take the next contender's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    binding = session.io_binding()
    for tensors, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
        for name, tensor in tensors.items():
            bind(name, problem.device, 0, element, list(tensor.shape), tensor.data_ptr())

    # The binding only knows addresses: the function that is timed has to keep the memory behind them alive.
    memory = (inputs, outputs)

    def run() -> dict[str, Tensor]:
        session.run_with_iobinding(binding)
        return memory[1]

    return run
