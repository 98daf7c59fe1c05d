"""Indices by Triton kernels are those of the torch code, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnplan.kernels.engines.gpu import nearest as gpu_nearest
from attnplan.kernels.numerics.clustering import nearest
from attnplan.kernels.selectors.lsh import LSH, _rotations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
"""Of sums, which are float32 whatever the inputs, relative to the terms."""

PROBLEMS = {  # outer sizes, points, clusters, dim
    "one-point": ((), 1, 1, 16),
    "chunks": ((1, 2, 3), 128, 16, 64),
    "ragged": ((2,), 70, 5, 80),
    "many-centres": ((1,), 100, 150, 24),
    "wide": ((2, 1), 33, 17, 128),
}


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_best(found: Tensor, losses: Tensor, terms: Tensor, dtype: torch.dtype) -> None:
    """`found` has the least loss in float64, up to the rounding of sums of such terms."""
    assert found.dtype == torch.int64
    chosen = losses.gather(-1, found.cpu()[..., None])[..., 0]
    excess = chosen - losses.amin(-1)
    assert float(excess.min()) >= 0
    assert bool((excess <= ROUNDING[dtype] * terms).all())
    assert float((found.cpu() == losses.argmin(-1)).double().mean()) > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_point_gets_its_nearest_centre(name: str, dtype: torch.dtype) -> None:
    outer, count, clusters, dim = PROBLEMS[name]
    points = (randn(*outer, count, dim) + 0.5).to(DEVICE, dtype)
    centre = (randn(*outer, clusters, dim, seed=1) + 0.5).to(DEVICE, dtype)
    found = gpu_nearest.nearest_centres(points, centre)
    x, y = points.cpu().double(), centre.cpu().double()
    losses = 0.5 * y.square().sum(-1)[..., None, :] - x @ y.mT
    terms = x.norm(dim=-1) * y.norm(dim=-1).amax(-1, keepdim=True) * 2
    check_best(found, losses, terms, dtype)
    if dtype == torch.float32:
        weight = torch.ones_like(points[..., 0])
        theirs = nearest(points.cpu(), weight.cpu(), centre.cpu(), 1)
        assert float((found.cpu() == theirs).double().mean()) > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equally_near_centres_the_first_counts(dtype: torch.dtype) -> None:
    """Within what is read at once, and across it. Small integers have exact sums."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(-3, 4, (2, 90, 20), generator=generator).to(DEVICE, dtype)
    few = torch.randint(-3, 4, (2, 40, 20), generator=generator).to(DEVICE, dtype)
    centre = torch.cat([few, few[:, :7], few], 1)
    found = gpu_nearest.nearest_centres(points, centre)
    expected = nearest(points.cpu().double(), torch.ones(2, 90).double(), centre.cpu().double(), 1)
    assert torch.equal(found.cpu(), expected)
    assert int(found.max()) < 40


def test_rows_of_a_larger_tensor_are_found() -> None:
    points = randn(3, 50, 64).float().to(DEVICE)[:, ::2, 5:37]
    centre = randn(9, 3, 32, seed=1).float().to(DEVICE).transpose(0, 1)
    found = gpu_nearest.nearest_centres(points, centre)
    assert torch.equal(found, torch.cdist(points, centre).argmin(-1))


def test_nothing_has_no_centre() -> None:
    centre = torch.zeros(2, 4, 8, device=DEVICE)
    assert gpu_nearest.nearest_centres(centre[:, :0], centre).shape == (2, 0)
    assert gpu_nearest.nearest_centres(centre[:0], centre[:0]).shape == (0, 4)


HASHES = {  # batch, heads, rows, dim, rounds, buckets
    "one-row": (1, 1, 1, 16, 1, 2),
    "ragged": (2, 3, 70, 80, 2, 16),
    "many-buckets": (1, 2, 65, 64, 3, 150),
    "wide": (1, 1, 64, 128, 2, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HASHES)
def test_every_row_gets_its_bucket(name: str, dtype: torch.dtype) -> None:
    batch, heads, count, dim, rounds, buckets = HASHES[name]
    rows = randn(batch, heads, count, dim).to(DEVICE, dtype)
    directions = _rotations(dim, rounds, buckets).to(DEVICE, dtype)
    found = gpu_nearest.hash_codes(rows, directions, rounds)
    x, r = rows.cpu().double(), directions.cpu().double()
    turned = (x @ r).unflatten(3, (rounds, -1)).transpose(2, 3)
    losses = -torch.cat([turned, -turned], -1)
    terms = x.norm(dim=-1)[:, :, None] * r.norm(dim=0).amax()
    check_best(found, losses, terms, dtype)
    if dtype == torch.float32:
        theirs = LSH(buckets, rounds, 8)._bucket(rows.cpu())
        assert float((found.cpu() == theirs).double().mean()) > 0.98


def test_of_equal_buckets_the_first_counts() -> None:
    """Also where a direction and another's opposite are equally near."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (1, 2, 80, 16), generator=generator).float()
    few = torch.randint(-2, 3, (16, 30), generator=generator).float()
    directions = torch.cat([few, -few, few], 1)
    found = gpu_nearest.hash_codes(rows.to(DEVICE), directions.to(DEVICE), 1)
    turned = rows @ directions
    expected = torch.cat([turned, -turned], -1).argmax(-1)[:, :, None]
    assert torch.equal(found.cpu(), expected)
    assert int(found.max()) < 60


def test_a_row_of_zeros_is_in_the_first_bucket() -> None:
    rows, directions = torch.zeros(1, 1, 3, 16), randn(16, 8).float()
    found = gpu_nearest.hash_codes(rows.to(DEVICE), directions.to(DEVICE), 2)
    assert int(found.abs().max()) == 0


def test_bad_input_is_refused() -> None:
    points, centre = torch.zeros(2, 8, 16), torch.zeros(2, 4, 16)
    with pytest.raises(ValueError, match=r"computed in .* got torch.float64"):
        gpu_nearest.nearest_centres(points.double(), centre.double())
    with pytest.raises(ValueError, match=r"rows are torch.float32 on cpu, .* torch.float16 on cpu"):
        gpu_nearest.nearest_centres(points, centre.half())
    with pytest.raises(ValueError, match=r"beside points \[2, 8, 16\], got \[1, 4, 16\]"):
        gpu_nearest.nearest_centres(points, centre[:1])
    with pytest.raises(ValueError, match=r"directions must be \[16, a multiple of 3\], got"):
        gpu_nearest.hash_codes(points[None], torch.zeros(16, 8), 3)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_a_gpu_takes_the_kernels_and_waits_for_nothing() -> None:
    points, centre, method = randn(2, 70, 16).float(), randn(2, 5, 16, seed=1).float(), LSH(8, 2, 4)
    weight = torch.ones(2, 70)
    there = [t.to(DEVICE) for t in (points, weight, centre)]
    for mode in ("default", "error"):  # once to compile and to move directions
        torch.cuda.set_sync_debug_mode(mode)
        try:
            clusters, buckets = nearest(*there, 1), method._bucket(there[0][None])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert float((clusters.cpu() == nearest(points, weight, centre, 1)).double().mean()) > 0.98
    assert float((buckets.cpu() == method._bucket(points[None])).double().mean()) > 0.98
