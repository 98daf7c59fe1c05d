"""The GPU engine: every head of a layer and every kind of tile in one launch.

A program answers one row of a schedule (64 queries of one head) and carries the running
(numerator, mass, shift) of flash attention, Dao, https://arxiv.org/abs/2307.08691, through four
loops over the row's tiles:

    full      contiguous keys, all pairs: no mask code
    masked    contiguous keys under a mask of 64 words, and the ragged end of the text
    gather    64 keys from anywhere; keys that leave slots also weigh minus their shares of these
    slots     pseudo-keys with a log-weight in the exponent and a signed weight in the mass

Logits are kept in units of log 2, where the exponential is one instruction. Rows are started
longest first, so that heads of very different density fill the device evenly. Where the device has
a unit that copies tiles (sm_90 and later) contiguous keys and values come through it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu import schedule as scheduling
from attnplan.kernels.engines.gpu.launcher import Launcher, are_aligned
from attnplan.kernels.engines.gpu.schedule import Schedule
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, TileList

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CHOSEN = tl.constexpr(scheduling.CHOSEN)
LEAVES = tl.constexpr(scheduling.LEAVES)


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
    schedule = schedule_of(tiles, key.shape[2], kv_head)
    return launch(query, key, value, scale=scale, schedule=schedule, slots=slots)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    schedule: Schedule,
    chosen: Tensor | None = None,
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` with a schedule in the place of a tile list.

    Args:
        query, key, value, scale, slots: as in `attend`.
        schedule: on the device of `query`.
        chosen: int32 [schedule.chosen], key blocks that were chosen for this call.
    """
    batch, heads, queries, head_dim = query.shape
    value_dim = value.shape[3]
    output = query.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    log_mass = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if len(schedule.work) == 0:
        return output, log_mass
    query, key, value = (_unit_stride(x) for x in (query, key, value))
    copies = copies_tiles(query.device, key, value)
    kind = (
        *(head_dim, value_dim, rows_of_program(queries, query.dtype), query.dtype),
        *(len(schedule.gather) > 0, slots is not None, chosen is not None, copies),
        *(slots is not None and len(slots.member) > 0, _generation(query.device)),
    )
    made, options = _compiled_for(*kind)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    slot_arguments = _slot_arguments(slots, query)
    key_of_launch = None
    if are_aligned((query, key, value, *slot_arguments[:7]), strides):
        key_of_launch = (kind, query.device)
    if copies:
        triton.set_allocator(_scratch)
    with torch.cuda.device_of(query):
        _start(
            (len(schedule.work) * -(-min(queries, BLOCK) // kind[2]),),
            (
                query, key, value, output, log_mass,
                schedule.work, schedule.index, schedule.mask,
                schedule.index if chosen is None else chosen,
                schedule.gather, schedule.masks,
                *slot_arguments,
                scale * math.log2(math.e), heads, queries, key.shape[2], *strides,
            ),
            made,
            options,
            key_of_launch,
        )  # fmt: skip
    return output, log_mass


@cache
def _compiled_for(
    head_dim: int,
    value_dim: int,
    rows: int,
    dtype: torch.dtype,
    gather: bool,
    slots: bool,
    chosen: bool,
    copies: bool,
    members: bool,
    generation: int,
) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    has = {"gather": gather, "slots": slots, "copies": copies}
    made = constants(head_dim, value_dim, rows=rows, chosen=chosen, members=members, **has)
    options = launch_options(
        max(head_dim, value_dim), dtype, generation=generation, members=members, **has
    )
    return made, options


def copies_tiles(device: torch.device, *tensors: Tensor) -> bool:
    """Whether the device's tile copies (tensor memory access) can read these tensors.

    They are of 16-bit numbers, and all rows begin at multiples of 16 bytes.
    """
    if not _has_tile_copies(device) or tensors[0].dtype == torch.float32:
        return False
    return all(x.data_ptr() % 16 == 0 and not any(n % 8 for n in x.stride()[:3]) for x in tensors)


def _has_tile_copies(device: torch.device) -> bool:
    return _generation(device) >= 9


@cache
def _generation(device: torch.device) -> int:
    """Major compute capability, 0 for what is no GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory where programs describe to the device what they want copied."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def constants(
    head_dim: int,
    value_dim: int,
    *,
    rows: int,
    gather: bool,
    slots: bool,
    chosen: bool = False,
    copies: bool = False,
    members: bool = False,
) -> dict[str, int | bool]:
    """What the kernel is compiled for, beside dtypes."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK": BLOCK,
        "ROWS": rows,
        "HAS_GATHER": gather,
        "HAS_SLOTS": slots,
        "HAS_CHOSEN": chosen,
        "COPIES": copies,
        "HAS_MEMBERS": members,
    }


def rows_of_program(queries: int, dtype: torch.dtype) -> int:
    """Query rows that one program answers: a whole block where tensor cores do the work.

    float32 is computed in float32 (no tf32), by cores that want small tiles.
    """
    return 16 if queries <= 16 or dtype == torch.float32 else BLOCK


def launch_options(
    head_dim: int,
    dtype: torch.dtype,
    *,
    gather: bool,
    slots: bool,
    copies: bool = False,
    generation: int = 0,
    members: bool = False,
) -> dict[str, int | bool]:
    """Warps of a program, stages of its pipeline and the most registers of a thread.

    What was fastest on an H200 (bfloat16, 8,192 tokens, 32 heads; TFLOP/s for dense heads and for a
    window of 1,024). With head_dim 64, five programs on a multiprocessor do best, which takes two
    stages and at most 96 registers: 438 and 355, against 383 and 300 without the limit and 416 and
    311 with three stages. With 128, shared memory has room for two programs of three stages: 494
    and 352, against 430 and 370 with two stages. Without tile copies: 337 to 376 and 288 to 333.
    """
    options: dict[str, int | bool] = {"enable_fp_fusion": True}
    if dtype == torch.float32:
        options |= {"num_warps": 8, "num_stages": 1}
    elif head_dim > 128:
        options |= {"num_warps": 8, "num_stages": 2}
    elif copies and head_dim <= 64:
        options |= {"num_warps": 4, "num_stages": 2}
        # without spills: loops over slots and single keys need more, all where both meet
        if generation == 9 and not members:
            options |= {"maxnreg": 168 if gather or slots else 96}
    else:  # two programs must fit, which have less shared memory before sm_90
        options |= {"num_warps": 4, "num_stages": 2 if generation == 8 and head_dim > 64 else 3}
    return options


_schedules: WeakKeyDictionary[TileList, dict[tuple[int, tuple[int, ...]], Schedule]] = (
    WeakKeyDictionary()
)


def schedule_of(tiles: TileList, keys: int, kv_head: tuple[int, ...]) -> Schedule:
    """The schedule of a list, made once, on its device and without waiting for it."""
    known = _schedules.setdefault(tiles, {})
    if (keys, kv_head) not in known:
        known[keys, kv_head] = scheduling.of_tiles(tiles, keys, kv_head)
    return known[keys, kv_head]


def _slot_arguments(slots: Slots | None, query: Tensor) -> tuple[Any, ...]:
    """Seven tensors and two sizes."""
    if slots is None:
        return *(query,) * 7, 0, 0  # never read
    members = (slots.member.to(torch.int32), slots.share.float()) if len(slots.member) else ()
    return (
        slots.key.to(query.dtype).contiguous(),
        slots.value.to(query.dtype).contiguous(),
        slots.log_weight.float().contiguous(),
        slots.weight.float().contiguous(),
        slots.head.to(torch.int32).contiguous(),
        *((t.contiguous() for t in members) if members else (query, query)),
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
    if tiles.tiles.device != query.device:
        raise ValueError(
            f"the tile list is on {tiles.tiles.device}, the query on {query.device}: move it with "
            "TileList.to"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be more than 0, got {scale}")
    expected = (query.shape[0], query.shape[1], -(-query.shape[2] // BLOCK))
    if (tiles.batch, tiles.heads, tiles.blocks) != expected:
        raise ValueError(
            f"the tile list is for (batch, heads, query blocks) "
            f"{(tiles.batch, tiles.heads, tiles.blocks)}, the query has {expected}"
        )


@triton.jit(do_not_specialize=("heads", "queries", "keys", "slot_heads", "slots"))
def _forward(
    query, key, value, output, log_mass,
    work, index, mask, chosen, gather, masks,
    slot_key, slot_value, slot_log_weight, slot_weight, slot_head, slot_member, slot_share,
    slot_heads, slots,
    scale_log2, heads, queries, keys,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HAS_GATHER: tl.constexpr, HAS_SLOTS: tl.constexpr,
    HAS_CHOSEN: tl.constexpr, COPIES: tl.constexpr, HAS_MEMBERS: tl.constexpr,
):  # fmt: skip
    if ROWS == BLOCK:
        first_row = 0
        work += tl.program_id(0) * 8
    else:
        parts = tl.cdiv(tl.minimum(queries, BLOCK), ROWS)  # programs of one block
        first_row = tl.program_id(0) % parts * ROWS
        work += tl.program_id(0) // parts * 8
    row = tl.load(work)
    full_start = tl.load(work + 1)
    full_end = tl.load(work + 2)
    masked_start = tl.load(work + 3)
    gather_start = tl.load(work + 4)
    slots_start = tl.load(work + 5)
    end = tl.load(work + 6)
    kv_head = tl.load(work + 7)
    full = index
    if HAS_CHOSEN:
        if kv_head >= CHOSEN:
            full = chosen
        kv_head = kv_head % CHOSEN
    kv_head = kv_head.to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK)
    head = (row // blocks % heads).to(tl.int64)
    batch = (row // blocks // heads).to(tl.int64)
    first = (row % blocks).to(tl.int64) * BLOCK + first_row

    r = tl.arange(0, ROWS)  # [ROWS]
    c = tl.arange(0, BLOCK)  # [BLOCK]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    is_query = first + r < queries
    query += batch * query_batch + head * query_head + first * query_row
    q = tl.load(
        query + r[:, None] * query_row + d[None, :],
        mask=is_query[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    masks += 2 * first_row
    if COPIES:
        key_tiles = tl.make_tensor_descriptor(key, [keys, HEAD_DIM], [key_row, 1], [BLOCK, BLOCK_D])
        value_tiles = tl.make_tensor_descriptor(
            value, [keys, VALUE_DIM], [value_row, 1], [BLOCK, BLOCK_V]
        )

    shift = tl.full([ROWS], -1.0e30, tl.float32)  # finite: -inf - -inf is no number
    mass = tl.zeros([ROWS], tl.float32)
    numerator = tl.zeros([ROWS, BLOCK_V], tl.float32)

    # the place of the next tile is known before this one is done
    start = tl.load(full + full_start, mask=full_start < full_end, other=0) * BLOCK
    for tile in tl.range(full_start, full_end):
        j = (start + c).to(tl.int64)
        if COPIES:
            k = key_tiles.load([start, 0])
        else:
            k = _load(key + j[:, None] * key_row + d[None, :], d, HEAD_DIM, BLOCK_D)
        logits = tl.dot(q, k.T, input_precision="ieee")
        weights, rescale, shift = _softmax(logits, scale_log2, shift)
        mass = mass * rescale + tl.sum(weights, 1)
        if COPIES:
            v = value_tiles.load([start, 0])
        else:
            v = _load(value + j[:, None] * value_row + e[None, :], e, VALUE_DIM, BLOCK_V)
        numerator = _add(numerator, rescale, weights, v)
        start = tl.load(full + tl.minimum(tile + 1, full_end - 1)) * BLOCK

    for tile in tl.range(masked_start, gather_start):
        start = tl.load(index + tile) * BLOCK
        j = tl.minimum(start + c, keys - 1).to(tl.int64)
        if COPIES:  # what lies past the last key is read as 0
            k = key_tiles.load([start, 0])
        else:
            k = _load(key + j[:, None] * key_row + d[None, :], d, HEAD_DIM, BLOCK_D)
        keep = _keep(masks, tl.load(mask + tile), keys - start, ROWS, BLOCK)
        logits = tl.where(keep, tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
        weights, rescale, shift = _softmax(logits, scale_log2, shift)
        mass = mass * rescale + tl.sum(weights, 1)
        if COPIES:
            v = value_tiles.load([start, 0])
        else:
            v = _load(value + j[:, None] * value_row + e[None, :], e, VALUE_DIM, BLOCK_V)
        numerator = _add(numerator, rescale, weights, v)

    if HAS_SLOTS:
        slot_row = batch * slot_heads + tl.maximum(tl.load(slot_head + head), 0)
        far = slot_row * slots
        slot_key += far * HEAD_DIM
        slot_value += far * VALUE_DIM
        slot_log_weight += far
        slot_weight += far
        if HAS_MEMBERS:
            slot_member += slot_row * keys
            slot_share += slot_row * keys

    if HAS_GATHER:
        for tile in tl.range(gather_start, slots_start):
            place = tl.load(index + tile)
            j = tl.load(gather + place % LEAVES * BLOCK + c)
            is_key = (j >= 0) & (j < keys)
            j = tl.where(is_key, j, 0).to(tl.int64)
            k = _load(key + j[:, None] * key_row + d[None, :], d, HEAD_DIM, BLOCK_D)
            v = _load(value + j[:, None] * value_row + e[None, :], e, VALUE_DIM, BLOCK_V)
            keep = _keep(masks, tl.load(mask + tile), BLOCK, ROWS, BLOCK)
            keep = keep & is_key[None, :]
            logits = tl.where(keep, tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
            if HAS_MEMBERS:
                leaves = is_key & (tl.broadcast_to(place, [BLOCK]) >= LEAVES)
                slot = tl.load(slot_member + j, mask=leaves, other=-1)
                leaves = slot >= 0
                slot = tl.maximum(slot, 0)
                share = tl.load(slot_share + j, mask=leaves, other=0.0)
                log_weight = tl.load(slot_log_weight + slot) * LOG2E
                own = slot_key + slot[:, None] * HEAD_DIM + d[None, :]
                own = _load(own, d, HEAD_DIM, BLOCK_D)
                own = tl.dot(q, own.T, input_precision="ieee") * scale_log2 + log_weight[None, :]
                own = tl.where(keep & leaves[None, :], own, float("-inf"))
                before = tl.maximum(shift, tl.max(own, 1))
                weights, _, top = _softmax(logits, scale_log2, before)
                weights -= share[None, :] * tl.math.exp2(own - top[:, None])
                rescale = tl.math.exp2(shift - top)
                shift = top
            else:
                weights, rescale, shift = _softmax(logits, scale_log2, shift)
            mass = mass * rescale + tl.sum(weights, 1)
            numerator = _add(numerator, rescale, weights, v)

    if HAS_SLOTS:
        for tile in tl.range(slots_start, end):
            j = tl.load(index + tile).to(tl.int64) * BLOCK + c
            k = _load(slot_key + j[:, None] * HEAD_DIM + d[None, :], d, HEAD_DIM, BLOCK_D)
            v = _load(slot_value + j[:, None] * VALUE_DIM + e[None, :], e, VALUE_DIM, BLOCK_V)
            log_weight = tl.load(slot_log_weight + j) * LOG2E
            keep = _keep(masks, tl.load(mask + tile), BLOCK, ROWS, BLOCK)
            logits = tl.dot(q, k.T, input_precision="ieee") * scale_log2 + log_weight[None, :]
            weights, rescale, shift = _softmax(tl.where(keep, logits, float("-inf")), 1.0, shift)
            mass = mass * rescale + tl.sum(weights * tl.load(slot_weight + j)[None, :], 1)
            numerator = _add(numerator, rescale, weights, v)

    result = numerator / tl.where(mass == 0, 1.0, mass)[:, None]
    logarithm = (shift + tl.math.log2(tl.where(mass > 0, mass, 1.0))) * LN2
    logarithm = tl.where(mass > 0, logarithm, tl.where(mass < 0, float("nan"), float("-inf")))
    tl.store(log_mass + (batch * heads + head) * queries + first + r, logarithm, mask=is_query)
    output += ((batch * queries + first) * heads + head) * VALUE_DIM
    tl.store(
        output + r[:, None] * (heads * VALUE_DIM) + e[None, :],
        result.to(output.dtype.element_ty),
        mask=is_query[:, None] & (e < VALUE_DIM)[None, :],
    )


_start = Launcher(_forward)


@triton.jit
def _load(pointers, d, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of `DIM` numbers, padded with 0 to `BLOCK_DIM`."""
    if DIM == BLOCK_DIM:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)
    return x


@triton.jit
def _keep(masks, mask, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The pairs [ROWS, BLOCK] to compute in the first `columns` columns; all if `mask` is FULL."""
    c = tl.arange(0, BLOCK)
    words = masks + mask.to(tl.int64) * (2 * BLOCK) + 2 * tl.arange(0, ROWS)
    is_masked = tl.broadcast_to(mask, [ROWS]) >= 0
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


@triton.jit
def _add(numerator, rescale, weights, v):
    return tl.dot(weights.to(v.dtype), v, numerator * rescale[:, None], input_precision="ieee")
