"""Heavy hitters: the keys that earlier queries paid most attention to.

The `top` keys of the highest score stay for a whole segment, beside sinks and the recent keys
(`_segment_columns`). A key's score is the probability that queries gave it in total:

* `accumulate: 0`: the last `observers` queries before the segment attend to all keys before it; the
  scores are averaged over `POOL` neighbours (SnapKV).
* `accumulate: 1`: in every segment `observers` queries at equal distances attend to what the
  segment reads, as it is attended to anyway, and scores add up from segment to segment. The keys of
  the next segment are chosen among those of this one and what has ceased to be recent: a key that
  was left out once does not return (H2O). This costs the same for every segment, however long the
  text.

Sources: Zhang et al., H2O, https://arxiv.org/abs/2306.14048, section 4 (accumulated attention,
greedy eviction); Li et al., SnapKV, https://arxiv.org/abs/2404.14469, section 4 (an observation
window, pooling). Unlike H2O, which evicts at every token, the choice is made once per segment, and
some of the queries vote. Where no query stands before a segment (a continued cache), the latest
keys are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.numerics.clustering import take
from attnplan.kernels.operands.indexing import heads_of
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors._segment_columns import SegmentColumns
from attnplan.kernels.selectors._segment_tokens import Past, Picker

POOL = 5


@dataclass(frozen=True)
class HeavyHitters(SegmentColumns):
    """Keep recent keys, sinks, and the `top` keys that earlier queries attended to most."""

    name: ClassVar[str] = "heavy_hitters"
    predictor: ClassVar[str] = "vertical_mass"
    settings: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (24, 16, 64),
        (64, 32, 128),
        (96, 64, 256),
    )

    observers: int = 64
    accumulate: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observers < 1:
            raise ValueError(f"observers must be at least 1 query, got {self.observers}")
        if self.accumulate not in (0, 1):
            raise ValueError(f"accumulate must be 0 or 1, got {self.accumulate}")
        if self.accumulate and self.segment % self.observers:
            raise ValueError(
                f"observers must divide segment {self.segment} to accumulate, got {self.observers}"
            )

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for top, window, segment in cls.settings_of(shape):
            yield cls(top, window, segment, observers=segment // 8, accumulate=1)
        if 64 + 2 * 128 < shape.keys:
            yield cls(64, segment=128, observers=16)

    def picker(self, inputs: Inputs, blocks: Tensor) -> Picker:
        if not self.accumulate:
            return super().picker(inputs, blocks)
        votes = [_Votes(self, inputs, row) for row in range(len(inputs.start))]

        def pick(past: Past) -> Tensor:
            kept = votes[past.row].before((past.end - past.start) // self.segment)
            return kept[:, None].expand(-1, len(past.queries), -1)

        return pick

    def column_scores(self, query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        keys = torch.arange(key.shape[1], device=key.device)
        query = query[:, -self.observers :]
        if query.shape[1] == 0:
            return keys.to(key.dtype).expand(query.shape[0], -1)
        i = keys[-query.shape[1] :, None]
        logits = query @ key[list(inputs.kv_head)].mT * inputs.scale
        mass = torch.softmax(logits.masked_fill(keys > i, float("-inf")), -1).sum(1)
        return torch.nn.functional.avg_pool1d(mass, POOL, stride=1, padding=POOL // 2)

    def score_macs(self, shape: AttentionShape, seen: int) -> float:
        if self.accumulate:
            return 0.0
        return float(self.observers * (seen + self.window) * shape.head_dim)

    def once_macs(self, shape: AttentionShape) -> float:
        if not self.accumulate:
            return 0.0
        read = self.sinks + self.top + self.window + self.segment
        return float(shape.queries // self.segment * self.observers * read * shape.head_dim)


class _Votes:
    """The keys that a sequence keeps for each of its segments, found one segment after the other.

    Positions count from the first key of the sequence.
    """

    def __init__(self, method: HeavyHitters, inputs: Inputs, row: int) -> None:
        self.method, self.inputs, self.row = method, inputs, row
        self.start = inputs.start[row]
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        self.key = heads_of(inputs.key[row, :, self.start :].to(wide), inputs.kv_head, 0)
        self.query = inputs.query[row].to(wide)
        heads, keys = self.key.shape[:2]
        self.score = self.key.new_zeros(heads, keys)
        nothing = torch.zeros(heads, 0, dtype=torch.int64, device=self.key.device)
        self.kept = [nothing]

    def before(self, segment: int) -> Tensor:
        """What the queries of a segment read besides sinks and recent keys, [heads, at most top].

        Positions in the batch, padding included.
        """
        while len(self.kept) <= segment:
            self._next()
        return self.kept[segment] + self.start

    def _next(self) -> None:
        """Let the last segment vote, and choose for the one after it."""
        method, kept = self.method, self.kept[-1]
        end = len(self.kept) * method.segment
        first = max(end - method.segment - method.window, 0)
        recent = torch.arange(max(first, method.sinks), end, device=kept.device)
        sinks = torch.arange(min(method.sinks, end), device=kept.device)
        always = torch.cat([sinks, recent]).expand(len(kept), -1)
        read = torch.cat([always, kept], 1)
        self.score.scatter_add_(1, read, self._votes(read, end))
        aged = recent[recent < end - method.window].expand(len(kept), -1)
        # the latest first: of equal scores these are kept
        known = torch.cat([kept, aged], 1).sort(1, descending=True).values
        order = self.score.gather(1, known).sort(dim=1, descending=True, stable=True).indices
        self.kept.append(known.gather(1, order[:, : method.top]))

    def _votes(self, read: Tensor, end: int) -> Tensor:
        """Probability that the queries before `end` give to the keys that they read."""
        step = self.method.segment // self.method.observers
        position = torch.arange(end - self.method.segment + step - 1, end, step, device=read.device)
        rows = position + self.start - self.inputs.offset
        position, rows = position[rows >= 0], rows[rows >= 0]
        logits = self.query[:, rows] @ take(self.key, read).mT * self.inputs.scale
        later = read[:, None] > position[:, None]
        return logits.masked_fill(later, float("-inf")).softmax(-1).sum(1)
