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

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, TileList


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

    @property
    def counts_tiles(self) -> bool:
        """How many tiles a query block reads is known beforehand, if not which."""
        if self.far is None:
            return self.near.counts_tiles
        return self.near.static and not self.far.opens

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
