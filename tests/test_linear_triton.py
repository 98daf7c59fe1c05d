"""Sums of features by Triton kernels are those of the torch code, in the interpreter or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.attention import moments
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.approximation import Inputs
from attnplan.kernels.engines import linear_triton
from attnplan.kernels.far.csalr import CSALR
from attnplan.kernels.far.performer import Performer
from attnplan.kernels.far.taylor import Taylor
from attnplan.kernels.feature_map import FeatureMap
from attnplan.kernels.part import Part

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""What rounding may cost an output, of values around 1."""
LOGARITHMS = {torch.float32: 2e-5, torch.float16: 1e-4, torch.bfloat16: 2e-3}
"""What rounding may cost the logarithm of a mass."""

MAPS = {
    "performer": Performer(64, 24),
    "performer-100": Performer(100, 40, seed=3),
    "performer-many": Performer(64, 150),
    "csalr": CSALR(64, 20, 2),
    "csalr-150": CSALR(64, 150, 1),
}
CALLS = {
    "prefill": {},
    "continued": {"queries": 70, "keys": 333},
    "one-query": {"queries": 1, "keys": 300},
    "padded": {"queries": 200, "batch": 2, "start": (0, 97)},
    "odd-dims": {"queries": 150, "dims": (24, 40)},
    "several-heads-of-one": {"queries": 130, "heads": (6, 1)},
}


def text(
    queries: int = 300,
    keys: int | None = None,
    *,
    batch: int = 1,
    start: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Queries and keys that have means, and what is fitted to such."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64)

    (query_heads, kv_heads), (head_dim, value_dim) = heads, dims
    tokens = queries if keys is None else keys
    query = randn(query_heads, queries, head_dim) + 0.4
    key, value = randn(kv_heads, tokens, head_dim) + 0.6, randn(kv_heads, tokens, value_dim)
    fitted = catalog.fit(
        moments(randn(query_heads, 500, head_dim) + 0.4, randn(kv_heads, 500, head_dim) + 0.6)
    )
    tensors = (t.to(DEVICE, dtype) for t in (query, key, value))
    return Inputs.of_layer(*tensors, scale=head_dim**-0.5, start=start, fitted=fitted)


def exactly(inputs: Inputs) -> Inputs:
    """The same numbers, in float64 on the CPU."""
    tensors = {name: getattr(inputs, name).cpu().double() for name in ("query", "key", "value")}
    return dataclasses.replace(inputs, **tensors)


def both(
    far: FeatureMap, inputs: Inputs, sinks: int = 4, window: int = 32, blocks: Tensor | None = None
) -> tuple[Part, Part]:
    """The part by kernels, and by the torch code in float64 on the same numbers."""
    blocks = torch.arange(inputs.blocks) if blocks is None else blocks
    heads = len(inputs.head)
    floor = far.floor(inputs, blocks, window)[:, None].expand(-1, heads, -1)
    exact = far.part(exactly(inputs), blocks, floor, (sinks,) * heads)
    there = blocks.to(DEVICE), floor.to(DEVICE)
    found = linear_triton.part(far, inputs, *there, (sinks,) * heads)
    assert exact is not None and found is not None
    return found, exact


def check(found: Part, exact: Part, dtype: torch.dtype) -> None:
    """Same rows are usable, with the same masses and means."""
    assert found.head == exact.head
    assert found.numerator.shape == exact.numerator.shape
    assert {t.dtype for t in (found.numerator, found.mass, found.shift)} == {torch.float32}
    usable = exact.usable
    assert torch.equal(found.usable.cpu(), usable)
    numerator, mass, shift = (
        t.cpu().double() for t in (found.numerator, found.mass, found.shift)
    )
    assert bool((numerator[~usable] == 0).all()) and bool((mass[~usable] == 0).all())
    log_mass, expected = mass.log() + shift, exact.mass.log() + exact.shift
    torch.testing.assert_close(
        log_mass[usable], expected[usable], rtol=1e-6, atol=LOGARITHMS[dtype]
    )
    mean, expected = numerator / mass[..., None], exact.numerator / exact.mass[..., None]
    torch.testing.assert_close(mean[usable], expected[usable], rtol=0, atol=2 * DTYPES[dtype])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("far", [MAPS["performer"], MAPS["csalr"]], ids=["performer", "csalr"])
def test_parts_are_those_of_the_torch_code(far: FeatureMap, call: str) -> None:
    inputs = text(**CALLS[call])  # type: ignore[arg-type]
    check(*both(far, inputs), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_every_dtype_and_number_of_features(far: FeatureMap, dtype: torch.dtype) -> None:
    check(*both(far, text(260, heads=(2, 1), dims=(32, 16), dtype=dtype)), dtype)
