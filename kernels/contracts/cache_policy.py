"""What a kv head keeps of its past while it decodes.

A layer stores rows: exact keys with their values, and pseudo-keys that stand for several. A
`Keeper` says how many rows a kv head stores at most, and how the past is condensed when it has
become longer. The first keys (sinks) and the newest (window) always stay exact; what lies between
is the keeper's to choose.

Condensing is done now and then, not at every token: between two condensations the newest keys
simply accumulate. It is never undone, so it only uses what has been seen: the rows themselves, and
the attention that recent queries paid to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.operands.inputs import Fitted, Moments

SLACK = 32
"""Fewest rows that accumulate before a past is condensed; all keepers condense at multiples."""
SLACK_SHARE = 16
"""Part of the rows that may accumulate where there are many: condensing costs as much as them."""
SHARES = (32, 16, 8, 4, 3, 2)
"""Parts of a context that are worth storing."""


@dataclass(frozen=True)
class Past:
    """The rows of some kv heads, oldest first.

    Attributes:
        key: [batch, kv_heads, rows, head_dim].
        value: [batch, kv_heads, rows, value_dim].
        bias: float32 [batch, kv_heads, rows]: 0 for an exact key, the logarithm of its mass for a
            pseudo-key, -inf for padding.
        attention: float32 [batch, kv_heads, rows], what a recent query of the group pays to a row,
            on average; zero where the keeper does not observe.
        kv_heads: their indices in the layer.
        scale: factor before the softmax.
        fitted: calibrated data of the layer.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    attention: Tensor
    kv_heads: tuple[int, ...]
    scale: float
    fitted: Fitted

    @property
    def rows(self) -> int:
        return self.key.shape[2]

    def take(self, index: Tensor) -> Past:
        """The rows at `index`, int64 [batch, kv_heads, n]."""
        key, value = (
            torch.gather(t, 2, index[..., None].expand(*index.shape, t.shape[3]))
            for t in (self.key, self.value)
        )
        bias, attention = (torch.gather(t, 2, index) for t in (self.bias, self.attention))
        return self.replaced(key, value, bias, attention)

    def part(self, first: int, last: int) -> Past:
        """Rows [first, last), as views."""
        rows = (self.key, self.value, self.bias, self.attention)
        return self.replaced(*(t[:, :, first:last] for t in rows))

    def then(self, other: Past) -> Past:
        """These rows, and after them those of `other`."""
        mine = (self.key, self.value, self.bias, self.attention)
        others = (other.key, other.value, other.bias, other.attention)
        return self.replaced(*(torch.cat(pair, 2) for pair in zip(mine, others, strict=True)))

    def replaced(self, key: Tensor, value: Tensor, bias: Tensor, attention: Tensor) -> Past:
        """Other rows of the same heads."""
        return Past(key, value, bias, attention, self.kv_heads, self.scale, self.fitted)


class Keeper(ABC):
    """How much a kv head stores. Subclasses are frozen dataclasses whose fields are the knobs."""

    name: ClassVar[str]
    family: ClassVar[str]
    observes: ClassVar[bool] = False
    """The attention of recent queries decides what stays."""
    merges: ClassVar[bool] = False
    """Some rows are pseudo-keys."""
    reads: ClassVar[bool] = False
    """A token reads a part of what is stored."""

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """Rows that are left after condensing; None if nothing ever goes."""

    @classmethod
    def of(cls, rows: int) -> Self | None:
        """The setting that stores `rows` rows, or None where there is none."""
        return None

    @property
    @abstractmethod
    def recent(self) -> int:
        """The newest keys that are always there."""

    @classmethod
    def choices(cls, context: int) -> Iterator[Self]:
        """The settings worth trying for texts of `context` tokens."""
        for share in SHARES:
            keeper = cls.of(limit_within(context // share))
            if keeper is not None:
                yield keeper

    @property
    def slack(self) -> int:
        """Rows beyond the limit that accumulate before the past is condensed again."""
        return SLACK if self.limit is None else slack_of(self.limit)

    @abstractmethod
    def condense(self, past: Past) -> Past:
        """`limit` rows that stand for all of `past`, which has more.

        Rows of padding (bias -inf) stay only where there are too few others.
        """

    def choose(
        self, bounds: Tensor, query: Tensor, scale: float, length: int, first: Tensor | None
    ) -> Tensor | None:
        """The pages that one token reads, int32 [batch, kv_heads, n], the newest last; None: all.

        Args:
            bounds: [batch, kv_heads, pages, 2 head_dim], largest and smallest of each channel.
            query: [batch, kv_heads, group, head_dim].
            scale: factor before the softmax.
            length: rows that the token sees.
            first: int64 [batch], the first row that is no padding; None for 0.
        """
        return None

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        """Calibrated data of one layer, 'name.tensor' to tensor; most keepers need none."""
        return {}


@dataclass(frozen=True)
class BoundedKeeper(Keeper):
    """Stores the first `sinks` keys, the last `window`, and `more` rows for what lies between."""

    window: int
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.window < SLACK:
            raise ValueError(f"window must be at least {SLACK} keys, got {self.window}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @property
    def more(self) -> int:
        """Rows between the sinks and the window."""
        return 0

    @property
    def limit(self) -> int:
        return self.sinks + self.more + self.window

    @property
    def recent(self) -> int:
        return self.window

    def condense(self, past: Past) -> Past:
        old = past.part(0, past.rows - self.window)
        newest = past.part(past.rows - self.window, past.rows)
        worth = torch.where(is_sink(old, self.sinks), float("inf"), self.worth(old))
        order = best(worth, old)
        count = self.sinks + self.chosen
        kept = old.take(order[..., :count].sort(-1).values)
        if self.more > self.chosen:
            kept = kept.then(self.merged(old.take(order[..., count:].sort(-1).values)))
        return kept.then(newest)

    @property
    def chosen(self) -> int:
        """How many of `more` are rows that stay as they are."""
        return self.more

    def worth(self, old: Past) -> Tensor:
        """Which rows should stay, [batch, kv_heads, rows]: the larger, the rather."""
        return torch.zeros_like(old.bias)

    def merged(self, old: Past) -> Past:
        """`more - chosen` pseudo-keys for rows that do not stay."""
        raise NotImplementedError


def is_whole(keeper: Keeper) -> bool:
    """Whether a kv head keeps everything and every token reads all of it."""
    return keeper.limit is None and not keeper.reads


def slack_of(limit: int) -> int:
    """The slack of a keeper with this limit."""
    return max(SLACK, limit // SLACK_SHARE // SLACK * SLACK)


def limit_within(rows: int) -> int:
    """The largest limit that fits into `rows` rows together with its slack."""
    limit = rows - SLACK
    while limit > 0 and limit + slack_of(limit) > rows:
        limit -= 1
    return limit


def is_sink(past: Past, sinks: int) -> Tensor:
    """The first `sinks` rows that are no padding, bool [batch, kv_heads, rows]."""
    valid = past.bias > float("-inf")
    return valid & (valid.cumsum(-1) <= sinks)


def best(worth: Tensor, past: Past) -> Tensor:
    """Rows by descending worth, padding last; of equal rows the newer first."""
    worth = worth.masked_fill(past.bias == float("-inf"), float("-inf"))
    order = worth.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    return past.rows - 1 - order
