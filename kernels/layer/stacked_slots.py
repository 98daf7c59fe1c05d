"""The slots of all far fields of a layer, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnplan.kernels.operands.slots import Slots


def rows_of_heads(groups: Sequence[Sequence[int]], heads: int) -> Tensor:
    """Which row of the stacked slots a head reads, int32 [heads], -1 for none; on the CPU.

    Args:
        groups: heads whose slots are made together, one row each.
        heads: of the layer.
    """
    rows = torch.full((heads,), -1, dtype=torch.int32)
    order = torch.tensor([head for group in groups for head in group], dtype=torch.int64)
    rows[order] = torch.arange(len(order), dtype=torch.int32)
    return rows


def stack(parts: Sequence[Slots], head: Tensor) -> Slots:
    """Slots of groups of heads, padded to the longest.

    Args:
        parts: of each group, whose heads read a row each, in order.
        head: see `rows_of_heads`.
    """
    count = max(slots.key.shape[2] for slots in parts)
    parts = [_grown(slots, count - slots.key.shape[2]) for slots in parts]
    key, log_weight, weight, value = (
        torch.cat([getattr(slots, name) for slots in parts], 1)
        if len(parts) > 1
        else getattr(parts[0], name)
        for name in ("key", "log_weight", "weight", "value")
    )
    return Slots(key, log_weight, weight, value, head, *_members(parts))


def _members(parts: Sequence[Slots]) -> tuple[Tensor, Tensor]:
    """Members and shares of all rows, where some have them; none in the others."""
    keys = max(len(slots.member) and slots.member.shape[2] for slots in parts)
    if not keys:
        return parts[0].member, parts[0].share
    members, shares = [], []
    for slots in parts:
        size = (*slots.weight.shape[:2], keys)
        if not len(slots.member):
            members.append(slots.head.new_full(size, -1))
            shares.append(slots.weight.new_zeros(size))
        else:
            members.append(slots.member)
            shares.append(slots.share)
    return torch.cat(members, 1), torch.cat(shares, 1)


def _grown(slots: Slots, more: int) -> Slots:
    if not more:
        return slots
    pad = torch.nn.functional.pad
    return replace(
        slots,
        key=pad(slots.key, (0, 0, 0, more)),
        log_weight=pad(slots.log_weight, (0, more), value=float("-inf")),
        weight=pad(slots.weight, (0, more)),
        value=pad(slots.value, (0, 0, 0, more)),
    )
