"""Slots that are clusters of the keys of a chunk.

Clusters are found by Lloyd's algorithm, from different keys that are drawn by systematic sampling
(`pick`, `spread`), so that as many slots as keys are exact; a slot has the mean key and the sums of
masses and values of its cluster. On a GPU all of it is one kernel, a program for every chunk.

With `opened` every query reads the keys of its heaviest clusters themselves, as many clusters as
hold no more than `opened` keys together, in the order of what their slots weigh for the query; an
open cluster's slot is not read.

Source: Hooper et al., Multipole Attention, https://arxiv.org/abs/2506.13059, section 3 (centroids
choose which clusters are attended to exactly, the others are counted at their centroids).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.compressors import _open_clusters as open_clusters
from attnplan.kernels.compressors._chunk_slots import ChunkCompressor, Chunks, Summary, pooled
from attnplan.kernels.contracts.compressor import Kept
from attnplan.kernels.contracts.knobs import LATER, LEAST
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.numerics.clustering import lloyd, pick, spread, take
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import TileList


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
    settings_opened: ClassVar[tuple[tuple[int, int, int], ...]] = ()
    """(chunk, slots, opened) worth trying, in longer texts."""
    is_partition: ClassVar[bool] = True

    opened: int = field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opened < 0:
            raise ValueError(f"opened must not be negative, got {self.opened}")

    @classmethod
    def choices_behind(cls, near: Selector, shape: AttentionShape) -> Iterator[Self]:
        yield from super().choices_behind(near, shape)
        if near.far_compatible and near.recent in cls.windows[:2] and shape.keys >= LEAST:
            for chunk, slots, opened in cls.settings_opened:
                yield cls(chunk, slots, opened=opened)

    @property
    def opens(self) -> bool:
        return self.opened > 0

    @property
    def leaves_out(self) -> bool:
        return not self.opens

    def far(
        self,
        inputs: Inputs,
        floor: Tensor,
        sinks: Sequence[int],
        kept: Tensor | None = None,
        *,
        blocks: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Slots | None, TileList]:
        chunks = self.chunks_before(inputs, floor)
        if not self.opens or not int(chunks.max()):
            return super().far(inputs, floor, sinks, kept, blocks=blocks, tokens=tokens)
        slots = self.compress(inputs, int(chunks.max()), sinks, members=True)
        assert slots is not None
        query = inputs.rows(inputs.all_blocks if blocks is None else blocks)
        words = self.words(chunks, kept)
        return slots, open_clusters.tiles(query, slots, words, self.opened, inputs.scale)

    def cost(
        self, shape: AttentionShape, window: int, sinks: int, kept: Kept | None = None
    ) -> Cost:
        """With `opened`, an upper bound: clusters seldom hold just so many keys."""
        cost = super().cost(shape, window, sinks, kept)
        if not self.opens:
            return cost
        chunks, _ = self.visible(shape, window, sinks)
        far = chunks if kept is None else chunks - kept(chunks)
        read = int((far * self.chunk).clamp(max=self.opened).sum())
        scores = float(self.read(far).sum()) * shape.head_dim
        return cost + Cost(2.0 * shape.head_dim * read, scores)

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        if self.slots == 1:
            return pooled(chunks, torch.ones_like(chunks.weight[..., None]))
        points = chunks.key
        if self.metric_name is not None:
            metric = inputs.fitted_heads(self.metric_name, chunks.head).to(points.dtype)
            points = points @ metric[:, None]
        picked, _ = pick(chunks.weight, self.slots, self.uniform)
        seed = spread(picked, self.chunk)  # coinciding seeds would leave clusters empty
        weight = chunks.weight.sqrt() if self.by_root else chunks.weight
        return pooled(chunks, lloyd(points, weight, take(points, seed), self.steps))

    def build(
        self, inputs: Inputs, chunks: int, sinks: Sequence[int], members: bool = False
    ) -> Slots:
        if not members and inputs.key.is_cuda and inputs.key.dtype != torch.float64:
            made = self.by_kernel(inputs, chunks, sinks)
            if made is not None:
                return made
        return super().build(inputs, chunks, sinks, members)

    def by_kernel(self, inputs: Inputs, chunks: int, sinks: Sequence[int]) -> Slots | None:
        """`build` by one kernel; None where it does not do these sizes or dtypes."""
        from attnplan.kernels.engines.gpu import cluster as gpu_cluster

        how = gpu_cluster.Clustering(self.chunk, self.slots, self.steps, self.uniform, self.by_root)
        if not gpu_cluster.serves(how, inputs):
            return None
        mean, metric = (
            None if name is None else inputs.fitted_heads(name, inputs.head)
            for name in (self.mean_name, self.metric_name)
        )
        return gpu_cluster.compress(how, mean, metric, inputs, chunks, sinks)
