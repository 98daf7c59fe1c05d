"""The vocabulary: what attention is asked to compute, and what an approximation of it is.

    o_i = n_i / z_i    n_i = sum over near(i) of e^{s_ij} v_j  +  sum over far(i) of e^{q_i.k_c + b_c} u_c
                       z_i = sum over near(i) of e^{s_ij}      +  sum over far(i) of e^{q_i.k_c + b_c} w_c

The near field is exact softmax over the keys that a `Selector` chose; the far field is a set of
slots (pseudo-keys) that a `Compressor` made of keys that the near field left out. Where a query
reads single keys that slots hold too, these leave their slots, so that no key counts twice. A
compressor may also sum over those keys itself, by a kernel other than the exponential: then it contributes a
`Part` to n_i and z_i. An `Approximation` is a selector, with or without a compressor.
"""  # noqa: E501

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.indexing import first_numbers, heads_of
from attnplan.kernels.part import Part
from attnplan.kernels.tile_list import BLOCK, TileList
from attnplan.kernels.token_selection import pack_tokens


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one causal attention call; query row r stands at position keys - queries + r."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.queries > self.keys:
            raise ValueError(f"more queries than keys: {self.queries} and {self.keys}")

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def causal_pairs(self) -> int:
        """Query-key pairs of dense causal attention of one head of one sequence."""
        first = self.keys - self.queries
        return self.queries * first + self.queries * (self.queries + 1) // 2

    @property
    def dense_macs(self) -> float:
        """Multiply-adds of dense causal attention of one head of one sequence."""
        return float(self.causal_pairs * 2 * self.head_dim)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one head of one sequence; they predict, benchmarks measure.

    Sorts, top-k, hashes, gathers and exponentials are not counted: they are no multiply-adds, and
    what they take depends on the device. Where cost decides, measured time does.

    Attributes:
        attention: scores and weighted values, over keys and slots.
        selection: whatever it takes to choose the keys, to make the slots, or to sum over keys
            without tiles.
    """

    attention: float
    selection: float = 0.0

    @property
    def macs(self) -> float:
        return self.attention + self.selection

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.attention + other.attention, self.selection + other.selection)


LATER: Mapping[str, object] = {"later": True}
"""Metadata of a knob that is spelled where it is not its default alone: it is newer than plans and
tables that spell its method without it."""

SHORT = 32
"""Recent keys of the shortest window; those of a query block and the one before are near anyway."""
POSITIONS = 128
"""Keys in a chunk for statistics that depend on the position in a chunk."""


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's queries and keys on calibration text, after RoPE.

    Attributes:
        query_mean: [heads, head_dim].
        query_gram: [heads, head_dim, head_dim], mean of q q^T (not centred).
        key_mean: [kv_heads, head_dim].
        key_gram: [kv_heads, head_dim, head_dim].
        key_position_gram: [kv_heads, 128, 128], mean over chunks of 128 keys of the products of the
            keys at two positions of a chunk; None where the texts or the profile have none.
    """

    query_mean: Tensor
    query_gram: Tensor
    key_mean: Tensor
    key_gram: Tensor
    key_position_gram: Tensor | None = None


Fitted = Mapping[str, Tensor]
"""Data that methods were fitted with, for one layer: 'method.tensor' to a tensor whose first
dimension is heads or kv_heads of the whole layer."""

Kept = Callable[[Tensor], Tensor]
"""Of so many chunks before a floor, how many stay near."""


@dataclass(frozen=True)
class Inputs:
    """One attention call, for some heads of a layer.

    Attributes:
        query: [batch, heads, queries, head_dim], after RoPE.
        key: [batch, kv_heads, keys, head_dim], of all kv heads of the layer.
        value: [batch, kv_heads, keys, value_dim].
        scale: factor before the softmax.
        head: for each head of `query`, its index in the layer.
        start: for each batch row, the first key that is no left padding.
        fitted: calibrated data of the layer.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    head: tuple[int, ...]
    group: int
    start: tuple[int, ...]
    fitted: Fitted = field(default_factory=dict)

    @classmethod
    def of_layer(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        start: tuple[int, ...] | None = None,
        fitted: Fitted | None = None,
    ) -> Self:
        batch, heads = query.shape[:2]
        return cls(
            query,
            key,
            value,
            scale,
            tuple(range(heads)),
            heads // key.shape[1],
            start or (0,) * batch,
            fitted or {},
        )

    @property
    def shape(self) -> AttentionShape:
        """Sizes of the call; `heads` counts the heads at hand, rounded up to whole groups."""
        batch, _, queries, head_dim = self.query.shape
        kv_heads, keys = self.key.shape[1:3]
        return AttentionShape(batch, kv_heads * self.group, kv_heads, queries, keys, head_dim)

    @property
    def kv_head(self) -> tuple[int, ...]:
        return tuple(h // self.group for h in self.head)

    @property
    def blocks(self) -> int:
        return -(-self.query.shape[2] // BLOCK)

    @property
    def all_blocks(self) -> Tensor:
        """All blocks of 64 query rows, int64 [blocks], the same tensor at every call."""
        return first_numbers(self.blocks, self.query.device)

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.key.shape[2] - self.query.shape[2]

    def fitted_tensor(self, name: str) -> Tensor:
        """Calibrated data `name` of the whole layer.

        Raises:
            ValueError: nobody fitted it.
        """
        if name not in self.fitted:
            raise ValueError(
                f"no fitted data {name!r}: run `attnplan profile`, or keep the plan's .safetensors "
                "file beside it"
            )
        return self.fitted[name].to(self.query.device)

    def fitted_heads(self, name: str, heads: Sequence[int]) -> Tensor:
        """Calibrated data `name` of some heads, query or kv heads of the layer.

        Raises:
            ValueError: nobody fitted it.
        """
        return heads_of(self.fitted_tensor(name), heads, 0)

    @property
    def on_blocks(self) -> Inputs:
        """The same call with `start` rounded down to where a key block begins."""
        return replace(self, start=tuple(s // BLOCK * BLOCK for s in self.start))

    def heads(self, index: tuple[int, ...]) -> Inputs:
        """The same call for the heads at `index` of `query`."""
        if index == tuple(range(len(self.head))):
            return self
        return Inputs(
            heads_of(self.query, index),
            self.key,
            self.value,
            self.scale,
            tuple(self.head[i] for i in index),
            self.group,
            self.start,
            self.fitted,
        )

    def rows(self, blocks: Tensor) -> Tensor:
        """The queries of some blocks, [batch, heads, len(blocks) * 64, head_dim], zero-padded."""
        rows = self.blocks * BLOCK
        if blocks is self.all_blocks or (
            len(blocks) == self.blocks and bool((blocks[1:] > blocks[:-1]).all())
        ):
            # all blocks in order: at most the padding is copied
            more = rows - self.query.shape[2]
            return torch.nn.functional.pad(self.query, (0, 0, 0, more)) if more else self.query
        batch, heads, _, head_dim = self.query.shape
        query = torch.nn.functional.pad(self.query, (0, 0, 0, rows - self.query.shape[2]))
        query = query.reshape(batch, heads, self.blocks, BLOCK, head_dim)
        return query[:, :, blocks].reshape(batch, heads, -1, head_dim)

    def positions(self, blocks: Tensor) -> Tensor:
        """Position of every query of some blocks, int64 [len(blocks), 64]; -1 past the last."""
        row = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)
        return torch.where(row < self.query.shape[2], row + self.offset, -1)


@dataclass(frozen=True)
class Slots:
    """Pseudo-keys of the heads that have a far field.

    A slot adds e^{scale q.k + log_weight} * weight to a query's mass and e^{...} * value to its
    numerator. `weight` may be negative; `value` is not normalised.

    Attributes:
        key: [batch, slot_heads, slots, head_dim]; `slots` is a multiple of 64.
        log_weight: float32 [batch, slot_heads, slots]; -inf for an empty slot.
        weight: float32 [batch, slot_heads, slots].
        value: [batch, slot_heads, slots, value_dim].
        head: int32 [heads], the row of `key` that a head reads, -1 for none.
        member: int32 [batch, slot_heads, keys], the slot that holds a key, -1 for none; empty where
            no key is taken out of its slot.
        share: float32 [batch, slot_heads, keys], what a key is of its slot's `weight`, and of the
            key's value in the slot's `value`; empty as `member` is.
    """

    key: Tensor
    log_weight: Tensor
    weight: Tensor
    value: Tensor
    head: Tensor
    member: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    share: Tensor = field(default_factory=lambda: torch.empty(0))


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


@dataclass(frozen=True)
class NearField:
    """The near field of some query blocks that have a far field too.

    Attributes:
        tiles: what is read.
        floor: int64 [batch, heads, blocks], where the far field ends.
        kept: bool [batch, heads, blocks, chunks], chunks before it that are near; None for none.
        tokens: int32 [batch, heads, 64 * blocks, most], single keys before it that are near, -1 for
            none; None where none are chosen. The tiles do not have them.
    """

    tiles: TileList
    floor: Tensor
    kept: Tensor | None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Approximation:
    """What one head is assigned: a selector, with or without a compressor behind it."""

    near: Selector
    far: Compressor | None = None

    def __post_init__(self) -> None:
        if self.far is None or self.near.far_compatible:
            return
        if self.near.picks_keys:
            if not self.far.leaves_out:
                raise ValueError(
                    f"{self.near.name} cannot be paired with {self.far.name} of these settings, "
                    "which cannot leave out single keys"
                )
            return
        if not self.near.keeps_chunks:
            raise ValueError(f"{self.near.name} cannot be paired with a far field")
        if not self.far.separable:
            raise ValueError(
                f"{self.near.name} cannot be paired with {self.far.name}, whose chunks cannot be "
                "left out one by one"
            )
        if self.far.chunk % BLOCK:
            raise ValueError(
                f"chunk must be a multiple of {BLOCK} keys behind {self.near.name}, got "
                f"{self.far.chunk}"
            )

    @property
    def name(self) -> str:
        return self.near.name if self.far is None else f"{self.near.name}+{self.far.name}"

    @property
    def family(self) -> str:
        return self.near.family if self.far is None else "hybrid"

    @property
    def is_dense(self) -> bool:
        return self.near.family == "dense"

    @property
    def static(self) -> bool:
        return self.near.static and self.far is None

    def cost(self, shape: AttentionShape) -> Cost:
        """Multiply-adds of one head of one sequence."""
        if self.far is None:
            return self.near.cost(shape)
        kept = partial(self.near.kept_chunks, chunk=self.far.chunk)
        cost = self.near.cost_beside(shape) + self.far.cost(shape, *self.reach, kept)
        if not self.near.picks_keys:
            return cost
        candidates = self.far.before(shape, *self.reach)
        picked = float(self.near.picked(candidates).sum())
        taken_out = Cost(0.0, self.far.left_out_macs(shape, picked))
        return cost + self.near.chosen_cost(shape, candidates) + taken_out

    @property
    def cost_is_bound(self) -> bool:
        """`cost` counts at most so many pairs: the content decides how many there are."""
        by_content = self.far is not None and (self.near.picks_keys or self.far.opens)
        return by_content or self.near.cost_is_bound

    def density(self, shape: AttentionShape) -> float:
        """Multiply-adds, selection included, as a share of dense causal attention."""
        return self.cost(shape).macs / shape.dense_macs

    def tiles(self, inputs: Inputs, blocks: Tensor) -> tuple[TileList, Slots | None]:
        """The near and far tiles of some query blocks, and the slots that the far tiles read."""
        if self.far is None:
            return self.near.near(inputs, blocks), None
        near = self.beside(inputs, blocks)
        sinks = (self.reach[1],) * len(inputs.head)
        slots, far = self.far.far(
            self.chunked(inputs), near.floor, sinks, near.kept, blocks=blocks, tokens=near.tokens
        )
        return tile_list.concat([near.tiles, far]), slots

    def beside(self, inputs: Inputs, blocks: Tensor) -> NearField:
        """The near field of a pair."""
        assert self.far is not None
        floor = self.far.floor(self.chunked(inputs), blocks, self.near.recent)
        tiles, kept = self.near.beside(inputs, blocks, floor, self.far.chunk)
        tokens = self.near.chosen(inputs, blocks, floor) if self.near.picks_keys else None
        return NearField(tiles, floor[:, None].expand(-1, len(inputs.head), -1), kept, tokens)

    def chunked(self, inputs: Inputs) -> Inputs:
        """The call as the far field sees it: chunks begin at `start`."""
        return inputs.on_blocks if self.near.keeps_chunks else inputs

    def part(self, inputs: Inputs, blocks: Tensor) -> Part | None:
        """What the far field contributes to the rows of some query blocks besides `tiles`."""
        if self.far is None or self.near.keeps_chunks:
            return None
        window, sinks = self.reach
        heads = len(inputs.head)
        end = self.far.floor(inputs, blocks, window)
        floor = end[:, None].expand(-1, heads, -1)
        chunks = int(self.far.chunks_before(inputs, floor).max())
        tokens = None
        if self.near.picks_keys and not self.far.separable:
            tokens = self.near.chosen(inputs, blocks, end)
        return self.far.part(inputs, blocks, floor, (sinks,) * heads, chunks, tokens)

    @property
    def together(self) -> str:
        """Approximations with the same text share what a layer pays once."""
        if self.far is not None:
            alone = self.near.keeps_chunks or self.near.picks_keys
            return repr(self if alone else self.far)
        return self.near.name if self.near.selects_together else repr(self.near)

    @property
    def reach(self) -> tuple[int, int]:
        """Window and sinks of the selector: what a far field must leave to it."""
        return self.near.recent, getattr(self.near, "sinks", 0)

    def fit(self, moments: Moments) -> dict[str, Tensor]:
        """Calibrated data that this approximation reads, for one layer."""
        data = self.near.fit(moments)
        if self.far is not None:
            data |= self.far.fit(moments)
        return data
