"""Without a GPU the Triton kernels run in Triton's interpreter. Triton looks at the variable when it is imported, which
other test modules make happen, so it is set before any of them is."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
