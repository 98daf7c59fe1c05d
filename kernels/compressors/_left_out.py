"""Single keys beside slots: a key that a query reads by itself leaves its slot, for this query.

A slot of a partition knows each key's share of its weight and value. Where a row reads key j
exactly, the slot's term e^{q.k_c + b_c} (w_c, u_c) loses share_j e^{q.k_c + b_c} (1, v_j). A slot
all of whose keys are read is not read at all, so nothing is left of it, not even rounding; from
others the engines subtract (tiles of kind `TAKEN`). Slots at a mean key never weigh more than their
keys do (Jensen), so what is subtracted is never much more than what is read.

Source: the overlap of a sparse and a low-rank part, Chen et al., Scatterbrain,
https://arxiv.org/abs/2110.15343, section 4.1; the exact shares are ours.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from attnplan.kernels.native import build
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, FULL, SLOTS, TAKEN, TileList
from attnplan.kernels.operands.token_tiles import pack_tokens

NUMBERS = 1 << 24  # counts that are held at a time


def without(slots: Slots, words: Tensor, tokens: Tensor) -> TileList:
    """Tiles of slots and single keys, no key counted twice.

    Args:
        slots: with members and shares.
        words: int64 [batch, heads, blocks, slot tiles], which slots a query block reads.
        tokens: int32 [batch, heads, 64 * blocks, most], -1 for none, distinct in a row.
    """
    of_heads = slots.head.long()
    member = torch.where(slots.share > 0, slots.member, -1)[:, of_heads]
    count, keys = slots.key.shape[2], member.shape[2]
    library = build.load().library if tokens.device.type == "cpu" else None
    if library is not None:
        read, alone, taken = _split_compiled(library, count, member, words, tokens)
    else:
        read, alone, taken = split_torch(count, member, words, tokens)
    parts = [row_tiles(read), pack_tokens(alone, keys)]
    if bool((taken >= 0).any()):
        leaving = pack_tokens(taken, keys)
        kind = torch.full_like(leaving.tiles[:, :1], TAKEN)
        parts.append(replace(leaving, tiles=torch.cat([kind, leaving.tiles[:, 1:]], 1)))
    return tile_list.concat(parts)


def split_torch(
    count: int, member: Tensor, words: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The slots that every row reads, and which tokens need no subtraction, and which do.

    Args:
        count: slots of a head.
        member: [batch, heads, keys], the slot that loses a key, -1 for none.
        words, tokens: as in `without`.

    Returns:
        int64 [batch, heads, 64 * blocks, slot tiles], and two tensors like `tokens`.
    """
    step = max(1, NUMBERS // max(1, tokens.shape[0] * tokens.shape[2] * count))
    found = []
    for first in range(0, tokens.shape[1], step):
        some = (t[:, first : first + step] for t in (member, words, tokens))
        found.append(_split(count, *some))
    read, alone, taken = (torch.cat(same, 1) for same in zip(*found, strict=True))
    return read, alone, taken


def _split(
    count: int, member: Tensor, words: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_torch` of heads whose counts are held at a time."""
    held = torch.where(member < 0, count, member.long())
    size = torch.zeros(*held.shape[:2], count + 1, dtype=torch.int16, device=held.device)
    size.scatter_add_(2, held, torch.ones_like(held, dtype=torch.int16))
    index = tokens.long().clamp(min=0)
    slot = held.gather(2, index.flatten(2)).view(tokens.shape)
    slot = torch.where(tokens < 0, count, slot)
    taken = torch.zeros(*tokens.shape[:3], count + 1, dtype=torch.int16, device=held.device)
    taken.scatter_add_(3, slot, torch.ones_like(slot, dtype=torch.int16))
    gone = taken == size[:, :, None]  # a slot without keys too
    gone[..., count] = True
    is_alone = gone.gather(3, slot)
    unread = tile_list.pack_bits(gone[..., :count].unflatten(3, (-1, BLOCK)))
    read = words.repeat_interleave(BLOCK, 2) & ~unread
    return read, torch.where(is_alone, tokens, -1), torch.where(is_alone, -1, tokens)


class _LeaveCall(ctypes.Structure):
    """`LeaveCall` of token_selection.cpp, field by field."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("heads", "blocks", "slots", "keys", "top", "threads")),
        *((n, ctypes.c_void_p) for n in ("tokens", "member", "words", "read", "alone", "taken")),
    )


def _split_compiled(
    library: ctypes.CDLL, count: int, member: Tensor, words: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, top = tokens.shape
    tokens, member = (t.to(torch.int32).contiguous() for t in (tokens, member))
    words = words.contiguous()
    read = words.new_empty(batch, heads, rows, words.shape[3])
    alone, taken = torch.empty_like(tokens), torch.empty_like(tokens)
    sizes = (batch * heads, rows // BLOCK, count, member.shape[2], top, torch.get_num_threads())
    tensors = (tokens, member, words, read, alone, taken)
    call = _LeaveCall(*sizes, *(t.data_ptr() for t in tensors))
    library.attnplan_leave_slots(ctypes.byref(call))
    return read, alone, taken


def row_tiles(words: Tensor) -> TileList:
    """Slot tiles: which slots rows read, int64 words [batch, heads, 64 * blocks, tiles]."""
    batch, heads, rows, _ = words.shape
    words = words.unflatten(2, (-1, BLOCK)).transpose(3, 4)  # [..., blocks, tiles, 64]
    b, h, row, index = torch.nonzero(words.ne(0).any(4), as_tuple=True)
    masks = words[b, h, row, index]
    is_full = masks.eq(-1).all(1)
    mask = torch.where(is_full, FULL, torch.arange(len(index), device=words.device))
    tiles = torch.stack([torch.full_like(index, SLOTS), index, mask], dim=1)
    gather = torch.zeros(0, BLOCK, dtype=torch.int32, device=words.device)
    at = (b * heads + h) * (rows // BLOCK) + row
    return tile_list.from_rows(batch, heads, rows // BLOCK, at, tiles, gather, masks.contiguous())
