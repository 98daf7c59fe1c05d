"""The GPU engine: every head of a layer and every kind of tile in one launch.

A program answers one row of the tile list (64 queries of one head) and carries the running
(numerator, mass, shift) of flash attention, Dao, https://arxiv.org/abs/2307.08691, through four
loops over the row's tiles:

    full      contiguous keys, all pairs: no mask code
    masked    contiguous keys under a mask of 64 words, and the ragged end of the text
    gather    64 keys from anywhere
    slots     pseudo-keys with a log-weight in the exponent and a signed weight in the mass

Logits are kept in units of log 2, where the exponential is one instruction. Rows are started
longest first, so that heads of very different density fill the device evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.approximation import Slots
from attnplan.kernels.tile_list import BLOCK, CONTIGUOUS, FULL, TileList

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    kv_head: tuple[int, ...],
    tiles: TileList,
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs that `tiles` lists, on a GPU or in Triton's interpreter.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim], of the same dtype.
        value: [batch, kv_heads, keys, value_dim], of the same dtype.
        scale: factor before the softmax, more than 0.
        kv_head: for each head of `query`, the kv head it reads.
        tiles: what each block of 64 query rows reads. Its schedule is kept as long as the list
            lives: reuse a list that depends on shapes alone.
        slots: pseudo-keys that slot tiles read.

    Returns:
        Output [batch, heads, queries, value_dim] in the dtype of `query`, laid out in memory as
        [batch, queries, heads, value_dim], and log-mass float32 [batch, heads, queries] (natural
        logarithm). A row that reads nothing is zero, with log-mass -inf.

    Raises:
        ValueError: a dtype or a scale that the kernel cannot do, or a list for another shape.
    """
    _check(query, key, value, scale, tiles)
    batch, heads, queries, head_dim = query.shape
    value_dim = value.shape[3]
    output = query.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    log_mass = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if tiles.rows == 0:
        return output, log_mass
    query, key, value = (_unit_stride(x) for x in (query, key, value))
    schedule = _schedule(tiles, key.shape[2], kv_head)
    _forward[(tiles.rows,)](
        query, key, value, output, log_mass,
        schedule.work, schedule.tiles, schedule.gather, schedule.masks,
        *_slot_arguments(slots, query),
        scale * LOG2E, heads, queries, key.shape[2],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        **constants(head_dim, value_dim, gather=tiles.gather.shape[0] > 0, slots=slots is not None),
        **launch_options(max(head_dim, value_dim), query.dtype, slots=slots is not None),
    )  # fmt: skip
    return output, log_mass


def constants(head_dim: int, value_dim: int, *, gather: bool, slots: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for, beside dtypes."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK": BLOCK,
        "HAS_GATHER": gather,
        "HAS_SLOTS": slots,
    }


def launch_options(head_dim: int, dtype: torch.dtype, *, slots: bool) -> dict[str, int | bool]:
    """Warps of a program and stages of its pipeline.

    The most stages without spills on sm_80 and sm_90 that still let several programs share a
    multiprocessor (`tests/test_triton_compile.py`). Two stages go to loading the indices.
    """
    if dtype == torch.float32:
        warps, stages = 8, 1
    elif head_dim > 128:
        warps, stages = 8, 2
    else:
        warps, stages = 4, 5 if head_dim <= 64 and not slots else 3
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class _Schedule:
    """A tile list in the order in which the kernel reads it.

    Attributes:
        work: int32 [rows, 8], longest row first: the CSR row, where its full, masked, gather and
            slot tiles start, where they end, its kv head, 0.
        tiles: int32 [tiles, 2], each (index, mask), sorted by row and loop.
        gather: int32 [gathers, 64].
        masks: int32 [masks, 64, 2], the words of `TileList.masks` in halves, low first.
    """

    work: Tensor
    tiles: Tensor
    gather: Tensor
    masks: Tensor


_schedules: WeakKeyDictionary[TileList, dict[tuple[int, tuple[int, ...]], _Schedule]] = (
    WeakKeyDictionary()
)


def _schedule(tiles: TileList, keys: int, kv_head: tuple[int, ...]) -> _Schedule:
    """The schedule of a list, made once. Nothing here waits for the device."""
    known = _schedules.setdefault(tiles, {})
    if (keys, kv_head) not in known:
        known[keys, kv_head] = _make_schedule(tiles, keys, kv_head)
    return known[keys, kv_head]


def _make_schedule(tiles: TileList, keys: int, kv_head: tuple[int, ...]) -> _Schedule:
    device = tiles.tiles.device
    rows = torch.arange(tiles.rows, device=device, dtype=torch.int32)
    lengths = tiles.offsets.diff()
    kind, index, mask = tiles.tiles.unbind(1)
    is_full = (mask == FULL) & ((index + 1) * BLOCK <= keys)
    loop = torch.where(kind == CONTIGUOUS, torch.where(is_full, 0, 1), kind + 1)
    row_of_tile = torch.repeat_interleave(rows, lengths, output_size=tiles.tiles.shape[0])
    ordered, order = (row_of_tile * 4 + loop).to(torch.int32).sort(stable=True)

    loops = torch.arange(4 * tiles.rows + 1, device=device, dtype=torch.int32)
    starts = torch.searchsorted(ordered, loops, out_int32=True)  # CSR over (row, loop)
    head = rows // tiles.blocks % tiles.heads
    kv = torch.tensor(kv_head, dtype=torch.int32).to(device, non_blocking=True)[head]
    columns = [rows, *starts[:-1].view(-1, 4).unbind(1), starts[4::4], kv, torch.zeros_like(rows)]
    longest_first = lengths.argsort(descending=True, stable=True)
    return _Schedule(
        torch.stack(columns, dim=1)[longest_first].contiguous(),
        tiles.tiles[order, 1:].contiguous(),
        tiles.gather.contiguous(),
        tiles.masks.contiguous().view(torch.int32),
    )


def _slot_arguments(slots: Slots | None, query: Tensor) -> tuple[Tensor | int, ...]:
    if slots is None:
        return query, query, query, query, query, 0, 0  # never read
    return (
        slots.key.to(query.dtype).contiguous(),
        slots.value.to(query.dtype).contiguous(),
        slots.log_weight.float().contiguous(),
        slots.weight.float().contiguous(),
        slots.head.contiguous(),
        slots.key.shape[1],
        slots.key.shape[2],
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float, tiles: TileList) -> None:
    if query.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"the triton engine computes in {known}, got {query.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share a dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be more than 0, got {scale}")
    expected = (query.shape[0], query.shape[1], -(-query.shape[2] // BLOCK))
    if (tiles.batch, tiles.heads, tiles.blocks) != expected:
        raise ValueError(
            f"the tile list is for (batch, heads, query blocks) "
            f"{(tiles.batch, tiles.heads, tiles.blocks)}, the query has {expected}"
        )


@triton.jit
def _forward(
    query, key, value, output, log_mass,
    work, tiles, gather, masks,
    slot_key, slot_value, slot_log_weight, slot_weight, slot_head, slot_heads, slots,
    scale_log2, heads, queries, keys,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    HAS_GATHER: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    work += tl.program_id(0) * 8
    row = tl.load(work)
    full_start = tl.load(work + 1)
    masked_start = tl.load(work + 2)
    gather_start = tl.load(work + 3)
    slots_start = tl.load(work + 4)
    end = tl.load(work + 5)
    kv_head = tl.load(work + 6).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK)
    head = (row // blocks % heads).to(tl.int64)
    batch = (row // blocks // heads).to(tl.int64)
    first = (row % blocks).to(tl.int64) * BLOCK

    r = tl.arange(0, BLOCK)  # [BLOCK]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    is_query = first + r < queries
    query += batch * query_batch + head * query_head + first * query_row
    q = _load(query + r[:, None] * query_row + d[None, :], is_query, d, HEAD_DIM, BLOCK_D, True)

    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head

    shift = tl.full([BLOCK], -1.0e30, tl.float32)  # finite: -inf - -inf is no number
    mass = tl.zeros([BLOCK], tl.float32)
    numerator = tl.zeros([BLOCK, BLOCK_V], tl.float32)

    for tile in tl.range(full_start, masked_start):
        j = tl.load(tiles + 2 * tile).to(tl.int64) * BLOCK + r
        k = _load(key + j[:, None] * key_row + d[None, :], j >= 0, d, HEAD_DIM, BLOCK_D, False)
        v = _load(value + j[:, None] * value_row + e[None, :], j >= 0, e, VALUE_DIM, BLOCK_V, False)
        logits = tl.dot(q, k.T, input_precision="ieee")
        weights, rescale, shift = _softmax(logits, scale_log2, shift)
        mass = mass * rescale + tl.sum(weights, 1)
        numerator = tl.dot(
            weights.to(v.dtype), v, numerator * rescale[:, None], input_precision="ieee"
        )

    for tile in tl.range(masked_start, gather_start):
        start = tl.load(tiles + 2 * tile) * BLOCK
        j = tl.minimum(start + r, keys - 1).to(tl.int64)
        k = _load(key + j[:, None] * key_row + d[None, :], j >= 0, d, HEAD_DIM, BLOCK_D, False)
        v = _load(value + j[:, None] * value_row + e[None, :], j >= 0, e, VALUE_DIM, BLOCK_V, False)
        keep = _keep(masks, tl.load(tiles + 2 * tile + 1), keys - start, BLOCK)
        logits = tl.dot(q, k.T, input_precision="ieee")
        weights, rescale, shift = _softmax(tl.where(keep, logits, float("-inf")), scale_log2, shift)
        mass = mass * rescale + tl.sum(weights, 1)
        numerator = tl.dot(
            weights.to(v.dtype), v, numerator * rescale[:, None], input_precision="ieee"
        )

    if HAS_GATHER:
        for tile in tl.range(gather_start, slots_start):
            j = tl.load(gather + tl.load(tiles + 2 * tile) * BLOCK + r)
            is_key = (j >= 0) & (j < keys)
            j = tl.where(is_key, j, 0).to(tl.int64)
            k_rows = key + j[:, None] * key_row + d[None, :]
            v_rows = value + j[:, None] * value_row + e[None, :]
            k = _load(k_rows, is_key, d, HEAD_DIM, BLOCK_D, False)
            v = _load(v_rows, is_key, e, VALUE_DIM, BLOCK_V, False)
            keep = _keep(masks, tl.load(tiles + 2 * tile + 1), BLOCK, BLOCK) & is_key[None, :]
            logits = tl.dot(q, k.T, input_precision="ieee")
            weights, rescale, shift = _softmax(
                tl.where(keep, logits, float("-inf")), scale_log2, shift
            )
            mass = mass * rescale + tl.sum(weights, 1)
            numerator = tl.dot(
                weights.to(v.dtype), v, numerator * rescale[:, None], input_precision="ieee"
            )

    if HAS_SLOTS:
        far = (batch * slot_heads + tl.maximum(tl.load(slot_head + head), 0)) * slots
        slot_log_weight += far
        slot_weight += far
        slot_key += far * HEAD_DIM
        slot_value += far * VALUE_DIM
        for tile in tl.range(slots_start, end):
            j = tl.load(tiles + 2 * tile).to(tl.int64) * BLOCK + r
            k_rows = slot_key + j[:, None] * HEAD_DIM + d[None, :]
            v_rows = slot_value + j[:, None] * VALUE_DIM + e[None, :]
            k = _load(k_rows, j >= 0, d, HEAD_DIM, BLOCK_D, False)
            v = _load(v_rows, j >= 0, e, VALUE_DIM, BLOCK_V, False)
            log_weight = tl.load(slot_log_weight + j) * 1.4426950408889634
            keep = _keep(masks, tl.load(tiles + 2 * tile + 1), BLOCK, BLOCK)
            logits = tl.dot(q, k.T, input_precision="ieee") * scale_log2 + log_weight[None, :]
            weights, rescale, shift = _softmax(tl.where(keep, logits, float("-inf")), 1.0, shift)
            signed = weights * tl.load(slot_weight + j)[None, :]
            mass = mass * rescale + tl.sum(signed, 1)
            numerator = tl.dot(
                weights.to(v.dtype), v, numerator * rescale[:, None], input_precision="ieee"
            )

    result = numerator / tl.where(mass == 0, 1.0, mass)[:, None]
    logarithm = (shift + tl.math.log2(tl.where(mass > 0, mass, 1.0))) * 0.6931471805599453
    logarithm = tl.where(mass > 0, logarithm, tl.where(mass < 0, float("nan"), float("-inf")))
    tl.store(log_mass + (batch * heads + head) * queries + first + r, logarithm, mask=is_query)
    output += ((batch * queries + first) * heads + head) * VALUE_DIM
    tl.store(
        output + r[:, None] * (heads * VALUE_DIM) + e[None, :],
        result.to(output.dtype.element_ty),
        mask=is_query[:, None] & (e < VALUE_DIM)[None, :],
    )


@triton.jit
def _load(
    pointers, is_row, d, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """Rows [BLOCK, BLOCK_DIM]; what lies outside is 0."""
    if CHECK_ROWS:
        if DIM == BLOCK_DIM:
            x = tl.load(pointers, mask=is_row[:, None], other=0.0)
        else:
            x = tl.load(pointers, mask=is_row[:, None] & (d < DIM)[None, :], other=0.0)
    else:
        if DIM == BLOCK_DIM:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)
    return x


@triton.jit
def _keep(masks, mask, columns, BLOCK: tl.constexpr):
    """The pairs [BLOCK, BLOCK] to compute in the first `columns` columns; all if `mask` is FULL."""
    c = tl.arange(0, BLOCK)
    words = masks + mask.to(tl.int64) * (2 * BLOCK) + 2 * c
    is_masked = tl.broadcast_to(mask, [BLOCK]) >= 0
    low = tl.load(words, mask=is_masked, other=-1) & _ones(columns)
    high = tl.load(words + 1, mask=is_masked, other=-1) & _ones(columns - 32)
    word = tl.where(c[None, :] < 32, low[:, None], high[:, None])
    return (word & (1 << (c[None, :] & 31))) != 0


@triton.jit
def _ones(bits):
    """A word whose lowest `bits` bits are set, none below 0 and all from 32."""
    return tl.where(bits >= 32, -1, (1 << tl.minimum(tl.maximum(bits, 0), 31)) - 1)


@triton.jit
def _softmax(logits, scale_log2, shift):
    """Exponentials under the new shift, what older ones are multiplied by, and the new shift."""
    new_shift = tl.maximum(shift, tl.max(logits, 1) * scale_log2)
    weights = tl.math.exp2(logits * scale_log2 - new_shift[:, None])
    return weights, tl.math.exp2(shift - new_shift), new_shift
