"""Multipole centroids: clusters of far keys, each counted at its centre.

Every chunk is clustered by Lloyd's algorithm on its keys as they are; a cluster becomes a slot at
its mean key, with the sum of its values and the number of its keys. By convexity the mass of such a
slot is never above that of its keys. With two levels, the slots of every `GROUP` chunks are
clustered again into as many slots as one chunk has; a query block reads these for the groups that
end at least one group before its far field ends, and the slots of chunks for the rest.

Source: Hooper et al., Multipole Attention, https://arxiv.org/abs/2506.13059, section 3. Unlike the
paper, clusters are of keys after RoPE and of a chunk, those of one level alone are opened
(`_clustered_chunks`), for every query instead of a group, and clusters begin at keys at equal
distances, those of the second level at slots that are heavy and far from each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import Summary, slot_tiles, whole_tiles
from attnplan.kernels.compressors._clustered_chunks import ClusterCompressor
from attnplan.kernels.contracts.compressor import Kept
from attnplan.kernels.numerics import query_draws
from attnplan.kernels.numerics.clustering import lloyd, take
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, TileList

STEPS = 4
GROUP = 4
"""Chunks that a slot of the second level covers."""
LONG = 4096
"""Keys from which two levels are worth trying."""


@dataclass(frozen=True)
class Multipole(ClusterCompressor):
    """Replace every far chunk of `chunk` keys by `slots` counted cluster centres."""

    name: ClassVar[str] = "multipole"
    predictor: ClassVar[str] = "cluster_inertia"
    settings: ClassVar[tuple[tuple[int, int], ...]] = ((128, 16),)
    matched: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": 128, "slots": 16, "references": 16},
        {"chunk": 64, "slots": 4, "references": 16},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "slots": 1, "references": 8},)

    windows: ClassVar[tuple[int, ...]] = (32, 128)

    steps: ClassVar[int] = STEPS
    uniform: ClassVar[float] = 0.0
    by_root: ClassVar[bool] = False
    settings_opened: ClassVar[tuple[tuple[int, int, int], ...]] = ((64, 2, 32), (64, 4, 64))

    levels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels not in (1, 2):
            raise ValueError(f"levels must be 1 or 2, got {self.levels}")
        if self.levels > 1 and self.opened:
            raise ValueError(f"clusters are opened with levels 1 alone, got {self.levels}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for setting in super().choices(shape):
            yield setting
            if shape.keys >= LONG:
                yield replace(setting, levels=2)

    @property
    def separable(self) -> bool:
        return self.levels == 1

    @property
    def leaves_out(self) -> bool:
        return super().leaves_out and self.levels == 1

    @property
    def grows(self) -> bool:
        return self.levels == 1  # slots of groups come after those of all chunks

    def compress(
        self, inputs: Inputs, chunks: int, sinks: Sequence[int], members: bool = False
    ) -> Slots | None:
        slots, most = super().compress(inputs, chunks, sinks, members), self._groups(chunks)
        if slots is None or not most:
            return slots
        coarse = coarser(slots, most, GROUP * self.slots, self.slots)
        names = ("key", "log_weight", "weight", "value")
        both = {n: torch.cat([getattr(slots, n), getattr(coarse, n)], 2) for n in names}
        return replace(slots, **both)

    def far_tiles(self, inputs: Inputs, floor: Tensor, kept: Tensor | None = None) -> TileList:
        chunks = self.chunks_before(inputs, floor)
        most = int(chunks.max())
        if not self._groups(most):
            return super().far_tiles(inputs, floor, kept)
        groups = self._groups_of(chunks)
        fine = slot_tiles(groups * GROUP * self.slots, chunks * self.slots)
        # slots of groups come after those of chunks, which fill whole tiles
        first = torch.full_like(groups, -(-most * self.slots // BLOCK) * BLOCK)
        return tile_list.concat([fine, slot_tiles(first, first + groups * self.slots)])

    def read(self, chunks: Tensor) -> Tensor:
        return (chunks - (GROUP - 1) * self._groups_of(chunks)) * self.slots

    def build_macs(self, head_dim: int) -> float:
        if self.slots == 1:  # all keys are one cluster
            return float(self.chunk * head_dim * 2)
        return float(self.chunk * head_dim * self.slots * (2 * STEPS + 2))

    def cost(
        self, shape: AttentionShape, window: int, sinks: int, kept: Kept | None = None
    ) -> Cost:
        groups = self._groups_of(self.visible(shape, window, sinks)[0])
        one = GROUP * self.slots * shape.head_dim * self.slots * (2 * STEPS + 3)
        return super().cost(shape, window, sinks, kept) + Cost(0.0, float(groups.max() * one))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return query_draws.fit(moments)

    def _groups(self, chunks: int) -> int:
        """How many groups are read at the second level where `chunks` chunks are read in all."""
        return max(chunks // GROUP - 1, 0) * (self.levels - 1)

    def _groups_of(self, chunks: Tensor) -> Tensor:
        """`_groups`, number by number."""
        return (chunks // GROUP - 1).clamp(min=0) * (self.levels - 1)


def coarser(slots: Slots, groups: int, count: int, kept: int) -> Slots:
    """`kept` slots for each of the first `groups` times `count` slots of every head.

    Masses and values of the slots that come together are added, so that their sums over a group
    stay. Log-weights must be zero, or -inf for an empty slot.
    """
    key, weight, value = (
        t[:, :, : groups * count].unflatten(2, (groups, count))
        for t in (slots.key, slots.weight, slots.value)
    )
    seed = _apart(key, weight, kept)
    member = lloyd(key, weight, take(key, seed), STEPS)
    share = member * weight[..., None]
    mass = share.sum(-2)
    centre = share.mT @ key / mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
    return whole_tiles(Summary(centre, mass, member.mT @ value), torch.zeros_like(mass))


def _apart(points: Tensor, weight: Tensor, count: int) -> Tensor:
    """`count` points, each the one with the most weight times squared distance to those before."""
    picked = torch.zeros(*weight.shape[:-1], count, dtype=torch.int64, device=points.device)
    picked[..., 0] = weight.argmax(-1)
    nearest = torch.full_like(weight, float("inf"))
    for step in range(1, count):
        distance = (points - take(points, picked[..., step - 1, None])).square().sum(-1)
        nearest = torch.minimum(nearest, distance)
        picked[..., step] = (weight * nearest).argmax(-1)
    return picked
