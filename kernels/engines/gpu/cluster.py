"""Slots of clustered chunks on a GPU: a program clusters one chunk of keys, from load to slots.

Keys are read again at every step, a tile at a time: they stay in the caches, and a program needs
few registers. It says what a compressor of clustered chunks says in torch, where it is a chain of
some sixty launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu.feature_sums import block_of
from attnplan.kernels.engines.gpu.launcher import Launcher, are_aligned
from attnplan.kernels.engines.gpu.top_blocks import integers
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK

ROWS = 64
"""Keys that a program holds at a time."""
LONGEST, WIDEST, MOST = 512, 128, 64
"""Keys of a chunk, numbers of a key or value, and slots of a chunk that fit into a program."""


@dataclass(frozen=True)
class Clustering:
    """How the keys of a chunk are clustered.

    Attributes:
        chunk: keys per chunk.
        slots: clusters per chunk.
        steps: of Lloyd's algorithm.
        uniform: share of equal chances among those by which the first centres are drawn.
        by_root: keys weigh in Lloyd's algorithm with the square roots of their masses, else with
            these.
    """

    chunk: int
    slots: int
    steps: int
    uniform: float
    by_root: bool


def serves(how: Clustering, inputs: Inputs) -> bool:
    """Whether the kernel does this: for numbers of 16 bits, sizes that fit into a program.

    It multiplies with 10 bits of mantissa (tf32), which is exact for such keys and values, and for
    weights more than slots keep that are read in 16 bits.
    """
    widest = max(inputs.key.shape[3], inputs.value.shape[3])
    fits = how.chunk <= LONGEST and widest <= WIDEST and how.slots <= MOST
    return fits and inputs.key.dtype in (torch.float16, torch.bfloat16)


def compress(
    how: Clustering,
    mean: Tensor | None,
    metric: Tensor | None,
    inputs: Inputs,
    chunks: int,
    sinks: Sequence[int],
) -> Slots:
    """Slots of the first `chunks` chunks, padded to whole tiles; keys and values in float32.

    Args:
        how: the clusters are found.
        mean: queries [heads, head_dim] to take out of the scores; None for none.
        metric: [heads, head_dim, head_dim], distances are those of keys times it; None for none.
        inputs: the call.
        chunks: at least 1.
        sinks: for each head, first keys that stay near.
    """
    key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (inputs.key, inputs.value))
    batch, _, keys, head_dim = key.shape
    heads, value_dim = len(inputs.head), value.shape[3]
    count = -(-chunks * how.slots // BLOCK) * BLOCK
    made_key = key.new_empty(batch, heads, count, head_dim, dtype=torch.float32)
    made_value = key.new_empty(batch, heads, count, value_dim, dtype=torch.float32)
    log_weight, weight = key.new_empty(2, batch, heads, count, dtype=torch.float32)
    has = mean is not None, metric is not None
    means, grams = (key if t is None else t.float().contiguous() for t in (mean, metric))
    if metric is not None:
        grams = grams @ grams.mT
    rows = [integers(tuple(each), key.device) for each in (inputs.start, inputs.kv_head, sinks)]
    tensors = (key, value, means, grams, *rows, made_key, made_value, log_weight, weight)
    strides = (*key.stride()[:3], *value.stride()[:3])
    made, options = constants(how, has, head_dim, value_dim)
    kind = (how, has, head_dim, value_dim, key.dtype, key.device)
    with torch.cuda.device_of(key):
        _start(
            (-(-count // how.slots), heads, batch),
            (*tensors, inputs.scale, *strides, keys, chunks, count),
            made,
            options,
            kind if are_aligned(tensors, strides) else None,
        )
    own = integers(tuple(range(heads)), key.device)
    return Slots(made_key, log_weight, weight, made_value, own)


def constants(
    how: Clustering, has: tuple[bool, bool], head_dim: int, value_dim: int
) -> tuple[dict[str, object], dict[str, int | bool]]:
    """What the kernel is compiled for beside dtypes, and its options.

    Args:
        how: the clusters are found.
        has: whether there is a mean, and a metric.
        head_dim, value_dim: numbers of a key and of a value.
    """
    made: dict[str, object] = {
        "CHUNK": how.chunk,
        "SLOTS": how.slots,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_C": block_of(how.chunk),
        "BLOCK_S": block_of(how.slots),
        "BLOCK_D": block_of(head_dim),
        "BLOCK_V": block_of(value_dim),
        "ROWS": min(ROWS, block_of(how.chunk)),
        "PIECE": 16,
        "STEPS": how.steps,
        "UNIFORM": how.uniform,
        "BY_ROOT": how.by_root,
        "HAS_MEAN": has[0],
        "HAS_METRIC": has[1],
    }
    warps = 4 if max(head_dim, value_dim) <= 64 else 8
    return made, {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=("keys", "chunks", "count"))
def _cluster(
    key, value, mean, metric, start, kv_head, sinks, made_key, made_value, log_weight, weight,
    scale, key_batch, key_head, key_row, value_batch, value_head, value_row, keys, chunks, count,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr,
    STEPS: tl.constexpr, UNIFORM: tl.constexpr, BY_ROOT: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_METRIC: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, ROWS)  # [ROWS]
    s = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    is_slot = s < SLOTS
    slot = chunk * SLOTS + s
    at = (batch * tl.num_programs(1) + head) * count + slot
    is_cell = is_slot & (slot < count)
    key_cells = made_key + at[:, None] * HEAD_DIM + d[None, :]
    value_cells = made_value + at[:, None] * VALUE_DIM + e[None, :]
    is_key = is_cell[:, None] & (d < HEAD_DIM)[None, :]
    is_value = is_cell[:, None] & (e < VALUE_DIM)[None, :]
    if chunk >= chunks:  # padding
        tl.store(key_cells, tl.zeros([BLOCK_S, BLOCK_D], tl.float32), mask=is_key)
        tl.store(value_cells, tl.zeros([BLOCK_S, BLOCK_V], tl.float32), mask=is_value)
        tl.store(log_weight + at, tl.full([BLOCK_S], float("-inf"), tl.float32), mask=is_cell)
        tl.store(weight + at, tl.zeros([BLOCK_S], tl.float32), mask=is_cell)
        return

    kv = tl.load(kv_head + head).to(tl.int64)
    begin = tl.load(start + batch) + chunk * CHUNK
    key += batch * key_batch + kv * key_head
    value += batch * value_batch + kv * value_head
    real_from = tl.load(sinks + head) - chunk * CHUNK
    real_until = tl.minimum(keys - begin, CHUNK)
    m = tl.zeros([BLOCK_D], tl.float32)
    if HAS_MEAN:
        m = tl.load(mean + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)

    # weights of all keys, and from them the first centres: keys at equal distances in the
    # cumulated chances
    r = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    is_row = (r >= real_from) & (r < real_until)
    log_w = tl.zeros([BLOCK_C], tl.float32)
    if HAS_MEAN:
        for column in tl.range(0, HEAD_DIM, PIECE):
            p = column + tl.arange(0, PIECE)
            part = _rows(key, begin + r, key_row, r < real_until, p, HEAD_DIM)
            m_part = tl.load(mean + head * HEAD_DIM + p, mask=p < HEAD_DIM, other=0.0)
            log_w += tl.sum(part.to(tl.float32) * m_part[None, :], 1)
        log_w = log_w * scale
    log_w = tl.where(is_row, log_w, float("-inf"))
    shift = tl.max(log_w, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    share = tl.exp(log_w - shift)
    share = share / tl.maximum(tl.sum(share, 0), 1e-30)
    chance = tl.where(r < CHUNK, (1 - UNIFORM) * share + UNIFORM / CHUNK, 0.0)
    quantile = (s + 0.5) / SLOTS
    before = (tl.cumsum(chance, 0)[:, None] < quantile[None, :]) & (r < CHUNK)[:, None]
    picked = tl.minimum(tl.sum(before.to(tl.int32), 0), CHUNK - 1)
    ahead = tl.where(s[None, :] <= s[:, None], (picked - s)[None, :], -CHUNK)
    picked = tl.minimum(tl.max(ahead, 1) + s, CHUNK - SLOTS + s)  # no two are the same

    centre = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for tile in tl.range(0, CHUNK, ROWS):
        k = _rows(key, begin + tile + c, key_row, tile + c < real_until, d, HEAD_DIM)
        first = ((tile + c)[:, None] == picked[None, :]).to(tl.float32)
        centre += tl.dot(tl.trans(first), k.to(tl.float32), input_precision="tf32")

    for _ in tl.range(1, STEPS):
        seen, half = _as_seen(centre, metric, head, d, HEAD_DIM, HAS_METRIC)
        total = tl.zeros([BLOCK_S], tl.float32)
        moved = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for tile in tl.range(0, CHUNK, ROWS):
            k = _rows(key, begin + tile + c, key_row, tile + c < real_until, d, HEAD_DIM)
            w = _weights(k, m, scale, shift, tile + c, real_from, real_until, HAS_MEAN)
            if BY_ROOT:
                w = tl.sqrt(w)
            mine = _nearest(k, seen, half, s, SLOTS)
            mine = tl.where(mine, w[:, None], 0.0)
            total += tl.sum(mine, 0)
            moved += tl.dot(tl.trans(mine), k.to(tl.float32), input_precision="tf32")
        moved = moved / tl.maximum(total, 1.1754944e-38)[:, None]
        centre = tl.where((total > 0)[:, None], moved, centre)

    seen, half = _as_seen(centre, metric, head, d, HEAD_DIM, HAS_METRIC)
    mass = tl.zeros([BLOCK_S], tl.float32)
    key_sum = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    for tile in tl.range(0, CHUNK, ROWS):
        k = _rows(key, begin + tile + c, key_row, tile + c < real_until, d, HEAD_DIM)
        w = _weights(k, m, scale, shift, tile + c, real_from, real_until, HAS_MEAN)
        mine = _nearest(k, seen, half, s, SLOTS)
        mine = tl.where(mine, w[:, None], 0.0)
        mass += tl.sum(mine, 0)
        mine = tl.trans(mine)
        key_sum += tl.dot(mine, k.to(tl.float32), input_precision="tf32")
        v = _rows(value, begin + tile + c, value_row, tile + c < real_until, e, VALUE_DIM)
        value_sum += tl.dot(mine, v.to(tl.float32), input_precision="tf32")
    key_sum = key_sum / tl.maximum(mass, 1.1754944e-38)[:, None]
    shift = tl.where(mass > 0, shift - tl.sum(key_sum * m[None, :], 1) * scale, float("-inf"))
    tl.store(key_cells, key_sum, mask=is_key)
    tl.store(value_cells, value_sum, mask=is_value)
    tl.store(log_weight + at, shift, mask=is_cell)
    tl.store(weight + at, mass, mask=is_cell)


@triton.jit
def _rows(start, row, stride, is_row, d, DIM: tl.constexpr):
    """Rows of `DIM` numbers; 0 where there is none."""
    cells = start + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(cells, mask=is_row[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _as_seen(
    centre, metric, head, d,
    HEAD_DIM: tl.constexpr, HAS_METRIC: tl.constexpr,
):  # fmt: skip
    """Centres times the metric, and half their squared lengths: |k - c|^2 / 2 but for |k|^2."""
    seen = centre
    if HAS_METRIC:
        cells = metric + head * (HEAD_DIM * HEAD_DIM) + d[:, None] * HEAD_DIM + d[None, :]
        is_number = (d < HEAD_DIM)[:, None] & (d < HEAD_DIM)[None, :]
        gram = tl.load(cells, mask=is_number, other=0.0)
        seen = tl.dot(centre, gram, input_precision="tf32")
    return seen, 0.5 * tl.sum(seen * centre, 1)


@triton.jit
def _weights(k, m, scale, shift, row, real_from, real_until, HAS_MEAN: tl.constexpr):
    """Masses of keys for a mean query, relative to the largest of the chunk."""
    log_w = tl.zeros(row.shape, tl.float32)
    if HAS_MEAN:
        log_w = tl.sum(k.to(tl.float32) * m[None, :], 1) * scale
    is_row = (row >= real_from) & (row < real_until)
    return tl.where(is_row, tl.exp(tl.minimum(log_w - shift, 0.0)), 0.0)


@triton.jit
def _nearest(k, seen, half, s, SLOTS: tl.constexpr):
    """Which centre is nearest to a key, the first of equally near ones, [rows, centres]."""
    product = tl.dot(k.to(tl.float32), tl.trans(seen), input_precision="tf32")
    distance = tl.where((s < SLOTS)[None, :], half[None, :] - product, float("inf"))
    return tl.argmin(distance, 1)[:, None] == s[None, :]


_start = Launcher(_cluster)
