"""Sorted hash blocks: keys of the past in the order of their hash; queries read their own block.

In balanced, centred coordinates (`balance`) queries and keys are hashed by the signs of their
products with `bits` random directions. Read as a Gray code, the signs give a rank, and neighbours
in rank differ in one sign. The keys before a segment are sorted by rank; a query reads the block of
`top` sorted keys that holds the middle of the keys of its own rank, or the place where they would
be. Blocks begin at the multiples of `top`; the last one ends with the keys.

Sources: Han et al., HyperAttention, https://arxiv.org/abs/2310.05869, algorithm 1; Zandieh et al.,
KDEformer, https://arxiv.org/abs/2302.02451. Unlike both, queries are not sorted: a query's block
follows from its rank alone, so that no query knows of later ones; sums over sampled keys of the
other blocks are a far field of their own. Directions are drawn once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.numerics import balance
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors._segment_tokens import Past, Picker, SegmentTokens


@dataclass(frozen=True)
class SortedBlocks(SegmentTokens):
    """Keep recent keys, sinks, and the block of `top` sorted keys at the query's own rank."""

    name: ClassVar[str] = "sorted_blocks"
    family: ClassVar[str] = "clustered"
    predictor: ClassVar[str] = "effective_keys"

    bits: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 30:
            raise ValueError(f"bits must be between 1 and 30, got {self.bits}")

    def picker(self, inputs: Inputs, blocks: Tensor) -> Picker:
        directions = _directions(inputs.key.shape[3], self.bits)
        query, key = balance.coordinates(inputs, inputs.rows(blocks), onto=directions)
        asked, ranks = (gray_rank(x > 0) for x in (query, key))

        def pick(past: Past) -> Tensor:
            line = ranks[past.row, :, past.low : past.high].sort(dim=-1, stable=True)
            wanted = asked[past.row][:, past.queries]
            first = torch.searchsorted(line.values, wanted)
            after = torch.searchsorted(line.values, wanted, right=True)
            block = (first + after) // 2 // self.top * self.top
            block = block.clamp(max=past.high - past.low - self.top)
            index = block[..., None] + torch.arange(self.top, device=block.device)
            return past.low + line.indices.gather(-1, index.flatten(1)).view(index.shape)

        return pick

    def segment_macs(self, shape: AttentionShape, seen: int, queries: int) -> float:
        return 0.0

    def once_macs(self, shape: AttentionShape) -> float:
        return float((shape.queries + shape.keys) * shape.head_dim * self.bits)

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments)


def gray_rank(bits: Tensor) -> Tensor:
    """The place of a word in the Gray code, int64 [...]; bits [..., n], the highest first."""
    parity = bits.long().cumsum(-1) % 2  # a binary digit is the sum of all Gray digits above it
    weight = 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (parity * weight).sum(-1)


@lru_cache(maxsize=64)
def _directions(head_dim: int, bits: int) -> Tensor:
    """float64 [head_dim, bits], the same wherever and whenever they are drawn."""
    generator = torch.Generator().manual_seed(0x6A7)
    drawn = torch.randn(bits, head_dim, generator=generator, dtype=torch.float64)
    return drawn.T.contiguous()
