"""Locality-sensitive hashing: every query reads the latest keys of its own buckets.

In balanced, centred coordinates (`balance`) queries and keys are hashed by direction: with a random
matrix R of buckets / 2 columns, h(x) = argmax [xR; -xR]. A query keeps, besides sinks and a window,
in each of `rounds` rounds the `top` latest keys of the bucket that it falls into; a key that it
meets in several rounds counts once. One bucket and enough keys is dense attention.

Source: Kitaev et al., Reformer, https://arxiv.org/abs/2001.04451, section 2. Unlike the paper,
queries and keys are different vectors (hence the balancing, which needs no largest norm and so no
look at later keys); buckets are read by the latest keys instead of in sorted chunks, so that no
query sees what comes after it; rounds are united before the softmax. Norms play no part in the
hash. R is drawn once, from the round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LEAST
from attnplan.kernels.numerics import balance
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.indexing import numbers_on
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import TileList
from attnplan.kernels.operands.token_tiles import pack_tokens
from attnplan.kernels.selectors._single_keys import SingleKeys, row_floor
from attnplan.kernels.selectors._static_pattern import relative_positions
from attnplan.kernels.selectors._top_tokens import distinct
from attnplan.kernels.selectors.window import Window


@dataclass(frozen=True)
class LSH(SingleKeys):
    """Keep sinks, a window, and in each round the `top` latest other keys of the query's bucket."""

    name: ClassVar[str] = "lsh"
    family: ClassVar[str] = "clustered"
    predictor: ClassVar[str] = "effective_keys"
    cost_is_bound: ClassVar[bool] = True

    buckets: int
    rounds: int
    top: int
    window: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.buckets != 1 and (self.buckets < 2 or self.buckets % 2):
            raise ValueError(f"buckets must be 1 or even, got {self.buckets}")
        for knob in ("rounds", "top", "window"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be at least 1, got {getattr(self, knob)}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        most = max(1, shape.keys // 1024) * 32
        for rounds, top, window in ((1, 16, 16), (2, 32, 64), (2, 64, 128), (2, most, 128)):
            if 4 * (window + top) < shape.keys:
                yield cls(16, rounds, top, window)

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        windows = Window(self.window, self.sinks).near(inputs, blocks)
        position = inputs.positions(blocks).flatten()
        high = torch.where(position >= 0, position - self.window + 1, -1)
        tokens = self._tokens(inputs, blocks, high)
        return tile_list.concat([windows, pack_tokens(tokens, inputs.key.shape[2])])

    def chosen(self, inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
        return self._tokens(inputs, blocks, row_floor(inputs, blocks, floor)[:, None, None])

    def keep(self, inputs: Inputs) -> Tensor:
        query, key = self._hashes(inputs, inputs.query)
        i, j = relative_positions(inputs)
        candidate = (j >= self.sinks) & (j <= i - self.window)
        kept = Window(self.window, self.sinks).keep(inputs)
        for r in range(self.rounds):
            same = candidate & (query[:, :, r, :, None] == key[:, :, r, None, :])
            later = same.flip(-1).cumsum(-1).flip(-1)
            kept = kept | (same & (later <= self.top))
        return kept

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound: buckets may hold fewer keys, and rounds may share some."""
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        candidates = (i + 1 - self.window - self.sinks).clamp(min=0)
        return self.cost_beside(shape) + self.chosen_cost(shape, candidates)

    def picked(self, candidates: Tensor) -> Tensor:
        return candidates.clamp(max=self.top * self.rounds)

    def chosen_macs(self, shape: AttentionShape, candidates: Tensor) -> float:
        hashing = self.rounds * self.buckets / 2 * shape.head_dim
        return float(hashing * (shape.queries + shape.keys))

    def tried_with_far(self, shape: AttentionShape) -> bool:
        return shape.keys >= LEAST and (self.rounds, self.top) == (2, 32)

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments)

    def _hashes(self, inputs: Inputs, query: Tensor) -> tuple[Tensor, Tensor]:
        """Buckets of queries and keys, int64 [batch, heads, rounds, queries or keys]."""
        if self.buckets > 1 and not _on_gpu(query):
            onto = _rotations(query.shape[3], self.rounds, self.buckets)
            both = balance.coordinates(inputs, query, onto=onto)
            query, key = (self._largest(turned) for turned in both)
        else:
            query, key = (self._bucket(x) for x in balance.coordinates(inputs, query))
        return query, key

    def _bucket(self, x: Tensor) -> Tensor:
        if self.buckets == 1:
            size = (*x.shape[:2], self.rounds, x.shape[2])
            return torch.zeros(size, dtype=torch.int64, device=x.device)
        if _on_gpu(x):
            from attnplan.kernels.engines.gpu import nearest as gpu_nearest

            turns = _rotations_on(x.shape[3], self.rounds, self.buckets, x.dtype, x.device)
            return gpu_nearest.hash_codes(x, turns, self.rounds)
        return self._largest(x @ _rotations(x.shape[3], self.rounds, self.buckets).to(x))

    def _largest(self, turned: Tensor) -> Tensor:
        """Buckets of rows times R, [batch, heads, rows, rounds * buckets / 2]."""
        turned = turned.unflatten(3, (self.rounds, -1)).transpose(2, 3)
        return torch.cat([turned, -turned], dim=-1).argmax(-1)

    def _tokens(self, inputs: Inputs, blocks: Tensor, high: Tensor) -> Tensor:
        """Chosen keys, int32 [batch, heads, 64 * len(blocks), rounds * top], -1 for none.

        `high` ends the keys to choose from, broadcastable to [batch, heads, rounds, queries].
        """
        query, key = self._hashes(inputs, inputs.rows(blocks))
        keys = inputs.key.shape[2]
        device = key.device
        # keys in order of (bucket, position): a bucket is a run, its latest keys are at the end
        spelled = key * keys + torch.arange(keys, device=device)
        order = spelled.sort(-1).values
        start = numbers_on(inputs.start, device)[:, None, None, None]
        low = (start + self.sinks).expand_as(query)
        high = torch.maximum(high.expand_as(query), low)
        first = torch.searchsorted(order, (query * keys + low).contiguous())
        end = torch.searchsorted(order, (query * keys + high).contiguous())
        place = end[..., None] - 1 - torch.arange(self.top, device=device)
        there = place >= first[..., None]
        found = torch.gather(order, -1, place.clamp(min=0).flatten(3)).view(place.shape) % keys
        found = torch.where(there, found, -1)  # [batch, heads, rounds, queries, top]
        return distinct(found.transpose(2, 3).flatten(3)).to(torch.int32)


def _on_gpu(x: Tensor) -> bool:
    """Whether one kernel turns and compares."""
    return x.is_cuda and x.dtype != torch.float64


@lru_cache(maxsize=64)
def _rotations(head_dim: int, rounds: int, buckets: int) -> Tensor:
    """float64 [head_dim, rounds * buckets / 2], the same wherever and whenever it is drawn."""
    generator = torch.Generator().manual_seed(0x15A)
    shape = (rounds, head_dim, buckets // 2)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.transpose(0, 1).flatten(1)


@lru_cache(maxsize=64)
def _rotations_on(
    head_dim: int, rounds: int, buckets: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`_rotations` as a device computes with them, moved there once."""
    return _rotations(head_dim, rounds, buckets).to(device, dtype)
