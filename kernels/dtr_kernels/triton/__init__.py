"""The operator on GPUs, in Triton. Imported only by those who ask for it: `dtr_kernels` itself needs torch alone.

`linear_attention_prefill` and `linear_attention_decode` are `operator.linear_attention_packed` and `_step`; the window
functions are those of `window`. On a machine without a GPU they run in Triton's interpreter if TRITON_INTERPRET=1 was
set before triton was first imported.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dtr_kernels.triton needs the package triton, which comes with CUDA builds of torch: pip install triton"
    ) from error

from dtr_kernels.triton.chunk_plan import ChunkPlan
from dtr_kernels.triton.decode import linear_attention_decode
from dtr_kernels.triton.prefill import linear_attention_prefill, plan_of_operator
from dtr_kernels.triton.step import mixer_step
from dtr_kernels.triton.window import plan_of_window, window_attention_decode, window_attention_prefill

__all__ = [
    "ChunkPlan",
    "linear_attention_decode",
    "linear_attention_prefill",
    "mixer_step",
    "plan_of_operator",
    "plan_of_window",
    "window_attention_decode",
    "window_attention_prefill",
]
