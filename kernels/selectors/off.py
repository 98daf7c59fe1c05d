"""Off: the head reads nothing, and its output is zero.

Sources: Michel et al., Are Sixteen Heads Really Better than One?, https://arxiv.org/abs/1905.10650
(heads that a trained model can do without); Jin et al., MoH: Multi-Head Attention as
Mixture-of-Head Attention, https://arxiv.org/abs/2410.11842, section 3 (heads that are chosen).
Unlike MoH, no router chooses heads anew for every token, as it would have to be trained: a head is
off for all tokens or for none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.selectors._static_pattern import StaticPattern


@dataclass(frozen=True)
class Off(StaticPattern):
    """Keep no key at all."""

    name: ClassVar[str] = "off"
    family: ClassVar[str] = "gated"
    predictor: ClassVar[str] = "output_energy"

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        yield cls()

    def cost(self, shape: AttentionShape) -> Cost:
        return Cost(0.0)

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.zeros_like(i + j, dtype=torch.bool)

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        return []
