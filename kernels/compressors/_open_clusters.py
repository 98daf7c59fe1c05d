"""Clusters that single queries read key by key, chosen by what their slots weigh.

On the CPU with a C++ compiler `native/token_selection.cpp` does the work; elsewhere torch does.
Scores are float32, or float64 for float64 inputs; of equal ones the earlier slot comes first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attnplan.kernels.compressors._left_out import row_tiles
from attnplan.kernels.native import build
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, TileList
from attnplan.kernels.operands.token_tiles import pack_tokens

NUMBERS = 1 << 24  # scores that are held at a time
LOWEST = -1e37  # of the logarithm of a slot's mass


def tiles(query: Tensor, slots: Slots, words: Tensor, most: int, scale: float) -> TileList:
    """The slots that every row reads, and the keys of the clusters that it opens instead.

    Args:
        query: [batch, heads, 64 * blocks, head_dim].
        slots: of all heads, with members.
        words: int64 [batch, heads, blocks, slot tiles], which slots a query block may read.
        most: keys that a row reads at most.
        scale: factor before the softmax.
    """
    library = build.load().library if query.device.type == "cpu" else None
    if library is not None and query.dtype != torch.float64:
        read, tokens = _opened_compiled(library, query, slots, words, most, scale)
    else:
        read, tokens = opened_torch(query, slots, words, most, scale)
    return tile_list.concat([row_tiles(read), pack_tokens(tokens, slots.member.shape[2])])


def opened_torch(
    query: Tensor, slots: Slots, words: Tensor, most: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The slots that rows read, int64 [batch, heads, rows, slot tiles], and keys of open ones.

    The keys are int32 [batch, heads, rows, most], -1 for none. Arguments are those of `tiles`.
    """
    step = max(1, NUMBERS // max(1, query.shape[0] * query.shape[2] * slots.key.shape[2]))
    found = []
    for first in range(0, query.shape[1], step):
        some = slice(first, first + step)
        found.append(_opened(query[:, some], slots, words[:, some], most, scale, some))
    read, tokens = (torch.cat(same, 1) for same in zip(*found, strict=True))
    return read, tokens


class _OpenCall(ctypes.Structure):
    """`OpenCall` of token_selection.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "blocks", "slots", "keys", "rank", "most", "threads")
        ),
        *((name, ctypes.c_void_p) for name in ("query", "key", "begin", "order", "words")),
        *((name, ctypes.c_void_p) for name in ("read", "tokens")),
    )


def _opened_compiled(
    library: ctypes.CDLL, query: Tensor, slots: Slots, words: Tensor, most: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    row = slots.head.long()
    member, count = slots.member[:, row], slots.key.shape[2]
    order, size = _by_slot(member, count)
    begin = torch.nn.functional.pad(size.cumsum(-1), (1, 0)).to(torch.int32)
    mass = (slots.log_weight + slots.weight.log())[:, row].clamp(min=LOWEST)
    pad = torch.nn.functional.pad
    asked = pad(query.float() * scale, (0, 1), value=1.0)  # the mass is one more dimension
    key = torch.cat([slots.key[:, row].float(), mass[..., None].float()], -1)
    read = words.new_empty(batch, heads, rows, words.shape[3])
    tokens = torch.empty(batch, heads, rows, most, dtype=torch.int32)
    sizes = (batch * heads, rows // BLOCK, count, member.shape[2], asked.shape[3], most)
    floats = [t.contiguous() for t in (asked, key)]
    lists = [begin, order.to(torch.int32), words.contiguous()]
    call = _OpenCall(
        *sizes,
        torch.get_num_threads(),
        *(t.data_ptr() for t in (*floats, *lists, read, tokens)),
    )
    library.attnplan_open_clusters(ctypes.byref(call))
    return read, tokens


def _by_slot(member: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys in the order of their slots, [batch, heads, keys], and how many each slot has."""
    held = torch.where(member < 0, count, member.long())
    size = torch.zeros(*held.shape[:2], count + 1, dtype=torch.int64, device=held.device)
    size.scatter_add_(2, held, torch.ones_like(held))
    return held.sort(dim=-1, stable=True).indices, size[..., :count]


def _opened(
    query: Tensor, slots: Slots, words: Tensor, most: int, scale: float, heads: slice
) -> tuple[Tensor, Tensor]:
    """`opened_torch` of some heads."""
    row = slots.head.long()[heads]
    wide = torch.promote_types(query.dtype, torch.float32)
    key, log_weight, weight = (
        t[:, row].to(wide) for t in (slots.key, slots.log_weight, slots.weight)
    )
    count = key.shape[2]
    bits = words[..., None] >> torch.arange(BLOCK, device=words.device) & 1
    readable = bits.bool().flatten(3).repeat_interleave(BLOCK, 2)  # [batch, heads, rows, slots]
    order, size = _by_slot(slots.member[:, row], count)
    begin = size.cumsum(-1) - size

    scores = query.to(wide) @ key.mT * scale + (log_weight + weight.log())[:, :, None]
    scores = scores.clamp(min=LOWEST)  # a slot without weight has keys nevertheless
    lowest = torch.finfo(wide).min
    scores = scores.masked_fill(~readable | (size == 0)[:, :, None], lowest)
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    best = ranked.indices[..., : min(most, count)]
    some = size[:, :, None].expand_as(scores).gather(3, best)
    after = some.cumsum(-1)
    is_open = (after <= most) & (ranked.values[..., : best.shape[-1]] > lowest)

    opened = torch.zeros_like(readable).scatter_(3, best, is_open)
    read = words.repeat_interleave(BLOCK, 2)
    read = read & ~tile_list.pack_bits(opened.unflatten(3, (-1, BLOCK)))
    place = torch.arange(most, device=query.device).expand(*scores.shape[:3], most).contiguous()
    which = torch.searchsorted(after, place, right=True).clamp(max=best.shape[-1] - 1)
    there = is_open.gather(3, which) & (place < after.gather(3, which))
    first = begin[:, :, None].expand_as(scores).gather(3, best).gather(3, which)
    index = first + place - (after - some).gather(3, which)
    index = torch.where(there, index, 0)
    keys = order.gather(2, index.flatten(2)).view(index.shape)
    return read, torch.where(there, keys, -1).to(torch.int32)
