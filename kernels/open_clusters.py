"""Clusters that single queries read key by key, chosen by what their slots weigh.

On the CPU with a C++ compiler `engines/token_selection.cpp` does the work; elsewhere torch does.
Scores are float32, or float64 for float64 inputs; of equal ones the earlier slot comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.approximation import Slots
from attnplan.kernels.left_out import row_tiles
from attnplan.kernels.tile_list import BLOCK, TileList
from attnplan.kernels.token_selection import pack_tokens

NUMBERS = 1 << 24  # scores that are held at a time


def tiles(query: Tensor, slots: Slots, words: Tensor, most: int, scale: float) -> TileList:
    """The slots that every row reads, and the keys of the clusters that it opens instead.

    Args:
        query: [batch, heads, 64 * blocks, head_dim].
        slots: of all heads, with members.
        words: int64 [batch, heads, blocks, slot tiles], which slots a query block may read.
        most: keys that a row reads at most.
        scale: factor before the softmax.
    """
    step = max(1, NUMBERS // max(1, query.shape[0] * query.shape[2] * slots.key.shape[2]))
    found = []
    for first in range(0, query.shape[1], step):
        some = slice(first, first + step)
        found.append(_opened(query[:, some], slots, words[:, some], most, scale, some))
    read, tokens = (torch.cat(same, 1) for same in zip(*found, strict=True))
    return tile_list.concat([row_tiles(read), pack_tokens(tokens, slots.member.shape[2])])


def _opened(
    query: Tensor, slots: Slots, words: Tensor, most: int, scale: float, heads: slice
) -> tuple[Tensor, Tensor]:
    """Of some heads: the slots that rows read, int64 [batch, heads, rows, slot tiles], and keys.

    The keys are int32 [batch, heads, rows, most], -1 for none.
    """
    row = slots.head.long()[heads]
    wide = torch.promote_types(query.dtype, torch.float32)
    key, log_weight, weight = (
        t[:, row].to(wide) for t in (slots.key, slots.log_weight, slots.weight)
    )
    member = slots.member[:, row].long()
    count = key.shape[2]
    bits = words[..., None] >> torch.arange(BLOCK, device=words.device) & 1
    readable = bits.bool().flatten(3).repeat_interleave(BLOCK, 2)  # [batch, heads, rows, slots]
    # keys in the order of their slots, and where a slot begins
    held = torch.where(member < 0, count, member)
    order = held.sort(dim=-1, stable=True).indices
    size = torch.zeros(*held.shape[:2], count + 1, dtype=torch.int64, device=held.device)
    size.scatter_add_(2, held, torch.ones_like(held))
    size = size[..., :count]
    begin = size.cumsum(-1) - size

    scores = query.to(wide) @ key.mT * scale + (log_weight + weight.log())[:, :, None]
    lowest = torch.finfo(wide).min
    scores = scores.clamp(min=lowest / 2)  # a slot without weight has keys nevertheless
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
