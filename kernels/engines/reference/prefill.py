"""The oracle: near + far attention over dense masks, in the precision of its inputs.

Give it float64 and it is the measuring stick of every other engine. It allocates
queries x keys scores: tests and small shapes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, FULL, SLOTS, TAKEN, TileList


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
    """Attention over the pairs that `tiles` lists.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        value: [batch, kv_heads, keys, value_dim].
        scale: factor before the softmax.
        kv_head: for each head of `query`, the kv head it reads.
        tiles: what each block of 64 query rows reads.
        slots: pseudo-keys that slot tiles read.

    Returns:
        Output [batch, heads, queries, value_dim] and log-mass [batch, heads, queries] (natural
        logarithm). A row that reads nothing is zero, with log-mass -inf.
    """
    heads = list(kv_head)
    keep = tiles.counts(query.shape[2], key.shape[2]).to(query.device)
    if bool((keep > 1).any()):
        raise AssertionError("a pair is listed twice")
    taken = None
    if bool((tiles.tiles[:, 0] == TAKEN).any()):
        taken = tiles.counts(query.shape[2], key.shape[2], (TAKEN,)).to(query.device) > 0
    far = _far(tiles, slots, query)
    return masked(query, key[:, heads], value[:, heads], keep > 0, scale, far, taken)


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    scale: float,
    far: tuple[Slots, Tensor] | None = None,
    taken: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of a boolean mask [batch, heads, queries, keys].

    The keys of `taken`, a mask of the same size, leave their slots.
    """
    logits = (query @ key.mT * scale).masked_fill(~keep, float("-inf"))
    weight = torch.ones_like(logits[:, :, :1])
    if far is not None:
        slots, seen = far
        row = slots.head.long().clamp(min=0)
        far_logits = query @ slots.key[:, row].to(query.dtype).mT * scale
        far_logits = far_logits + slots.log_weight[:, row, None].to(query.dtype)
        columns = [logits, far_logits.masked_fill(~seen, float("-inf"))]
        weights = [weight.expand(*weight.shape[:3], key.shape[2]), slots.weight[:, row, None]]
        values = [value, slots.value[:, row].to(query.dtype)]
        if taken is not None:
            slot = slots.member[:, row, None].long().clamp(min=0)
            own = far_logits.gather(3, slot.expand(-1, -1, query.shape[2], -1))
            share = -slots.share[:, row].to(query.dtype)
            columns.append(own.masked_fill(~taken, float("-inf")))
            weights.append(share[:, :, None])
            values.append(share[..., None] * value)
        logits, value = torch.cat(columns, dim=-1), torch.cat(values, dim=2)
        weight = torch.cat([w.to(query.dtype) for w in weights], dim=-1)
    shift = logits.amax(-1, keepdim=True)
    shift = torch.where(shift.isfinite(), shift, torch.zeros_like(shift))
    exponential = (logits - shift).exp()
    mass = (exponential * weight).sum(-1)
    output = exponential @ value / torch.where(mass == 0, 1, mass)[..., None]
    return output, mass.log() + shift[..., 0]


def _far(tiles: TileList, slots: Slots | None, query: Tensor) -> tuple[Slots, Tensor] | None:
    """The slots, and a mask [batch, heads, queries, slots] of who reads which."""
    if slots is None:
        return None
    count = slots.key.shape[2]
    seen = torch.zeros(tiles.rows, BLOCK, count, dtype=torch.bool)
    bits = torch.arange(BLOCK)
    offsets, listed = tiles.offsets.tolist(), tiles.tiles.tolist()
    for row in range(tiles.rows):
        for kind, index, mask in listed[offsets[row] : offsets[row + 1]]:
            if kind == SLOTS:
                on = torch.ones(BLOCK, BLOCK, dtype=torch.bool)
                if mask != FULL:
                    on = (tiles.masks[mask].cpu()[:, None] >> bits & 1).bool()
                seen[row, :, index * BLOCK : (index + 1) * BLOCK] |= on
    seen = seen.view(tiles.batch, tiles.heads, -1, count)[:, :, : query.shape[2]]
    return slots, seen.to(query.device)
