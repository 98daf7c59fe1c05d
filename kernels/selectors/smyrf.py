"""SMYRF: keys of the past are sorted along random lines, and queries read what lies beside them.

In balanced, centred coordinates (`balance`), with M the largest norm of the keys before a segment,

    F(q) = [M q / |q|; 0]    G(k) = [k; sqrt(M^2 - |k|^2)]
    |F(q) - G(k)|^2 = 2 M^2 - 2 M q.k / |q|

so the nearest G(k) is the key of the largest product. In each of `rounds` rounds, queries and keys
are projected on a random line; a query keeps the `top` / `rounds` keys beside it in the order of
the line, found by binary search. A key that it meets in several rounds counts once. With a `rank`,
all this is done in so many of the strongest balanced directions.

Source: Daras et al., SMYRF: Efficient Attention using Asymmetric Clustering,
https://arxiv.org/abs/2010.05315, section 3. Unlike the paper, every query is scaled to M, which
changes no order and asks for no largest norm of queries, so that no query knows of later ones; one
more coordinate is then enough. For the same reason queries are not sorted and paired with clusters
of equal size; where the last coordinate shifts all keys of a line alike, which sorting would hide,
the shift is taken back. Rounds are united before the softmax. Lines are drawn once, from the round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.numerics import balance
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors._segment_tokens import Past, Picker, SegmentTokens
from attnplan.kernels.selectors._top_tokens import distinct


@dataclass(frozen=True)
class Smyrf(SegmentTokens):
    """Keep recent keys, sinks, and the keys beside the query on `rounds` random lines."""

    name: ClassVar[str] = "smyrf"
    family: ClassVar[str] = "clustered"
    predictor: ClassVar[str] = "key_norm_ratio"
    cost_is_bound: ClassVar[bool] = True

    rounds: int = 2
    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")
        if not 1 <= self.rounds <= self.top:
            raise ValueError(f"rounds must be between 1 and top {self.top}, got {self.rounds}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for setting in super().choices(shape):
            yield setting if setting.segment == 256 else replace(setting, rank=16)

    def picker(self, inputs: Inputs, blocks: Tensor) -> Picker:
        query, key = balance.coordinates(inputs, inputs.rows(blocks), rank=self.rank)
        lines = _lines(key.shape[3], self.rounds).to(key)
        norm = query.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(query.dtype).tiny)
        asked = query / norm @ lines[:-1]  # [batch, heads, rows, rounds]
        along, norms = key @ lines[:-1], key.norm(dim=-1)

        def pick(past: Past) -> Tensor:
            inside = slice(past.low, past.high)
            norm = norms[past.row, :, inside, None]
            most = norm.amax(1, keepdim=True)
            lift = (most.square() - norm.square()).clamp(min=0).sqrt()
            places = along[past.row, :, inside] + (lift - lift.mean(1, keepdim=True)) * lines[-1]
            wanted = asked[past.row][:, past.queries] * most
            near = beside(wanted.mT, places.mT, self.top // self.rounds)
            return distinct(near.transpose(1, 2).flatten(2) + past.low)

        return pick

    def segment_macs(self, shape: AttentionShape, seen: int, queries: int) -> float:
        return float(self.rounds * seen)

    def once_macs(self, shape: AttentionShape) -> float:
        rank = min(self.rank or shape.head_dim, shape.head_dim)
        return float((shape.queries + shape.keys) * rank * (shape.head_dim + self.rounds))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments) | balance.fit_directions(moments)

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        return fitted if self.rank else balance.without_directions(fitted)


def beside(wanted: Tensor, places: Tensor, count: int) -> Tensor:
    """The `count` points on both sides of some places on a line, int64 [..., n, count].

    Args:
        wanted: [..., n].
        places: of at least `count` points, [..., m].
        count: as many before as after the place, or one more, unless the line ends there.
    """
    line = places.contiguous().sort(dim=-1, stable=True)
    place = torch.searchsorted(line.values, wanted.contiguous())
    first = (place - count // 2).clamp(0, places.shape[-1] - count)
    index = first[..., None] + torch.arange(count, device=places.device)
    return torch.gather(line.indices, -1, index.flatten(-2)).view(index.shape)


@lru_cache(maxsize=64)
def _lines(head_dim: int, rounds: int) -> Tensor:
    """float64 [head_dim + 1, rounds], the same wherever and whenever they are drawn."""
    generator = torch.Generator().manual_seed(0x53F)
    drawn = torch.randn(rounds, head_dim + 1, generator=generator, dtype=torch.float64)
    return drawn.T.contiguous()
