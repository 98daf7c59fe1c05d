"""The interpreter that the kernel tests run in finds the faults it is there to find."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu import prefill as engine
from attnplan.kernels.operands.tile_list import BLOCK, CONTIGUOUS, TileList, from_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@triton.jit
def copy(source, target, first, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(target + i, tl.load(source + first + i).to(target.dtype.element_ty))


@triton.jit
def combine(a, b, target, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(a + i)
    y = tl.load(b + i)
    tl.store(target + i, tl.where(x > y, x * y, x + y))


@triton.jit
def multiply(a, b, target, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + i), tl.load(b + i), input_precision=PRECISION)
    tl.store(target + i, product)


@triton.jit
def write_to_one_place(target):
    tl.store(target, tl.program_id(0))


@triton.jit
def read_what_another_writes(target):
    program = tl.program_id(0)
    tl.store(target + program, tl.load(target + (program + 1) % 4) + 1)


@triton.jit
def write_twice(target, SIZE: tl.constexpr):
    tl.store(target + tl.arange(0, SIZE) // 2, tl.arange(0, SIZE))


@triton.jit
def count(target, first, last):
    for i in tl.range(tl.load(first), tl.load(last)):
        tl.store(target + i.to(tl.int64), i)


def fault(kernel: Callable[[], object]) -> str:
    """The innermost message of what a launch raises."""
    with pytest.raises(triton.runtime.errors.InterpreterError) as caught:
        kernel()
    return str(caught.value)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    source = 10 * torch.randn(1024, generator=torch.Generator().manual_seed(0))
    target = torch.empty(1024, dtype=torch.bfloat16)
    copy[(1,)](source, target, 0, SIZE=1024)
    assert torch.equal(target, source.bfloat16())


def test_bfloat16_arithmetic_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    target = torch.empty_like(a)
    combine[(1,)](a, b, target, SIZE=256)
    assert torch.equal(target, torch.where(a > b, a * b, a + b))


def test_bfloat16_products_are_sums_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    target = torch.empty(32, 32)
    multiply[(1,)](a, b, target, SIZE=32, PRECISION="ieee")
    torch.testing.assert_close(target, a.float() @ b.float())


def test_tf32_loses_what_it_loses_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = {}
    for precision in ("ieee", "tf32"):
        target = torch.empty(32, 32)
        multiply[(1,)](a, b, target, SIZE=32, PRECISION=precision)
        error[precision] = (target - exact).abs().max()
    assert error["ieee"] < 1e-5 and 1e-4 < error["tf32"] < 1e-2


def test_loop_bounds_may_be_loaded() -> None:
    target = torch.full((8,), -1, dtype=torch.int32)
    first, last = (torch.tensor([i], dtype=torch.int32) for i in (2, 5))
    count[(1,)](target, first, last)
    assert target.tolist() == [-1, -1, 2, 3, 4, -1, -1, -1]


def test_a_read_past_the_end_is_found() -> None:
    source, target = torch.zeros(64), torch.zeros(64)
    message = fault(lambda: copy[(1,)](source, target, 1, SIZE=64))
    assert "out-of-bounds load: elements 1 to 64 of 64" in message


def test_a_write_past_the_end_is_found() -> None:
    source, target = torch.zeros(64), torch.zeros(32)
    message = fault(lambda: copy[(1,)](source, target, 0, SIZE=64))
    assert "out-of-bounds store: elements 0 to 63 of 32" in message


def test_programs_that_write_one_place_are_found() -> None:
    target = torch.zeros(1, dtype=torch.int32)
    assert "race between programs (store)" in fault(lambda: write_to_one_place[(4,)](target))


def test_a_program_that_needs_another_is_found() -> None:
    target = torch.zeros(4)
    assert "race between programs" in fault(lambda: read_what_another_writes[(4,)](target))


def test_a_store_that_writes_twice_is_found() -> None:
    target = torch.zeros(64, dtype=torch.int32)
    assert "writes an element twice" in fault(lambda: write_twice[(1,)](target, SIZE=64))


def test_a_dot_too_short_for_a_gpu_is_refused() -> None:
    a, b, target = (torch.zeros(8, 8) for _ in range(3))
    fault(lambda: multiply[(1,)](a, b, target, SIZE=8, PRECISION="ieee"))


FAULTS = {
    "reads past the text": ("tl.minimum(start + c, keys - 1)", "(start + c)"),
    "reads queries that are not there": ("mask=is_query[:, None] & (d <", "mask=(d <"),
    "writes rows that are not there": ("logarithm, mask=is_query)", "logarithm)"),
    "mixes up heads": ("(batch * heads + head) * queries", "batch * heads * queries"),
}  # fmt: skip


@pytest.mark.parametrize(("original", "planted"), FAULTS.values(), ids=FAULTS)
def test_an_engine_with_a_planted_fault_is_found(
    original: str, planted: str, tmp_path: Path
) -> None:
    faulty = load(original, planted, tmp_path)
    message = fault(lambda: attend(faulty))
    assert "out-of-bounds" in message or "race" in message


def test_an_output_that_an_engine_forgets_is_not_a_number(tmp_path: Path) -> None:
    faulty = load("(e < VALUE_DIM)", "(e < VALUE_DIM - 1)", tmp_path)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert attend(engine).isfinite().all()
        assert attend(faulty).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def load(original: str, planted: str, folder: Path) -> ModuleType:
    """The engine with one piece of its source replaced."""
    source = Path(engine.__file__).read_text()
    assert source.count(original) == 1
    path = folder / "faulty.py"
    path.write_text(source.replace(original, planted))
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["faulty"] = module
    spec.loader.exec_module(module)
    return module


def attend(module: ModuleType) -> Tensor:
    """The output of a small ragged call: 70 queries and keys, 2 heads."""
    query, key, value = (torch.ones(1, 2, 70, 16) for _ in range(3))
    return module.attend(query, key, value, scale=1.0, kv_head=(0, 1), tiles=all_pairs())[0]


def all_pairs() -> TileList:
    row = torch.arange(4).repeat_interleave(2)
    tiles = torch.tensor([(CONTIGUOUS, 0, 0), (CONTIGUOUS, 1, 0)]).repeat(4, 1)
    masks = torch.full((1, BLOCK), -1, dtype=torch.int64)
    return from_rows(1, 2, 2, row, tiles, torch.zeros(0, BLOCK, dtype=torch.int32), masks)
