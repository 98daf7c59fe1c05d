"""What stands in for the keys that a query does not read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Self

from torch import Tensor

from attnplan.kernels.contracts.knobs import SHORT
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import TileList
from attnplan.kernels.operands.token_tiles import pack_tokens

Kept = Callable[[Tensor], Tensor]
"""Of so many chunks before a floor, how many stay near."""


class Compressor(ABC):
    """Makes the far field. Subclasses are frozen dataclasses whose fields are the knobs."""

    name: ClassVar[str]
    family: ClassVar[str] = "low-rank"
    windows: ClassVar[tuple[int, ...]] = (128,)
    """Recent keys of the selectors that it is worth trying with."""
    predictor: ClassVar[str]
    chunk: int
    """Far fields end where a chunk of so many keys ends."""

    @property
    def grows(self) -> bool:
        """A text's slots are the first of those of a longer one, and so are its tiles."""
        return True

    @property
    def separable(self) -> bool:
        """All is in `far`, and each chunk has slots of its own: a query block may leave any out."""
        return False

    @property
    def leaves_out(self) -> bool:
        """A query may read any keys before the floor by itself: they leave what it is told here."""
        return False

    @property
    def opens(self) -> bool:
        """Which tiles are read depends on the content, whatever the selector."""
        return False

    @classmethod
    @abstractmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        """The settings worth trying at this shape."""

    @classmethod
    def cheap_choices(cls, shape: AttentionShape) -> Iterator[Self]:
        """The settings worth trying with the shortest window alone."""
        return iter(())

    @classmethod
    def choices_behind(cls, near: Selector, shape: AttentionShape) -> Iterator[Self]:
        """The settings worth trying with a selector."""
        if near.far_compatible and near.recent in cls.windows:
            yield from cls.choices(shape)
        if near.far_compatible and near.recent == SHORT:
            yield from cls.cheap_choices(shape)

    @abstractmethod
    def floor(self, inputs: Inputs, blocks: Tensor, window: int) -> Tensor:
        """Where the far field of each query block ends, int64 [batch, len(blocks)].

        Depends on sizes and padding alone.

        At least `window` keys before the block's first query stay near.
        """

    @abstractmethod
    def chunks_before(self, inputs: Inputs, floor: Tensor) -> Tensor:
        """How many chunks lie before each floor, int64 like `floor`.

        Depends on sizes and padding alone.
        """

    def far(
        self,
        inputs: Inputs,
        floor: Tensor,
        sinks: Sequence[int],
        kept: Tensor | None = None,
        *,
        blocks: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Slots | None, TileList]:
        """Slots for the keys in [start + sinks, floor), and the tiles that read them.

        No slots where no query block has a far field yet, or where all of it is in `part`.

        Args:
            inputs: the call.
            floor: int64 [batch, heads, n].
            sinks: for each head, first keys that stay near.
            kept: bool [batch, heads, n, chunks], chunks that stay near, if `separable`.
            blocks: int64 [n], which blocks of 64 query rows to answer for; by default all.
            tokens: int32 [batch, heads, 64 * n, most], single keys that are read by themselves (see
                `Selector.chosen`), if `leaves_out`; their tiles are among those returned.
        """
        chunks = int(self.chunks_before(inputs, floor).max())
        tiles = self.far_tiles(inputs, floor, kept)
        if tokens is not None:
            tiles = tile_list.concat([tiles, pack_tokens(tokens, inputs.key.shape[2])])
        return self.compress(inputs, chunks, sinks), tiles

    def compress(self, inputs: Inputs, chunks: int, sinks: Sequence[int]) -> Slots | None:
        """The slots of `far`.

        Args:
            inputs: the call.
            chunks: the most that lie before a floor.
            sinks: for each head, first keys that stay near.
        """
        return None

    def far_tiles(self, inputs: Inputs, floor: Tensor, kept: Tensor | None = None) -> TileList:
        """The tiles of `far`: without `kept` they depend on sizes and padding alone."""
        batch, heads, blocks = floor.shape
        return tile_list.empty(batch, heads, blocks, floor.device)

    def part(
        self,
        inputs: Inputs,
        blocks: Tensor,
        floor: Tensor,
        sinks: Sequence[int],
        chunks: int,
        tokens: Tensor | None = None,
    ) -> Part | None:
        """What the keys in [start + sinks, floor) contribute to the rows of `blocks` without slots.

        None where no query block has a far field yet, or where all of it is in `far`. The part has
        64 rows per block, zero for rows that have no far field.

        Args:
            inputs: the call.
            blocks: int64 [n], which blocks of 64 query rows to answer for.
            floor: int64 [batch, heads, n].
            sinks: for each head, first keys that stay near.
            chunks: the most that lie before a floor.
            tokens: as in `far`; single keys that are not in the part.
        """
        return None

    def left_out_macs(self, shape: AttentionShape, picked: float) -> float:
        """Multiply-adds of taking `picked` single keys of all queries out of the far field."""
        return 0.0

    @abstractmethod
    def before(self, shape: AttentionShape, window: int, sinks: int) -> Tensor:
        """For every query, how many keys the far field stands in for, int64 [queries]."""

    @abstractmethod
    def cost(
        self, shape: AttentionShape, window: int, sinks: int, kept: Kept | None = None
    ) -> Cost:
        """Multiply-adds of the far field of one head.

        The near keys between the far field and the window are included, and chunks that stay near.
        """

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        """Calibrated data of one layer, 'name.tensor' to tensor."""
        return {}

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        """Which of the names that `fit` answers with this setting reads; all, unless it says so."""
        return fitted
