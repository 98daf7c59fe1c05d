"""Columns by segment: a few keys that all queries of a segment read, chosen from the past.

A sequence is cut into segments of `segment` positions, counted from its first real token. A query
of a segment that begins at b keeps every key from b - window on, the sinks, and of the keys between
them the `top` with the largest column score; scores come from keys and queries before b alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.approximation import AttentionShape, Cost, Inputs, Selector
from attnplan.kernels.pattern import StaticPattern, causal, relative_positions
from attnplan.kernels.tile_list import TileList
from attnplan.kernels.token_selection import pack_tokens


@dataclass(frozen=True)
class SegmentColumns(Selector):
    """Keep sinks, all keys since `window` before the segment, and its `top` best columns."""

    top: int
    window: int = 64
    segment: int = 256
    sinks: int = 4

    def __post_init__(self) -> None:
        for knob in ("top", "window", "segment"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be at least 1 key, got {getattr(self, knob)}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @abstractmethod
    def column_scores(self, query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        """Score of every key of one sequence before a segment, [heads, keys].

        Args:
            query: [heads, queries, head_dim], the last queries before the segment, maybe none; the
                last one stands at the last key.
            key: [kv_heads, keys, head_dim], without padding, at least one.
            inputs: the call.
        """

    @abstractmethod
    def score_macs(self, shape: AttentionShape, seen: int) -> float:
        """Multiply-adds of scoring `seen` keys for one head."""

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        static = self._recent.near(inputs, blocks)
        tokens = self._tokens(inputs, blocks)
        return tile_list.concat([static, pack_tokens(tokens, inputs.key.shape[2])])

    def keep(self, inputs: Inputs) -> Tensor:
        blocks = torch.arange(inputs.blocks, device=inputs.query.device)
        tokens = self._tokens(inputs, blocks)[:, :, : inputs.query.shape[2]].long()
        keys = inputs.key.shape[2]
        chosen = torch.zeros(*tokens.shape[:3], keys + 1, dtype=torch.bool, device=tokens.device)
        chosen.scatter_(-1, torch.where(tokens < 0, keys, tokens), True)
        i, j = relative_positions(inputs)
        recent = self._recent.rule(i, j)
        return (chosen[..., :keys] | recent) & causal(inputs)

    def cost(self, shape: AttentionShape) -> Cost:
        low = self._recent.low(torch.arange(shape.keys - shape.queries, shape.keys))
        pairs = int((low - self.sinks).clamp(min=0, max=self.top).sum())
        seen = low.unique().tolist()
        selection = sum(self.score_macs(shape, int(keys)) for keys in seen if keys > self.sinks)
        chosen = Cost(2.0 * shape.head_dim * pairs, float(selection))
        return self._recent.cost(shape) + chosen

    @property
    def _recent(self) -> _Recent:
        return _Recent(self.window, self.segment, self.sinks)

    def _tokens(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        """The columns of every query, int32 [batch, heads, 64 * len(blocks), top]."""
        batch, heads = inputs.query.shape[:2]
        position = inputs.positions(blocks).flatten()
        out = torch.full(
            (batch, heads, len(position), self.top), -1, dtype=torch.int32, device=position.device
        )
        for row, start in enumerate(inputs.start):
            # of rows without a query, which stand at -1, and of padding
            segment = torch.where(position >= start, (position - start) // self.segment, -1)
            for s in segment.unique().tolist():
                end = start + s * self.segment  # first position of the segment
                if s < 0 or end - self.window <= start + self.sinks:
                    continue
                here = torch.nonzero(segment == s)[:, 0]
                columns = self._columns(inputs, row, start, end)
                out[row, :, here, : columns.shape[1]] = columns[:, None].to(torch.int32)
        return out

    def _columns(self, inputs: Inputs, row: int, start: int, end: int) -> Tensor:
        """Positions of the best columns before `end`, [heads, at most top]."""
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        last = max(end - inputs.offset, 0)  # row after the last query before the segment
        first = max(start - inputs.offset, 0)
        query = inputs.query[row, :, first:last].to(wide)
        scores = self.column_scores(query, inputs.key[row, :, start:end].to(wide), inputs)
        scores = scores[:, self.sinks : end - self.window - start]
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        return order[:, : self.top] + start + self.sinks


@dataclass(frozen=True)
class _Recent(StaticPattern):
    """Sinks, and every key since `window` before the query's segment."""

    name: ClassVar[str] = "recent"
    predictor: ClassVar[str] = "sink_local_mass"

    window: int
    segment: int
    sinks: int

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        """None: it is a part of other methods."""
        return iter(())

    def low(self, i: Tensor) -> Tensor:
        """The first recent key of queries at positions i."""
        return (i - i % self.segment - self.window).clamp(min=0)

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        return (j >= self.low(i)) | (j < self.sinks)

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(0, self.sinks), (first - first % self.segment - self.window, last + 1)]

    def cost(self, shape: AttentionShape) -> Cost:
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        low = self.low(i)
        pairs = int((i + 1 - low + low.clamp(max=self.sinks)).sum())
        return Cost(2.0 * shape.head_dim * pairs)
