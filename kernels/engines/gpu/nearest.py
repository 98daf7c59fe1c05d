"""Indices on a GPU: the nearest centre of every point, and the hash of every row.

Both are the best of many products of a row. A program keeps the best so far of its rows while it
goes through the columns, so the products are never in memory, and nothing waits for the device. Of
equal products the first wins, as with `argmin` and `argmax`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu.launcher import Launcher, are_aligned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 64
"""Rows of a program."""


def nearest_centres(points: Tensor, centre: Tensor) -> Tensor:
    """The nearest centre of every point, the first of equally near ones.

    Products are of the dtype of the inputs, sums and distances float32.

    Args:
        points: [..., points, dim], float32, float16 or bfloat16.
        centre: [..., clusters, dim], of the same dtype.

    Returns:
        int64 [..., points].

    Raises:
        ValueError: a dtype that the kernel cannot do, or sizes that do not fit together.
    """
    _check(points, centre)
    *outer, count, dim = points.shape
    clusters = centre.shape[-2]
    if list(centre.shape) != [*outer, clusters, dim] or clusters == 0:
        raise ValueError(
            f"centres must be [..., clusters, dim] beside points {list(points.shape)}, got "
            f"{list(centre.shape)}"
        )
    out = torch.empty(*outer, count, dtype=torch.int64, device=points.device)
    if out.numel():
        points, centre = points.contiguous(), centre.contiguous()
        made, options = nearest_constants(dim, clusters, points.dtype)
        kind = ("nearest", dim, made["BLOCK_C"], points.dtype, points.device)
        key = kind if are_aligned((points, centre, out), ()) else None
        problems = out.numel() // count
        grid = (problems * -(-count // ROWS),)
        with torch.cuda.device_of(points):
            _nearest(grid, (points, centre, out, count, clusters), made, options, key)
    return out


def hash_codes(rows: Tensor, directions: Tensor, rounds: int) -> Tensor:
    """The argmax of [xR; -xR] of every row x, for every round's R, the first of equal ones.

    Products are of the dtype of the inputs, sums float32.

    Args:
        rows: [batch, heads, rows, dim], float32, float16 or bfloat16.
        directions: [dim, rounds * columns], of the same dtype, a round's columns side by side.
        rounds: how many matrices R there are.

    Returns:
        int64 [batch, heads, rounds, rows], at least 0 and less than 2 * columns.

    Raises:
        ValueError: a dtype that the kernel cannot do, or sizes that do not fit together.
    """
    _check(rows, directions)
    batch, heads, count, dim = rows.shape
    if directions.shape[0] != dim or directions.shape[1] % rounds or not directions.shape[1]:
        raise ValueError(
            f"directions must be [{dim}, a multiple of {rounds}], got {list(directions.shape)}"
        )
    out = torch.empty(batch, heads, rounds, count, dtype=torch.int64, device=rows.device)
    if out.numel():
        rows, directions = rows.contiguous(), directions.contiguous()
        columns = directions.shape[1] // rounds
        made, options = hash_constants(dim, columns, rows.dtype)
        kind = ("hash", dim, made["BLOCK_C"], rows.dtype, rows.device)
        key = kind if are_aligned((rows, directions, out), ()) else None
        grid = (batch * heads * -(-count // ROWS), rounds)
        with torch.cuda.device_of(rows):
            _hash(grid, (rows, directions, out, count, columns), made, options, key)
    return out


@cache
def nearest_constants(
    dim: int, clusters: int, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernel of nearest centres is compiled for, and its launch options."""
    return _constants(dim, clusters, dtype), _options(dtype)


@cache
def hash_constants(
    dim: int, columns: int, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernel of hashes is compiled for, and its launch options."""
    return _constants(dim, columns, dtype), _options(dtype)


def _constants(dim: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    most = 64  # without spills
    if dtype == torch.float32:
        most = 32 if dim <= 64 else 16
    return {
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_C": max(16, min(most, triton.next_power_of_2(columns))),
        "ROWS": ROWS,
    }


def _options(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:  # computed without tensor cores, which would round it to tf32
        return {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    return {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def _check(rows: Tensor, columns: Tensor) -> None:
    if rows.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"indices are computed in {known}, got {rows.dtype}")
    if (columns.dtype, columns.device) != (rows.dtype, rows.device):
        raise ValueError(
            f"rows are {rows.dtype} on {rows.device}, what they are compared with is "
            f"{columns.dtype} on {columns.device}"
        )


@triton.jit(do_not_specialize=("count", "clusters"))
def _nearest_centres(
    points, centre, out, count, clusters,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(count, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    r = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # [ROWS]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    x = _rows(points + problem * count * DIM, r, count, d, DIM, BLOCK_D)
    centre += problem * clusters * DIM

    least = tl.full([ROWS], float("inf"), tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    for first in tl.range(0, clusters, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        y = _rows(centre, c, clusters, d, DIM, BLOCK_D)
        wide = y.to(tl.float32)
        # |x - y|^2 / 2 without |x|^2, which is the same for all centres
        distance = 0.5 * tl.sum(wide * wide, 1)[None, :]
        distance = distance - tl.dot(x, y.T, input_precision="ieee")
        distance = tl.where((c < clusters)[None, :], distance, float("inf"))
        here, place = tl.min(distance, 1, return_indices=True)
        found = tl.where(here < least, first + place, found)
        least = tl.minimum(here, least)
    tl.store(out + problem * count + r, found.to(tl.int64), mask=r < count)


@triton.jit(do_not_specialize=("count", "columns"))
def _hash_codes(
    rows, directions, out, count, columns,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(count, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    turn, turns = tl.program_id(1), tl.num_programs(1)
    r = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # [ROWS]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    x = _rows(rows + head * count * DIM, r, count, d, DIM, BLOCK_D)
    directions += turn * columns + d[:, None] * (turns * columns)

    most = tl.full([ROWS], float("-inf"), tl.float32)
    least = tl.full([ROWS], float("inf"), tl.float32)
    ahead = tl.zeros([ROWS], tl.int32)
    behind = tl.zeros([ROWS], tl.int32)
    for first in tl.range(0, columns, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        is_column = (c < columns)[None, :]
        y = tl.load(directions + c[None, :], mask=(d < DIM)[:, None] & is_column, other=0.0)
        product = tl.dot(x, y, input_precision="ieee")
        here, place = tl.max(tl.where(is_column, product, float("-inf")), 1, return_indices=True)
        ahead = tl.where(here > most, first + place, ahead)
        most = tl.maximum(here, most)
        here, place = tl.min(tl.where(is_column, product, float("inf")), 1, return_indices=True)
        behind = tl.where(here < least, first + place, behind)
        least = tl.minimum(here, least)
    code = tl.where(-least > most, columns + behind, ahead)
    tl.store(out + (head * turns + turn) * count + r, code.to(tl.int64), mask=r < count)


_nearest = Launcher(_nearest_centres)
_hash = Launcher(_hash_codes)


@triton.jit
def _rows(start, r, count, d, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of `DIM` numbers side by side, padded with 0 to `BLOCK_D`; 0 where there is no row."""
    mask = (r < count)[:, None]
    if DIM != BLOCK_D:
        mask = mask & (d < DIM)[None, :]
    return tl.load(start + r.to(tl.int64)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
