"""Without a GPU, Triton kernels run in Triton's interpreter, on the CPU.

Workers of pytest-xdist compute with one thread each: with more they would wait for one another.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's matmul of one tile: 19 ms with 2
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: set it first
    from tests import interpreter

    interpreter.install()

from attnplan.models.load import LoadedModel, load_model


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real model, in float32. Whoever patches it takes the patch off again."""
    return load_model("smollm2-135m", dtype="float32")
