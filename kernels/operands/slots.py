"""Pseudo-keys that stand in for keys."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Pseudo-keys of the heads that have a far field.

    A slot adds e^{scale q.k + log_weight} * weight to a query's mass and e^{...} * value to its
    numerator. `weight` may be negative; `value` is not normalised.

    Attributes:
        key: [batch, slot_heads, slots, head_dim]; `slots` is a multiple of 64.
        log_weight: float32 [batch, slot_heads, slots]; -inf for an empty slot.
        weight: float32 [batch, slot_heads, slots].
        value: [batch, slot_heads, slots, value_dim].
        head: int32 [heads], the row of `key` that a head reads, -1 for none.
        member: int32 [batch, slot_heads, keys], the slot that holds a key, -1 for none; empty where
            no key is taken out of its slot.
        share: float32 [batch, slot_heads, keys], what a key is of its slot's `weight`, and of the
            key's value in the slot's `value`; empty as `member` is.
    """

    key: Tensor
    log_weight: Tensor
    weight: Tensor
    value: Tensor
    head: Tensor
    member: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    share: Tensor = field(default_factory=lambda: torch.empty(0))
