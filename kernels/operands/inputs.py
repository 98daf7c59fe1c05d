"""One attention call, and what methods are fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from attnplan.kernels.operands.indexing import first_numbers, heads_of
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK

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
