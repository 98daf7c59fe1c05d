"""Attention matching: a few far keys, with weights and values fitted to reference queries.

Of every chunk the `slots` keys with the largest mean squared weight for the reference queries stay.
Their weights B make up for the mass of the others, their values C for the values of the others:

    P = softmax of all keys of the chunk [queries, chunk], P_S its columns of the kept keys
    B = argmin |P_S B - 1|^2                      B >= 0
    C = argmin |X C - P V|^2 + r |C - V_S|^2      X = P_S B, rows divided by their sums

so that mass errors are relative to the mass of a query. Exact with as many slots as keys.

Source: Zweiger et al., Fast KV compaction via attention matching, 2026 (highest attention keys,
non-negative weights, values by least squares). Unlike the paper, reference queries are `queries`
fixed draws from a normal distribution with the mean and covariance of the head's queries on
calibration text, a chunk is fitted at a time, rows are relative, weights are bounded by a multiple
of the keys per slot, values are drawn towards those of the kept keys, and the weights are found by
accelerated projected gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import ChunkCompressor, Chunks, Summary
from attnplan.kernels.numerics import query_draws
from attnplan.kernels.numerics.clustering import take
from attnplan.kernels.operands.inputs import Inputs, Moments

DRAWS = 64
STEPS = 40
RIDGE = 1e-2
"""Of the trace of X^T X."""
MOST = 4.0
"""Largest weight of a slot, over the keys per slot."""


@dataclass(frozen=True)
class AttentionMatching(ChunkCompressor):
    """Replace every far chunk of `chunk` keys by `slots` of them, fitted to `queries` queries."""

    name: ClassVar[str] = "attention_matching"
    predictor: ClassVar[str] = "effective_keys"
    windows: ClassVar[tuple[int, ...]] = (32, 128, 512)
    settings: ClassVar[tuple[tuple[int, int], ...]] = ((128, 16),)
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": 64, "slots": 1, "queries": 8},
        {"chunk": 64, "slots": 4, "queries": 32},
    )

    queries: int = DRAWS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.queries <= DRAWS:
            raise ValueError(f"queries must be between 1 and {DRAWS}, got {self.queries}")

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        reference = inputs.fitted_heads("attention_matching.queries", chunks.head)
        reference = reference[:, None, : self.queries].to(chunks.key.dtype)
        kept = chunks.weight > 0
        logits = (reference @ chunks.key.mT) * chunks.scale  # [..., queries, chunk]
        logits = logits.masked_fill(~kept[..., None, :], torch.finfo(logits.dtype).min)
        share = logits.softmax(-1)
        best = share.square().mean(-2).masked_fill(~kept, -1.0).topk(self.slots, -1).indices
        columns = take(share.mT, best).mT
        weight = match_mass(columns, MOST * self.chunk / self.slots)
        value = _match_values(columns * weight[..., None, :], share, chunks.value, best)
        weight = torch.where(kept.gather(-1, best), weight, 0.0)
        return Summary(take(chunks.key, best), weight, value * weight[..., None])

    def build_macs(self, head_dim: int) -> float:
        shares = self.queries * self.chunk * (head_dim + 1)
        weights = self.slots**2 * (self.queries + STEPS)
        means = self.queries * (self.chunk + self.slots) * head_dim
        solve = self.slots**2 * (self.queries + self.slots / 3 + head_dim)
        return float(shares + weights + means + self.slots * self.queries * head_dim + solve)

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return {"attention_matching.queries": query_draws.draw(moments, DRAWS).float()}


def match_mass(columns: Tensor, most: float) -> Tensor:
    """The weights B in [0, most] that minimise |columns B - 1|^2, [..., slots].

    Accelerated projected gradients, with the row sums of the Gram matrix for step sizes (they
    bound it, as it has no negative entry). Where `columns` has all keys B is 1 from the start.

    Args:
        columns: shares of the kept keys [..., queries, slots], not negative.
        most: largest weight.
    """
    gram = columns.mT @ columns
    target = columns.sum(-2)
    tiny = torch.finfo(columns.dtype).tiny
    step = 1 / gram.sum(-1).clamp(min=tiny)
    even = columns.sum(-1).sum(-1) / columns.sum(-1).square().sum(-1).clamp(min=tiny)
    weight = even.clamp(max=most)[..., None].expand(target.shape)
    ahead, pace = weight, 1.0
    for _ in range(STEPS):
        slope = (gram @ ahead[..., None])[..., 0] - target
        moved = (ahead - step * slope).clamp(0.0, most)
        faster = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead = moved + (pace - 1) / faster * (moved - weight)
        weight, pace = moved, faster
    return weight


def _match_values(mixed: Tensor, share: Tensor, value: Tensor, best: Tensor) -> Tensor:
    """Values C of the kept keys, [..., slots, value_dim].

    Args:
        mixed: shares of the kept keys times their weights [..., queries, slots].
        share: of all keys [..., queries, chunk].
        value: [..., chunk, value_dim].
        best: the kept keys.
    """
    tiny = torch.finfo(mixed.dtype).tiny
    mixed = mixed / mixed.sum(-1, keepdim=True).clamp(min=tiny)
    own = take(value, best)
    gram = mixed.mT @ mixed
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=tiny)
    gram = gram + torch.diag_embed(ridge[..., None].expand(gram.shape[:-1]))
    missing = mixed.mT @ (share @ value - mixed @ own)
    # waits for no answer: where rounding left nothing to factor, values stay those of the keys
    factor, failed = torch.linalg.cholesky_ex(gram)
    more = torch.cholesky_solve(missing, factor)
    return own + more.masked_fill((failed != 0)[..., None, None], 0.0)
