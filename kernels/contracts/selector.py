"""What chooses the keys that a query reads themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import TileList


class Selector(ABC):
    """Chooses the near field. Subclasses are frozen dataclasses whose fields are the knobs."""

    name: ClassVar[str]
    family: ClassVar[str] = "sparse"
    static: ClassVar[bool] = False
    """The tile list depends on shapes alone: it is built once and costs nothing online."""
    far_compatible: ClassVar[bool] = False
    """`floor` is honoured: a compressor may stand in for the keys before it."""
    keeps_chunks: ClassVar[bool] = False
    """Before a floor it keeps whole chunks, those that it chooses (`beside`): a compressor that is
    `separable` may stand in for the others. Chunks are then runs of whole key blocks."""
    picks_keys: ClassVar[bool] = False
    """Before a floor it keeps single keys, those that it chooses (`chosen`): a compressor that
    `leaves_out` keys may stand in for the others."""
    cost_is_bound: ClassVar[bool] = False
    """How many pairs are computed depends on the content: `cost` says how many at most."""
    selects_together: ClassVar[bool] = False
    """Heads with different settings select in one go, by an own `select`."""
    predictor: ClassVar[str]
    """The profile statistic that should predict this method's error, for reports."""

    @classmethod
    @abstractmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        """The settings worth trying at this shape."""

    @abstractmethod
    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        """The tiles that the query blocks `blocks` (int64 [n], indices) read.

        Args:
            inputs: the call.
            blocks: which blocks of 64 query rows to answer for.
            floor: int64 [batch, n] or None. Keys from `floor` up to the query must all be kept,
                because the far field ends there.
        """

    def beside(
        self, inputs: Inputs, blocks: Tensor, floor: Tensor, chunk: int
    ) -> tuple[TileList, Tensor | None]:
        """`near` beside a far field, and the chunks before `floor` that stay near.

        Args:
            inputs: the call.
            blocks: which blocks of 64 query rows to answer for.
            floor: int64 [batch, n], where the far field ends.
            chunk: keys per chunk of the far field.

        Returns:
            The tiles, and bool [batch, heads, n, chunks], None for no chunk.
        """
        return self.near(inputs, blocks, floor), None

    def chosen(self, inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
        """The single keys before a floor that stay near, where the selector `picks_keys`.

        Args:
            inputs: the call.
            blocks: which blocks of 64 query rows to answer for.
            floor: int64 [batch, n], where the far field ends.

        Returns:
            int32 [batch, heads, 64 * n, most], keys in [start + sinks, floor), distinct in a row,
            -1 for none.

        Raises:
            NotImplementedError: it chooses no single keys.
        """
        raise NotImplementedError(f"{self.name} chooses no single keys")

    def chosen_cost(self, shape: AttentionShape, candidates: Tensor) -> Cost:
        """Multiply-adds of choosing and reading single keys, where every query has `candidates`."""
        return Cost(0.0)

    def picked(self, candidates: Tensor) -> Tensor:
        """Of so many keys before a floor, how many a query reads at most, where it `picks_keys`."""
        return torch.zeros_like(candidates)

    def kept_chunks(self, chunks: Tensor, chunk: int) -> Tensor:
        """Of `chunks` chunks of `chunk` keys before a floor, how many `beside` keeps."""
        return torch.zeros_like(chunks)

    @property
    def counts_tiles(self) -> bool:
        """How many tiles a query block reads is known beforehand, if not which.

        A layer of such heads is prepared once for a shape, and then chooses and attends without
        waiting for the device.
        """
        return self.static

    @property
    def recent(self) -> int:
        """Keys up to a query block's first query that stay near in any case."""
        return getattr(self, "window", 0)

    @classmethod
    def select(cls, selectors: Sequence[Self], inputs: Inputs, blocks: Tensor) -> TileList:
        """The tiles of heads with different settings of one method, one selector per head.

        A method whose heads can select together, whatever their settings, overrides this.
        """
        groups: dict[Self, list[int]] = {}
        for head, selector in enumerate(selectors):
            groups.setdefault(selector, []).append(head)
        parts = [(heads, s.near(inputs.heads(tuple(heads)), blocks)) for s, heads in groups.items()]
        return tile_list.stack_heads(parts, len(selectors))

    @abstractmethod
    def keep(self, inputs: Inputs) -> Tensor:
        """The definition: bool [batch, heads, queries, keys], true where a pair is computed.

        Plain torch over an N x N mask, at the precision of the inputs: the oracle for `near`.
        """

    @abstractmethod
    def cost(self, shape: AttentionShape) -> Cost:
        """Multiply-adds of one head of one sequence without a far field."""

    def cost_beside(self, shape: AttentionShape) -> Cost:
        """`cost` beside a far field, of the chunks that stay near the selection alone."""
        return self.cost(shape)

    def tried_with_far(self, shape: AttentionShape) -> bool:
        """Whether this setting is worth trying with a far field too."""
        return self.far_compatible

    def misfit(self, head_dim: int) -> str | None:
        """Why the settings do not suit heads of `head_dim` dimensions; None where they do."""
        return None

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        """Calibrated data of one layer, 'name.tensor' to tensor; most methods need none."""
        return {}

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        """Which of the names that `fit` answers with this setting reads; all, unless it says so."""
        return fitted
