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
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LEAST
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import TileList
from attnplan.kernels.operands.token_tiles import pack_tokens
from attnplan.kernels.selectors._block_sieve import SIEVE, sieved_tokens
from attnplan.kernels.selectors._single_keys import SingleKeys, row_floor
from attnplan.kernels.selectors._static_pattern import relative_positions
from attnplan.kernels.selectors._top_tokens import best
from attnplan.kernels.selectors.loki import Loki
from attnplan.kernels.selectors.window import Window


@dataclass(frozen=True)
class TwoStage(SingleKeys):
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
        position = inputs.positions(blocks).flatten()  # -1 past the last query
        high = torch.where(position >= 0, position - self.window + 1, -1)
        tokens = self._tokens(inputs, blocks, inputs.start, high)
        return tile_list.concat([windows, pack_tokens(tokens, inputs.key.shape[2])])

    def chosen(self, inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
        high = row_floor(inputs, blocks, floor)
        rows = [
            self._tokens(
                replace(
                    inputs,
                    query=inputs.query[row : row + 1],
                    key=inputs.key[row : row + 1],
                    value=inputs.value[row : row + 1],
                    start=(start,),
                ),
                blocks,
                (start,),
                high[row],
            )
            for row, start in enumerate(inputs.start)
        ]
        return torch.cat(rows)

    def _tokens(
        self, inputs: Inputs, blocks: Tensor, start: tuple[int, ...], high: Tensor
    ) -> Tensor:
        """Chosen keys, int32 [batch, heads, 64 * len(blocks), top]; see `sieved_tokens`."""
        query_map, key_map = self._loki.maps(inputs)
        return sieved_tokens(
            inputs.rows(blocks).float() @ query_map,
            inputs.key.float() @ key_map,
            kv_head=inputs.kv_head,
            start=start,
            sinks=self.sinks,
            high=high,
            blocks=self.blocks,
            top=self.top,
        )

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
        return self.cost_beside(shape) + self.chosen_cost(shape, candidates)

    def picked(self, candidates: Tensor) -> Tensor:
        return candidates.clamp(max=self.top)

    def chosen_macs(self, shape: AttentionShape, candidates: Tensor) -> float:
        read = torch.where(candidates > 0, candidates + self.sinks, 0) / SIEVE
        scored = 2 * read + SIEVE * read.clamp(max=self.blocks)
        project = (shape.queries + shape.keys / shape.group) * shape.head_dim
        return self.rank * (float(scored.sum()) + project)

    def tried_with_far(self, shape: AttentionShape) -> bool:
        """With a short window, which the keys since the floor make longer."""
        short = self.window == 32 and self.rank < 32
        return shape.keys >= LEAST and short and SIEVE * self.blocks <= 4 * self.top

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
