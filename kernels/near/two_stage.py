"""Two-stage token selection: blocks of keys by a bound, then single keys inside them.

Queries and keys are projected as in `loki`. A block of 16 keys keeps the largest and the smallest
of each projected coordinate, so that no key of it scores more than

    sum over c of max(q_c M_c, q_c m_c)

A query reads the bounds of all blocks, scores the keys of the `blocks` most promising ones, and
keeps, besides sinks and a window, the `top` best. Per key that is 2 rank / 16 multiply-adds
instead of rank.

Sources: the projection of Singhania et al., Loki, https://arxiv.org/abs/2406.02542; the bound of
Tang et al., Quest, https://arxiv.org/abs/2406.10774, section 3.3. Unlike Quest, blocks are only a
sieve: single keys are read, not blocks. The window is at least a block, so that no bound knows of
later keys. Scores are computed in float32; ties go to the earlier block and key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.approximation import AttentionShape, Cost, Inputs, Moments, Selector
from attnplan.kernels.block_sieve import SIEVE, sieved_tokens
from attnplan.kernels.near.loki import Loki
from attnplan.kernels.near.window import Window
from attnplan.kernels.pattern import relative_positions, window_pairs
from attnplan.kernels.tile_list import TileList
from attnplan.kernels.token_selection import best, pack_tokens


@dataclass(frozen=True)
class TwoStage(Selector):
    """Keep sinks, a window, and the `top` best keys of the `blocks` most promising blocks."""

    name: ClassVar[str] = "two_stage"
    predictor: ClassVar[str] = "score_rank95"

    rank: int
    blocks: int
    top: int
    window: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        for knob in ("rank", "blocks", "top"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be at least 1, got {getattr(self, knob)}")
        if self.blocks * SIEVE < self.top + 2 * SIEVE:  # the first and last may be nearly empty
            raise ValueError(
                f"blocks must be at least {-(-self.top // SIEVE) + 2} for top {self.top}, got "
                f"{self.blocks}"
            )
        if self.window < SIEVE:
            raise ValueError(f"window must be at least {SIEVE} keys, got {self.window}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for rank, blocks, top, window in (
            *((8, 8, 32, 32), (8, 16, 32, 32), (8, 16, 32, 128), (8, 16, 64, 32)),
            *((16, 8, 32, 32), (16, 16, 64, 32), (16, 16, 64, 128)),
            *((16, 32, 128, 32), (16, 32, 128, 128), (32, 8, 32, 128), (32, 16, 64, 32)),
        ):
            if rank < shape.head_dim and 2 * (window + blocks * SIEVE) < shape.keys:
                yield cls(rank, blocks, top, window)

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        windows = Window(self.window, self.sinks).near(inputs, blocks)
        query_map, key_map = self._loki.maps(inputs)
        position = inputs.positions(blocks).flatten()  # -1 past the last query
        high = torch.where(position >= 0, position - self.window + 1, -1)
        tokens = sieved_tokens(
            inputs.rows(blocks).float() @ query_map,
            inputs.key.float() @ key_map,
            kv_head=inputs.kv_head,
            start=inputs.start,
            sinks=self.sinks,
            high=high,
            blocks=self.blocks,
            top=self.top,
        )
        return tile_list.concat([windows, pack_tokens(tokens, inputs.key.shape[2])])

    def keep(self, inputs: Inputs) -> Tensor:
        query_map, key_map = self._loki.maps(inputs)
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        query = inputs.query.to(wide) @ query_map.to(wide)
        key = (inputs.key.to(wide) @ key_map.to(wide))[:, list(inputs.kv_head)]
        i, j = relative_positions(inputs)
        candidate = ((j >= self.sinks) & (j <= i - self.window)).expand(len(key), -1, -1, -1)
        chosen = [
            self._chosen(query[b, :, :], key[b, :, start:], candidate[b, :, :, start:])
            for b, start in enumerate(inputs.start)
        ]
        keys = key.shape[2]
        padded = [torch.nn.functional.pad(c, (keys - c.shape[-1], 0)) for c in chosen]
        return torch.stack(padded) | Window(self.window, self.sinks).keep(inputs)

    def _chosen(self, query: Tensor, key: Tensor, candidate: Tensor) -> Tensor:
        """Of one sequence without padding, bool [heads, queries, keys]."""
        keys = key.shape[1]
        run = torch.arange(keys, device=key.device) // SIEVE
        bound = torch.full((*query.shape[:2], int(run.max()) + 1), float("-inf")).to(query)
        for block in range(bound.shape[-1]):
            rows = key[:, run == block]
            high = query.clamp(min=0) @ rows.amax(1)[..., None]
            bound[..., block] = (high + query.clamp(max=0) @ rows.amin(1)[..., None])[..., 0]
        holds = torch.nn.functional.pad(candidate, (0, -keys % SIEVE)).unflatten(-1, (-1, SIEVE))
        sieve = best(bound, holds.any(-1), self.blocks)
        within = sieve.repeat_interleave(SIEVE, -1)[..., :keys] & candidate
        return best(query @ key.mT, within, self.top)

    def cost(self, shape: AttentionShape) -> Cost:
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        candidates = (i + 1 - self.window - self.sinks).clamp(min=0)
        chosen = int(candidates.clamp(max=self.top).sum())
        pairs = chosen + window_pairs(shape, self.window, self.sinks)
        read = (i + 1 - self.window).clamp(min=0) / SIEVE
        scored = 2 * read + SIEVE * read.clamp(max=self.blocks)
        project = (shape.queries + shape.keys / shape.group) * shape.head_dim
        return Cost(2.0 * shape.head_dim * pairs, self.rank * (float(scored.sum()) + project))

    def misfit(self, head_dim: int) -> str | None:
        if self.rank <= head_dim:
            return None
        return f"rank must be at most {head_dim}, the dimensions of a head, got {self.rank}"

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return Loki.fit(moments)

    @property
    def _loki(self) -> Loki:
        return Loki(self.rank, self.top, self.window, self.sinks)
