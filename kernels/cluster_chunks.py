"""Slots that are clusters of the keys of a chunk.

Clusters are found by Lloyd's algorithm, from keys that are drawn by systematic sampling (`pick`); a
slot has the mean key and the sums of masses and values of its cluster. On a GPU all of it is one
kernel, a program for every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnplan.kernels.approximation import Inputs, Slots
from attnplan.kernels.slot_chunks import (
    ChunkCompressor,
    Chunks,
    Summary,
    lloyd,
    pick,
    pooled,
    take,
)


@dataclass(frozen=True)
class ClusterCompressor(ChunkCompressor):
    """A compressor that clusters the keys of every chunk."""

    steps: ClassVar[int]
    """Of Lloyd's algorithm."""
    uniform: ClassVar[float]
    """Share of equal chances among those by which the first centres are drawn."""
    by_root: ClassVar[bool]
    """Keys weigh in Lloyd's algorithm with the square roots of their masses, else with these."""
    metric_name: ClassVar[str | None] = None
    """Fitted matrices [heads, head_dim, head_dim]: distances are those of keys times them."""

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        points = chunks.key
        if self.metric_name is not None:
            metric = inputs.fitted_heads(self.metric_name, chunks.head).to(points.dtype)
            points = points @ metric[:, None]
        seed, _ = pick(chunks.weight, self.slots, self.uniform)
        weight = chunks.weight.sqrt() if self.by_root else chunks.weight
        return pooled(chunks, lloyd(points, weight, take(points, seed), self.steps))

    def compress(self, inputs: Inputs, chunks: int, sinks: Sequence[int]) -> Slots | None:
        if chunks and inputs.key.is_cuda and inputs.key.dtype != torch.float64:
            from attnplan.kernels.engines import cluster_triton

            if cluster_triton.serves(self, inputs):
                return cluster_triton.compress(self, inputs, chunks, sinks)
        return super().compress(inputs, chunks, sinks)
