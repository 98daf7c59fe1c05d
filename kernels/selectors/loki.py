"""Loki-style token selection: every query reads the single keys that score best in few dimensions.

Queries and keys are projected to `rank` dimensions in which their products are best preserved on
calibration text; each query keeps, besides sinks and a window, the `top` keys of the rest with the
largest projected product, and attends to them exactly.

Source: Singhania et al., Loki: Low-rank Keys for Efficient Sparse Attention,
https://arxiv.org/abs/2406.02542, algorithm 1. Unlike the paper, which takes principal components of
the keys, the projection weighs both sides: with second moments S_q of the queries (summed over the
group) and S_k of the centred keys, and S_q^1/2 S_k^1/2 = U S V^T, the maps S^-1/2 V^T S_k^1/2 for
queries and S^-1/2 U^T S_q^1/2 for keys give q.k exactly at full rank, and the least mean squared
error of q.k at any other (as in KQ-SVD, https://arxiv.org/abs/2512.05916). Scores are computed in
float32; ties go to the earlier key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LEAST
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.indexing import numbers_on
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK, TileList
from attnplan.kernels.operands.token_tiles import pack_tokens
from attnplan.kernels.selectors._single_keys import SingleKeys, row_floor
from attnplan.kernels.selectors._static_pattern import relative_positions
from attnplan.kernels.selectors._top_tokens import best, top_tokens
from attnplan.kernels.selectors.window import Window


@dataclass(frozen=True)
class Loki(SingleKeys):
    """Keep sinks, a window, and the `top` other keys that score best in `rank` dimensions."""

    name: ClassVar[str] = "loki"
    selects_together: ClassVar[bool] = True
    predictor: ClassVar[str] = "score_rank95"

    rank: int
    top: int
    window: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        for knob in ("rank", "top", "window"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be at least 1, got {getattr(self, knob)}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for rank, top, window in (
            *((8, 16, 32), (8, 64, 32), (8, 128, 32), (8, 128, 128), (8, 32, 512)),
            *((16, 32, 32), (16, 64, 32), (16, 128, 32), (16, 128, 128), (16, 32, 512)),
            *((32, 64, 32), (32, 128, 32), (32, 128, 128)),
        ):
            if rank < shape.head_dim and window + top < shape.keys // 2:
                yield cls(rank, top, window)

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        return self.select([self] * len(inputs.head), inputs, blocks)

    @classmethod
    def select(cls, selectors: Sequence[Self], inputs: Inputs, blocks: Tensor) -> TileList:
        windows = Window.select([Window(s.window, s.sinks) for s in selectors], inputs, blocks)
        position = inputs.positions(blocks).flatten()  # -1 past the last query
        window = numbers_on(tuple(s.window for s in selectors), position.device)[:, None]
        high = torch.where(position >= 0, position - window + 1, -1)
        tokens = _tokens(selectors, inputs, blocks, high)
        return tile_list.concat([windows, pack_tokens(tokens, inputs.key.shape[2])])

    def chosen(self, inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
        high = row_floor(inputs, blocks, floor)[:, None]
        return _tokens([self] * len(inputs.head), inputs, blocks, high)

    def keep(self, inputs: Inputs) -> Tensor:
        query_map, key_map = self.maps(inputs)
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        query = inputs.query.to(wide) @ query_map.to(wide)
        key = (inputs.key.to(wide) @ key_map.to(wide))[:, list(inputs.kv_head)]
        i, j = relative_positions(inputs)
        candidate = (j >= self.sinks) & (j <= i - self.window)
        chosen = best(query @ key.mT, candidate, self.top)
        return chosen | Window(self.window, self.sinks).keep(inputs)

    def cost(self, shape: AttentionShape) -> Cost:
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        candidates = (i + 1 - self.window - self.sinks).clamp(min=0)
        return self.cost_beside(shape) + self.chosen_cost(shape, candidates)

    def picked(self, candidates: Tensor) -> Tensor:
        return candidates.clamp(max=self.top)

    def chosen_macs(self, shape: AttentionShape, candidates: Tensor) -> float:
        project = (shape.queries + shape.keys / shape.group) * shape.head_dim
        return self.rank * (float(candidates.sum()) + project)

    def tried_with_far(self, shape: AttentionShape) -> bool:
        """With a short window, which the keys since the floor make longer."""
        return shape.keys >= LEAST and self.window == 32 and self.top == 64 and self.rank < 32

    def misfit(self, head_dim: int) -> str | None:
        if self.rank <= head_dim:
            return None
        return f"rank must be at most {head_dim}, the dimensions of a head, got {self.rank}"

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        heads, head_dim = moments.query_mean.shape
        kv_heads = moments.key_mean.shape[0]
        group = heads // kv_heads
        query = moments.query_gram.double().view(kv_heads, group, head_dim, head_dim).sum(1)
        mean = moments.key_mean.double()
        key = moments.key_gram.double() - mean[:, :, None] * mean[:, None, :]
        query_root, key_root = _root(query), _root(key)
        left, singular, right = torch.linalg.svd(query_root @ key_root)
        inverse = singular.rsqrt()[:, None, :]
        return {
            "loki.query_map": (key_root @ right.mT * inverse).float(),
            "loki.key_map": (query_root @ left * inverse).float(),
        }

    def maps(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Projections of queries [heads, head_dim, rank] and keys [kv_heads, head_dim, rank]."""
        query_map = inputs.fitted_tensor("loki.query_map")[list(inputs.kv_head), :, : self.rank]
        return query_map, inputs.fitted_tensor("loki.key_map")[:, :, : self.rank]


def _tokens(selectors: Sequence[Loki], inputs: Inputs, blocks: Tensor, high: Tensor) -> Tensor:
    """The keys that every query of every head chooses; int32 [batch, heads, queries, most].

    Args:
        selectors: one per head.
        inputs: the call.
        blocks: which blocks of 64 query rows to answer for.
        high: end of the keys to choose from, broadcastable to [batch, heads, 64 * len(blocks)].
    """
    widest = max(selectors, key=lambda s: s.rank)
    query_map, key_map = widest.maps(inputs)
    device = high.device
    start = numbers_on(inputs.start, device)[:, None, None]
    sinks = numbers_on(tuple(s.sinks for s in selectors), device)[:, None]
    low = (start + sinks).expand(len(inputs.start), len(selectors), BLOCK * len(blocks))
    return top_tokens(
        inputs.rows(blocks).float() @ query_map,
        inputs.key.float() @ key_map,
        kv_head=inputs.kv_head,
        low=low,
        high=high.expand_as(low),
        top=[s.top for s in selectors],
        rank=[s.rank for s in selectors],
    )


def _root(gram: Tensor) -> Tensor:
    """Symmetric square root of [n, d, d] Grams, with a relative floor under the eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values.amax(-1, keepdim=True).clamp(min=1e-30) * 1e-10
    return vectors * torch.maximum(values, floor).sqrt()[:, None, :] @ vectors.mT
