"""A GPU engine that rounds where it must not breaks the error budget of its tests.

Faults of memory are planted in `test_interpreter`; these are of numbers.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.test_interpreter import load
from torch import Tensor

from attnplan.kernels.engines.gpu import prefill as engine
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.operands.tile_list import BLOCK, CONTIGUOUS, FULL, from_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")

KEYS = 128 * BLOCK
FAULTS = {
    "sums values in bfloat16": (
        "v, numerator * rescale[:, None], input",
        "v, (numerator * rescale[:, None]).to(v.dtype).to(tl.float32), input",
    ),
    "forgets to rescale": ("v, numerator * rescale[:, None], input", "v, numerator, input"),
    "takes weights of another base": ("weights = tl.math.exp2(", "weights = tl.math.exp("),
}


def excess(module: ModuleType) -> float:
    """Error over budget of 64 bfloat16 queries and 8,192 keys, all pairs; at most 1 is allowed.

    The budget is twice what the reference loses at the same precision. Both are root mean
    squares: the largest error alone is mostly that of rounding the output, whatever came before.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (torch.randn(1, 1, n, 64, generator=generator) + 0.5).bfloat16()
        for n in (BLOCK, KEYS, KEYS)
    )
    tiles = torch.tensor([(CONTIGUOUS, index, FULL) for index in range(KEYS // BLOCK)])
    nothing = torch.zeros(0, BLOCK, dtype=torch.int32)
    every = from_rows(1, 1, 1, torch.zeros(len(tiles)).int(), tiles, nothing, nothing.long())

    def run(attend: ModuleType, *inputs: Tensor) -> Tensor:
        return attend.attend(*inputs, scale=0.125, kv_head=(0,), tiles=every)[0]

    exact = run(reference_prefill, query.double(), key.double(), value.double())
    low = run(reference_prefill, query, key, value)
    actual = run(module, query, key, value)
    return float((actual.double() - exact).norm() / (2 * (low.double() - exact).norm()))


def test_the_engine_keeps_its_budget() -> None:
    assert excess(engine) < 0.8


@pytest.mark.parametrize(("original", "planted"), FAULTS.values(), ids=FAULTS)
def test_lost_precision_breaks_the_budget(original: str, planted: str, tmp_path: Path) -> None:
    assert excess(load(original, planted, tmp_path)) > 1
