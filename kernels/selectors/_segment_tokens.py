"""Tokens by segment: every query chooses keys of its own from what lies before its segment.

A sequence is cut into segments of `segment` positions, counted from its first real token. A query
of a segment that begins at b keeps every key from b - window on, the sinks, and `top` of the keys
between them. What is made to choose them (an order, clusters, scores) is made of data before b
alone, once for all queries of the segment.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LEAST
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK, TileList
from attnplan.kernels.operands.token_tiles import pack_tokens
from attnplan.kernels.selectors._single_keys import SingleKeys, row_floor
from attnplan.kernels.selectors._static_pattern import StaticPattern, causal, relative_positions


@dataclass(frozen=True)
class Past:
    """The keys that the queries of one segment of one sequence choose from.

    Attributes:
        row: batch row.
        queries: int64 [n], which of the query rows at hand belong to the segment.
        start: first key of the sequence that is no padding.
        low, high: the keys [low, high) are chosen from.
        end: first position of the segment.
    """

    row: int
    queries: Tensor
    start: int
    low: int
    high: int
    end: int


Picker = Callable[[Past], Tensor]
"""Positions of the chosen keys, integers [heads, n, at most top], distinct, -1 for none."""


@dataclass(frozen=True)
class SegmentTokens(SingleKeys):
    """Keep sinks, all keys since `window` before the segment, and `top` chosen keys."""

    settings: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (16, 16, 64),
        (64, 32, 128),
        (64, 64, 256),
    )
    """(top, window, segment) worth trying."""

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

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for top, window, segment in cls.settings_of(shape):
            yield cls(top, window, segment)

    @classmethod
    def settings_of(cls, shape: AttentionShape) -> Iterator[tuple[int, int, int]]:
        """`settings` that leave something out, and a sixteenth of the keys for long texts."""
        for top, window, segment in (*cls.settings, (shape.keys // 1024 * 64, 64, 256)):
            if 0 < top < shape.keys - 2 * segment:
                yield top, window, segment

    @abstractmethod
    def picker(self, inputs: Inputs, blocks: Tensor) -> Picker:
        """What chooses the keys of the queries of `blocks`, where there are more than `top`."""

    @abstractmethod
    def segment_macs(self, shape: AttentionShape, seen: int, queries: int) -> float:
        """Multiply-adds of choosing for `queries` queries of a segment that begins at `seen`."""

    def once_macs(self, shape: AttentionShape) -> float:
        """Multiply-adds that all segments share."""
        return 0.0

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        static = self._recent.near(inputs, blocks)
        tokens = self.tokens(inputs, blocks)
        return tile_list.concat([static, pack_tokens(tokens, inputs.key.shape[2])])

    def chosen(self, inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
        tokens = self.tokens(inputs, blocks)
        before = tokens < row_floor(inputs, blocks, floor)[:, None, :, None]
        return torch.where(before, tokens, -1)  # the others are near anyway

    def picked(self, candidates: Tensor) -> Tensor:
        return candidates.clamp(max=self.top)

    def chosen_macs(self, shape: AttentionShape, candidates: Tensor) -> float:
        return self.cost(shape).selection

    def tried_with_far(self, shape: AttentionShape) -> bool:
        return shape.keys >= LEAST and (self.top, self.segment) == (64, 256)

    def keep(self, inputs: Inputs) -> Tensor:
        blocks = torch.arange(inputs.blocks, device=inputs.query.device)
        tokens = self.tokens(inputs, blocks)[:, :, : inputs.query.shape[2]].long()
        keys = inputs.key.shape[2]
        chosen = torch.zeros(*tokens.shape[:3], keys + 1, dtype=torch.bool, device=tokens.device)
        chosen.scatter_(-1, torch.where(tokens < 0, keys, tokens), True)
        i, j = relative_positions(inputs)
        recent = self._recent.rule(i, j)
        return (chosen[..., :keys] | recent) & causal(inputs)

    def cost(self, shape: AttentionShape) -> Cost:
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        past = self._recent.low(i) - self.sinks
        pairs = int(past.clamp(min=0, max=self.top).sum())
        ends, queries = (i - i % self.segment)[past > self.top].unique(return_counts=True)
        chosen = [
            self.segment_macs(shape, seen, n)
            for seen, n in zip(ends.tolist(), queries.tolist(), strict=True)
        ]
        selection = sum(chosen) + (self.once_macs(shape) if chosen else 0.0)
        return self._recent.cost(shape) + Cost(2.0 * shape.head_dim * pairs, float(selection))

    def tokens(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        """The chosen keys of every query, int32 [batch, heads, 64 * len(blocks), top]."""
        batch, heads = inputs.query.shape[:2]
        device = inputs.query.device
        size = (batch, heads, BLOCK * len(blocks), self.top)
        out = torch.full(size, -1, dtype=torch.int32, device=device)
        pick: Picker | None = None
        for past in self._pasts(inputs, blocks):
            if past.high - past.low <= self.top:
                found = torch.arange(past.low, past.high, device=device).expand(heads, 1, -1)
            else:
                pick = pick or self.picker(inputs, blocks)
                found = pick(past)
            out[past.row, :, past.queries, : found.shape[2]] = found.to(torch.int32)
        return out

    @property
    def _recent(self) -> Recent:
        return Recent(self.window, self.segment, self.sinks)

    def _pasts(self, inputs: Inputs, blocks: Tensor) -> Iterator[Past]:
        """Of every segment that has queries and keys to choose from."""
        position = inputs.positions(blocks).flatten()
        for row, start in enumerate(inputs.start):
            # rows without a query stand at -1, and padding before the start
            segment = torch.where(position >= start, (position - start) // self.segment, -1)
            for s in segment.unique().tolist():
                end = start + s * self.segment
                low, high = start + self.sinks, end - self.window
                if s >= 0 and low < high:
                    yield Past(row, torch.nonzero(segment == s)[:, 0], start, low, high, end)


@dataclass(frozen=True)
class Recent(StaticPattern):
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
