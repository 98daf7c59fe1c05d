"""Choosing key blocks on a GPU: means of blocks, and the best blocks of every row of scores.

Nothing here waits for the device, and nothing has queries x keys numbers: rows and columns are
blocks of 64. How many blocks a row keeps is known beforehand, so its list has its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu.launcher import Launcher, are_aligned
from attnplan.kernels.operands.indexing import numbers_on
from attnplan.kernels.operands.tile_list import BLOCK

LEAST = tl.constexpr(-(2**31) + 1)


def integers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Some numbers as int32 on a device, moved there once."""
    return numbers_on(numbers, device, torch.int32)


def block_means(
    rows: Tensor,
    head: Tensor,
    start: Tensor,
    offset: int,
    *,
    up_to: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Mean of every 64 rows, padding left out.

    Args:
        rows: [batch, heads, length, head_dim], queries or keys.
        head: int32 [n], heads wanted.
        start: int32 [batch], first key that is no left padding.
        offset: position of the first row among the keys.
        up_to: instead, the mean of so many rows up to the first of every 64; a power of two.
        scale: factor of the means.

    Returns:
        float32 [batch, n, blocks, head_dim]; 0 where all rows are padding.
    """
    batch, _, length, head_dim = rows.shape
    blocks = -(-length // BLOCK)
    out = torch.empty(batch, len(head), blocks, head_dim, dtype=torch.float32, device=rows.device)
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    if out.numel():
        constants, options = means_constants(head_dim, up_to)
        strides = rows.stride()[:3]
        known = are_aligned((rows, head, start), strides)
        key = (head_dim, up_to, rows.dtype, rows.device) if known else None
        arguments = (rows, head, start, out, *strides, length, offset, scale)
        with torch.cuda.device_of(rows):
            _means((blocks, len(head), batch), arguments, constants, options, key)
    return out


def means_constants(
    head_dim: int, up_to: int | None
) -> tuple[dict[str, object], dict[str, object]]:
    """Constexpr parameters and options of the kernel that takes means; see `block_means`."""
    constants: dict[str, object] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK": BLOCK,
        "FIRST": 0 if up_to is None else 1 - up_to,
        "COUNT": BLOCK if up_to is None else up_to,
    }
    return constants, {"num_warps": 4, "enable_fp_fusion": True}


def choose_constants(width: int, follows: bool) -> tuple[dict[str, object], dict[str, object]]:
    """Constexpr parameters and options of the kernel that chooses among `width` blocks."""
    constants: dict[str, object] = {"BLOCK": BLOCK, "WIDTH": width, "FOLLOWS": follows}
    return constants, {"num_warps": max(1, min(8, width // 256)), "enable_fp_fusion": True}


def choose_blocks(
    scores: Tensor,
    out: Tensor,
    *,
    place: Tensor,
    top: Tensor,
    local: Tensor,
    start: Tensor,
    offset: int,
    follows: bool = False,
) -> None:
    """Write the whole key blocks that every query block reads, ascending.

    These are the `top` best between the first block and the `local` recent ones (of equal scores
    the earlier), the recent ones before the query block's own, and the first block if it has no
    padding: `_scored_blocks.BlockGrid` says the same of masks. Tiles under a mask are not named.

    Args:
        scores: float32 [batch, heads, blocks, key blocks].
        out: int32, all lists together.
        place: int32 [batch, heads, blocks], where the list of a row begins in `out`.
        top, local: int32 [heads].
        start: int32 [batch], first key that is no left padding.
        offset: position of the first query.
        follows: blocks are judged as `_scored_blocks.followed` says.
    """
    batch, heads, blocks, columns = scores.shape
    width = max(16, triton.next_power_of_2(columns))
    if out.numel():
        scores = scores.contiguous()
        tensors = (scores, place, top, local, start, out)
        key = (width, follows, scores.device) if are_aligned(tensors, ()) else None
        constants, options = choose_constants(width, follows)
        with torch.cuda.device_of(scores):
            _choose((blocks, heads, batch), (*tensors, offset, columns), constants, options, key)


@triton.jit(do_not_specialize=("length", "offset"))
def _block_means(
    rows, head, start, out, batch_stride, head_stride, row_stride, length, offset, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    block, heads, batch = tl.program_id(0), tl.num_programs(1), tl.program_id(2)
    h = tl.load(head + tl.program_id(1)).to(tl.int64)
    r = block * BLOCK + FIRST + tl.arange(0, COUNT)
    d = tl.arange(0, BLOCK_D)
    real = (r >= 0) & (r < length) & (r + offset >= tl.load(start + batch))
    rows += batch.to(tl.int64) * batch_stride + h * head_stride
    x = tl.load(
        rows + r.to(tl.int64)[:, None] * row_stride + d[None, :],
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    count = tl.maximum(tl.sum(real.to(tl.int32), 0), 1).to(tl.float32)
    place = (batch * heads + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + block
    mean = tl.sum(x.to(tl.float32), 0) / count * scale
    tl.store(out + place * HEAD_DIM + d, mean, mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=("offset", "columns"))
def _choose_blocks(
    scores, place, top, local, start, out, offset, columns,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (batch * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(0) + block
    c = tl.arange(0, WIDTH)
    own = (block * BLOCK + offset) // BLOCK
    padding = tl.load(start + batch)
    sink = padding // BLOCK
    recent = own - tl.load(local + head) + 1
    candidate = (c > sink) & (c < recent)
    kept = (c >= tl.maximum(recent, sink + 1)) & (c < own)
    whole = tl.where(padding % BLOCK == 0, sink, -1)
    kept = kept | ((c == whole) & (c < own))

    scores += row * columns
    score = tl.load(scores + c, mask=candidate & (c < columns), other=0.0)
    if FOLLOWS:
        known = candidate & (c < columns) & (c - 1 > sink)
        score = _log_sum(score, tl.load(scores + c - 1, mask=known, other=float("-inf")))

    # the largest threshold that `top` candidates reach, bit by bit
    key = _ordered(score)
    wanted = tl.minimum(tl.load(top + head), tl.sum(candidate.to(tl.int32), 0))
    low, high = LEAST + 0 * own, 0x7FFFFFFF + 0 * own
    for _ in range(32):
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        enough = tl.sum((candidate & (key >= middle)).to(tl.int32), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
    above = candidate & (key > low)
    tie = candidate & (key == low)
    left = wanted - tl.sum(above.to(tl.int32), 0)
    chosen = kept | above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= left))
    tl.store(out + tl.load(place + row) + tl.cumsum(chosen.to(tl.int32), 0) - 1, c, mask=chosen)


_means = Launcher(_block_means)
_choose = Launcher(_choose_blocks)


@triton.jit
def _log_sum(a, b):
    """log(e^a + e^b), -inf where both are."""
    most = tl.maximum(a, b)
    less = tl.where(most == float("-inf"), 0.0, tl.minimum(a, b) - most)
    return most + tl.log(1.0 + tl.exp(less))


@triton.jit
def _ordered(x):
    """float32 to int32 that are ordered alike; what is no number comes last."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # no -0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, tl.maximum(bits, LEAST), LEAST)
