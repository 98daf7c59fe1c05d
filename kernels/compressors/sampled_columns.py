"""Sampled columns: some far keys, weighted so that sums over them estimate sums over all.

Of every chunk `slots` keys are drawn, key j with a chance p_j per draw, and each drawn key weighs
1 / (slots p_j) in the sums, which are then right on average. The chances are the keys' weights for
a mean query, mixed with `uniform` per cent of equal chances; with 100 per cent and as many slots as
keys every key is drawn once and the far field is exact.

Source: Han et al., HyperAttention, https://arxiv.org/abs/2310.05869, section 3.1 (sampled columns
for what its blocks leave out). Unlike the paper, chances follow the mean query as in KDEformer
(Zandieh et al., https://arxiv.org/abs/2302.02451, section 3), keys of the near field are never
drawn, and the draws are systematic: at equal distances in the cumulated chances, from an offset
that is drawn at random for every chunk, from `seed` and the number of the chunk in its sequence
alone, so that a longer text or another batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import ChunkCompressor, Chunks, Summary
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.numerics import balance
from attnplan.kernels.numerics.clustering import pick, take
from attnplan.kernels.operands.inputs import Inputs, Moments


@dataclass(frozen=True)
class SampledColumns(ChunkCompressor):
    """Replace every far chunk of `chunk` keys by `slots` of them, drawn by importance."""

    name: ClassVar[str] = "sampled_columns"
    predictor: ClassVar[str] = "effective_keys"
    mean_name: ClassVar[str | None] = "balanced.query_mean"
    is_partition: ClassVar[bool] = True
    settings_beside_keys: ClassVar[tuple[tuple[int, int], ...]] = ((64, 4),)
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "slots": 1},)

    uniform: int = 50
    seed: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.uniform <= 100:
            raise ValueError(f"uniform must be 1 to 100 per cent, got {self.uniform}")
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed must be at least 0 and below 2^31, got {self.seed}")

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        where = quantiles(chunks.key.shape[2], self.slots, self.seed, chunks.key.device)
        drawn, chance = pick(chunks.weight, self.slots, self.uniform / 100, where)
        weight = chunks.weight.gather(-1, drawn) / (self.slots * chance)
        # draws ascend: of a key that is drawn again, the first slot takes it all
        share = torch.zeros_like(chunks.weight).scatter_add_(-1, drawn, weight)
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[..., 1:] = drawn[..., 1:] != drawn[..., :-1]
        weight = torch.where(first, share.gather(-1, drawn), 0.0)
        slot = torch.arange(self.slots, device=drawn.device).expand_as(drawn)
        member = torch.full_like(chunks.weight, self.slots, dtype=torch.int64)
        member = member.scatter_reduce_(-1, drawn, slot, "amin")
        member = member.masked_fill(share == 0, -1)
        value = take(chunks.value, drawn) * weight[..., None]
        return Summary(take(chunks.key, drawn), weight, value, member=member, share=share)

    def build_macs(self, head_dim: int) -> float:
        return float(self.chunk * (head_dim + 2) + self.slots * head_dim)

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments)


@lru_cache(maxsize=64)
def quantiles(chunks: int, slots: int, seed: int, device: torch.device) -> Tensor:
    """Where in the cumulated chances the first chunks are drawn, float64 [chunks, slots]."""
    drawn = [Random((seed << 32) + chunk).random() for chunk in range(chunks)]
    # not so close to an end that the rounding of cumulated chances moves a draw to another key
    offsets = [min(max(offset, 2**-10), 1 - 2**-10) for offset in drawn]
    places = [[(slot + offset) / slots for slot in range(slots)] for offset in offsets]
    return torch.tensor(places, dtype=torch.float64, device=device)
