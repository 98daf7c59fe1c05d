"""Multipole centroids: clusters of far keys, each counted at its centre.

Every chunk is clustered by Lloyd's algorithm on its keys as they are; a cluster becomes a slot at
its mean key, with the sum of its values and the number of its keys. By convexity the mass of such a
slot is never above that of its keys.

Source: Hooper et al., Multipole Attention, https://arxiv.org/abs/2506.13059, section 3. Unlike the
paper, clusters are of keys after RoPE and of a chunk, no cluster is opened for single queries (that
is what the near field of the pair does), and clusters begin at keys at equal distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnplan.kernels.approximation import Inputs
from attnplan.kernels.slot_chunks import (
    ChunkCompressor,
    Chunks,
    Summary,
    lloyd,
    pick,
    pooled,
    take,
)

STEPS = 4


@dataclass(frozen=True)
class Multipole(ChunkCompressor):
    """Replace every far chunk of `chunk` keys by `slots` counted cluster centres."""

    name: ClassVar[str] = "multipole"
    predictor: ClassVar[str] = "cluster_inertia"

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        seed, _ = pick(chunks.weight, self.slots, 0.0)
        return pooled(chunks, lloyd(chunks.key, chunks.weight, take(chunks.key, seed), STEPS))

    def build_macs(self, head_dim: int) -> float:
        return float(self.chunk * head_dim * self.slots * (2 * STEPS + 2))
