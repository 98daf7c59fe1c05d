"""Without a GPU, Triton kernels run in Triton's interpreter, on the CPU."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's matmul of one tile: 19 ms with 2

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: set it first
    from tests import interpreter

    interpreter.install()
