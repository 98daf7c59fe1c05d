"""Columns by segment: a few keys that all queries of a segment read, chosen from the past.

As `_segment_tokens`, but all queries of a segment share their `top` keys: those with the largest
column score. Scores come from keys and queries before the segment alone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors._segment_tokens import Past, Picker, SegmentTokens


@dataclass(frozen=True)
class SegmentColumns(SegmentTokens):
    """Keep sinks, all keys since `window` before the segment, and its `top` best columns."""

    def tried_with_far(self, shape: AttentionShape) -> bool:
        """Not: all queries of a segment read the same columns, which is dear beside slots."""
        return False

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
        """Multiply-adds of scoring the first `seen` keys, and a window after them, for one head."""

    def segment_macs(self, shape: AttentionShape, seen: int, queries: int) -> float:
        return self.score_macs(shape, seen - self.window)

    def picker(self, inputs: Inputs, blocks: Tensor) -> Picker:
        def pick(past: Past) -> Tensor:
            scores = self._scores(inputs, past)
            return best_columns(scores, self.top, len(past.queries)) + past.low

        return pick

    def _scores(self, inputs: Inputs, past: Past) -> Tensor:
        """Of the keys that may be chosen, [heads, keys]."""
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        last = max(past.end - inputs.offset, 0)  # row after the last query before the segment
        first = max(past.start - inputs.offset, 0)
        query = inputs.query[past.row, :, first:last].to(wide)
        key = inputs.key[past.row, :, past.start : past.end].to(wide)
        scores = self.column_scores(query, key, inputs)
        return scores[:, self.sinks : past.high - past.start]


def best_columns(scores: Tensor, top: int, queries: int) -> Tensor:
    """The `top` best of [heads, keys], the earlier of equal ones, for each of some queries.

    Returns:
        int64 [heads, queries, top].
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, None, :top].expand(-1, queries, -1)
