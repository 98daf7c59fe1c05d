"""One attention call of an encoder: every token reads every token, padding reads nothing.

Landmarks are taken from the tokens alone, counted without padding: where the padding is, how much
of it there is, and what else is in the batch change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderInputs:
    """The tensors of a call at the precision of the arithmetic, zero where there is padding.

    Attributes:
        query, key: [batch, heads, length, head_dim], float32 or float64.
        value: [batch, heads, length, value_dim].
        scale: factor before the softmax.
        token: bool [batch, length], true for tokens, false for padding.
        dtype: of the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    token: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        padding: Tensor | None = None,
    ) -> Self:
        """Checked inputs.

        Args:
            query, key: [batch, heads, length, head_dim].
            value: [batch, heads, length, value_dim].
            scale: factor before the softmax, 1 / sqrt(head_dim) when None.
            padding: bool [batch, length], true for padding; None for none.

        Raises:
            ValueError: the sizes or dtypes do not fit.
        """
        shape = tuple(query.shape)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"query must be [batch, heads, length, head_dim], got {shape}")
        if key.shape != query.shape or value.ndim != 4 or value.shape[:3] != query.shape[:3]:
            raise ValueError(
                "an encoder needs as many heads and positions in key and value as in query, got "
                f"query {shape}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            )
        dtypes = {x.dtype for x in (query, key, value)}
        if len(dtypes) > 1 or not query.is_floating_point():
            raise ValueError(
                "query, key and value must have one floating-point dtype, got "
                f"{query.dtype}, {key.dtype}, {value.dtype}"
            )
        scale = shape[-1] ** -0.5 if scale is None else scale
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        where = (shape[0], shape[2])
        if padding is None:
            padding = torch.zeros(where, dtype=torch.bool, device=query.device)
        if padding.dtype != torch.bool or padding.shape != where:
            raise ValueError(
                f"padding must be bool {list(where)}, true for padding, got "
                f"{padding.dtype} {list(padding.shape)}"
            )
        working = query.dtype if query.dtype == torch.float64 else torch.float32
        nothing = padding[:, None, :, None]
        query, key, value = (x.to(working).masked_fill(nothing, 0) for x in (query, key, value))
        return cls(query, key, value, scale, ~padding, next(iter(dtypes)))

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @property
    def token_ranks(self) -> Tensor:
        """How many tokens of the row come before each position, int64 [batch, length]."""
        return self.token.cumsum(1) - self.token.long()

    def mean(self, x: Tensor) -> Tensor:
        """The mean over tokens of x [batch, heads, length, dim]: [batch, heads, 1, dim]."""
        token = self.token[:, None, :, None]
        return (x * token).sum(2, keepdim=True) / token.sum(2, keepdim=True).clamp(min=1)

    def finish(self, output: Tensor) -> Tensor:
        """Zero where there is padding, in the dtype of the inputs."""
        return output.masked_fill(~self.token[:, None, :, None], 0).to(self.dtype)

    def segments(self, count: int) -> Segments:
        """The tokens of each row in `count` runs of nearly equal length, in their order.

        A row with fewer tokens gets one run for each of them; its other runs are empty.
        """
        if count < 1:
            raise ValueError(f"at least 1 landmark is needed, got {count}")
        count = min(count, self.length)
        tokens = self.token.sum(1, keepdim=True)  # [batch, 1]
        edge = torch.arange(count + 1, device=tokens.device) * tokens // count
        order = (~self.token).long().argsort(dim=1, stable=True)
        return Segments(order, edge[:, :-1], edge[:, 1:])


@dataclass(frozen=True)
class Segments:
    """Runs of tokens.

    Attributes:
        order: the positions of each row, tokens first, int64 [batch, length].
        first, end: of each run among these, int64 [batch, segments].
    """

    order: Tensor
    first: Tensor
    end: Tensor

    @property
    def filled(self) -> Tensor:
        """Which runs have a token, bool [batch, segments]."""
        return self.end > self.first

    def mean(self, x: Tensor) -> Tensor:
        """The mean of each run, zero for an empty one: [batch, heads, segments, dim].

        Args:
            x: [batch, heads, length, dim].
        """
        segments = self.first.shape[1]
        width = -(-self.order.shape[1] // segments)
        at = self.first[..., None] + torch.arange(width, device=x.device)
        inside = at < self.end[..., None]  # [batch, segments, width]
        rows = self._rows(x, at.flatten(1)).unflatten(2, (segments, width))
        share = inside / (self.end - self.first).clamp(min=1)[..., None]
        return (rows * share.to(x.dtype)[:, None, ..., None]).sum(3)

    def sample(self, x: Tensor, where: Tensor) -> Tensor:
        """One token of each run: [batch, heads, segments, dim].

        Args:
            x: [batch, heads, length, dim].
            where: in each run, from 0 to below 1 [segments].
        """
        return self._rows(x, self.first + (where * (self.end - self.first)).long())

    def _rows(self, x: Tensor, at: Tensor) -> Tensor:
        position = self.order.gather(1, at.clamp(max=self.order.shape[1] - 1))
        return x.gather(2, position[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def masked_softmax(scores: Tensor, there: Tensor) -> Tensor:
    """Softmax over the columns that are there; zero elsewhere, and where none is.

    Args:
        scores: [batch, heads, rows, columns].
        there: bool [batch, heads or 1, 1, columns].
    """
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~there, lowest).softmax(-1).masked_fill(~there, 0)
