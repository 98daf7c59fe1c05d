"""Clusters weighted for the queries to come (`centroid-T`).

Far keys are cut into chunks of `chunk`; each chunk is clustered into `slots` pseudo-keys. With a
calibrated mean query m, e^{q.k} = e^{(q-m).k} e^{m.k}: the second factor W = e^{m.k} is a weight
that no longer depends on the query. Clusters are formed by a few Lloyd steps on S_q^1/2 k
(distances as queries see them) with weights W^1/2, and a cluster becomes the slot

    k~ = sum W k / sum W    value = sum W v    mass = sum W    log-weight b = -m.k~

which reproduces its keys exactly as they coincide. A query block reads the complete chunks that lie
before its window; the keys between them and the window stay near.

Sources: Hooper et al., Multipole Attention, https://arxiv.org/abs/2506.13059 (clusters as far
field); the absorption of the mean query and the metric are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.approximation import (
    AttentionShape,
    Compressor,
    Cost,
    Inputs,
    Moments,
    Slots,
)
from attnplan.kernels.tile_list import BLOCK, FULL, SLOTS, TileList

STEPS = 3


@dataclass(frozen=True)
class CentroidT(Compressor):
    """Replace every far chunk of `chunk` keys by `slots` weighted cluster centres."""

    name: ClassVar[str] = "centroid_t"
    predictor: ClassVar[str] = "cluster_inertia"

    chunk: int = 256
    slots: int = 16

    def __post_init__(self) -> None:
        if self.chunk < BLOCK:
            raise ValueError(f"chunk must be at least {BLOCK} keys, got {self.chunk}")
        if not 1 <= self.slots <= self.chunk:
            raise ValueError(f"slots must be between 1 and chunk {self.chunk}, got {self.slots}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for chunk, slots in ((64, 8), (256, 16)):
            if 3 * chunk <= shape.keys:
                yield cls(chunk, slots)

    def floor(self, inputs: Inputs, blocks: Tensor, window: int) -> Tensor:
        start = torch.tensor(inputs.start, device=blocks.device)[:, None]
        outside = blocks * BLOCK + inputs.offset - start - window + 1
        return start + outside.clamp(min=0) // self.chunk * self.chunk

    def far(
        self, inputs: Inputs, floor: Tensor, sinks: Sequence[int]
    ) -> tuple[Slots | None, TileList]:
        start = torch.tensor(inputs.start, device=floor.device)[:, None, None]
        chunks = (floor - start) // self.chunk  # [batch, heads, blocks]
        most = int(chunks.max())
        slots = self._cluster(inputs, most, sinks) if most else None
        return slots, _slot_tiles(chunks * self.slots)

    def cost(self, shape: AttentionShape, window: int, sinks: int) -> Cost:
        row = torch.arange(shape.queries)
        first = row // BLOCK * BLOCK + shape.keys - shape.queries
        chunks = (first - window + 1).clamp(min=0) // self.chunk
        # keys between the chunks and the window, which the pair keeps near
        reached = torch.clamp(chunks * self.chunk, min=sinks)
        more = (row + shape.keys - shape.queries + 1 - window - reached).clamp(min=0)
        pairs = int((chunks * self.slots + more).sum())
        clustered = int(chunks.max()) * self.chunk
        metric = shape.head_dim + 1  # keys to the query metric, and their weights
        step = 2 * self.slots  # distances and means
        build = clustered * shape.head_dim * (metric + step * STEPS + self.slots + 2)
        return Cost(2.0 * shape.head_dim * pairs, float(build))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        values, vectors = torch.linalg.eigh(moments.query_gram.double())
        root = vectors * values.clamp(min=0).sqrt()[:, None, :] @ vectors.mT
        return {
            "centroid_t.query_mean": moments.query_mean.float(),
            "centroid_t.metric": root.float(),
        }

    def _cluster(self, inputs: Inputs, chunks: int, sinks: Sequence[int]) -> Slots:
        """Slots of the first `chunks` chunks, padded to whole tiles of 64."""
        heads = list(inputs.head)
        wide = torch.promote_types(inputs.key.dtype, torch.float32)
        mean = inputs.fitted_tensor("centroid_t.query_mean")[heads].to(wide)
        metric = inputs.fitted_tensor("centroid_t.metric")[heads].to(wide)
        key, value = (self._chunks(inputs, t, chunks).to(wide) for t in (inputs.key, inputs.value))

        log_w = (key * mean[:, None, None]).sum(-1) * inputs.scale  # [batch, heads, chunks, chunk]
        position = torch.arange(chunks * self.chunk, device=key.device).view(chunks, self.chunk)
        kept = torch.tensor(list(sinks), device=key.device)[:, None, None]
        log_w = log_w.masked_fill(position < kept, float("-inf"))
        shift = log_w.amax(-1, keepdim=True)
        shift = torch.where(shift.isfinite(), shift, 0.0)
        weight = (log_w - shift).exp()

        member = self._assign(key @ metric[:, None], weight)  # [..., chunk, slots], one-hot
        share = member * weight[..., None]
        mass = share.sum(-2)  # [..., slots]
        centre = share.mT @ key / mass.clamp(min=torch.finfo(wide).tiny)[..., None]
        log_weight = shift - (centre * mean[:, None, None]).sum(-1) * inputs.scale
        log_weight = log_weight.masked_fill(mass == 0, float("-inf"))
        flat = [t.flatten(2, 3) for t in (centre, log_weight, mass, share.mT @ value)]
        fill = -flat[0].shape[2] % BLOCK
        pad = torch.nn.functional.pad
        return Slots(
            pad(flat[0], (0, 0, 0, fill)),
            pad(flat[1], (0, fill), value=float("-inf")),
            pad(flat[2], (0, fill)),
            pad(flat[3], (0, 0, 0, fill)),
            torch.arange(len(heads), dtype=torch.int32, device=key.device),
        )

    def _chunks(self, inputs: Inputs, rows: Tensor, chunks: int) -> Tensor:
        """Keys or values by chunk, [batch, heads, chunks, chunk, dim]."""
        parts = [
            rows[b, :, start : start + chunks * self.chunk] for b, start in enumerate(inputs.start)
        ]
        length = chunks * self.chunk  # padded sequences have fewer chunks: theirs end in zeros
        parts = [torch.nn.functional.pad(p, (0, 0, 0, length - p.shape[1])) for p in parts]
        return torch.stack(parts)[:, list(inputs.kv_head)].unflatten(2, (chunks, self.chunk))

    def _assign(self, points: Tensor, weight: Tensor) -> Tensor:
        """One-hot cluster membership [..., chunk, slots] after a few weighted Lloyd steps."""
        lloyd = weight.sqrt()
        # seeds: systematic sampling, half by weight, half uniform
        share = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        cumulative = (0.5 * share + 0.5 / self.chunk).cumsum(-1)
        quantile = (torch.arange(self.slots, device=points.device) + 0.5) / self.slots
        quantile = quantile.to(cumulative.dtype).expand(*cumulative.shape[:-1], self.slots)
        seed = torch.searchsorted(cumulative, quantile.contiguous()).clamp(max=self.chunk - 1)
        centre = torch.gather(points, -2, seed[..., None].expand(*seed.shape, points.shape[-1]))
        member = torch.zeros(*weight.shape, self.slots, dtype=points.dtype, device=points.device)
        for _ in range(STEPS):
            # |x - c|^2 without |x|^2, which is the same for all centres
            distance = (centre * centre).sum(-1)[..., None, :] - 2 * points @ centre.mT
            member = torch.zeros_like(distance).scatter_(-1, distance.argmin(-1, keepdim=True), 1.0)
            share = member * lloyd[..., None]
            total = share.sum(-2)[..., None]
            moved = share.mT @ points / total.clamp(min=torch.finfo(points.dtype).tiny)
            centre = torch.where(total > 0, moved, centre)  # an empty cluster stays where it is
        return member


def _slot_tiles(visible: Tensor) -> TileList:
    """Slot tiles: a query block reads the first `visible[batch, head, block]` slots."""
    batch, heads, count = visible.shape
    device = visible.device
    tile = torch.arange(-(-int(visible.max()) // BLOCK), device=device)
    rest = visible[..., None] - tile * BLOCK
    b, h, row, index = torch.nonzero(rest > 0, as_tuple=True)
    left = rest[b, h, row, index]
    mask = torch.where(left >= BLOCK, FULL, left)
    tiles = torch.stack([torch.full_like(index, SLOTS), index, mask], dim=1)
    ramp = torch.arange(BLOCK, device=device)
    words = tile_list.pack_bits(ramp[None, :] < ramp[:, None])  # word n has the n lowest bits set
    masks = words[:, None].expand(-1, BLOCK).contiguous()
    gather = torch.zeros(0, BLOCK, dtype=torch.int32, device=device)
    rows = (b * heads + h) * count + row
    return tile_list.from_rows(batch, heads, count, rows, tiles, gather, masks)
