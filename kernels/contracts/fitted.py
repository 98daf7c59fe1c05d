"""What fitted data of a method looks like: names and sizes, found by fitting white noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from attnplan.kernels.operands.inputs import Moments


class Fits(Protocol):
    """A method, or a keeper, that may be fitted to the moments of a layer."""

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Sizes:
    """Of one fitted tensor.

    Attributes:
        by_query_head: whether the first dimension is heads, not kv_heads.
        rest: the other dimensions.
    """

    by_query_head: bool
    rest: tuple[int, ...]

    def of(self, heads: int, kv_heads: int) -> tuple[int, ...]:
        """The whole shape in a layer of so many heads."""
        return (heads if self.by_query_head else kv_heads, *self.rest)


@cache
def layout(method: type[Fits], head_dim: int) -> Mapping[str, Sizes]:
    """What a method fits to heads of this size, 'method.tensor' to its sizes."""
    heads, kv_heads = 2, 1  # told apart by the first dimension
    mean, gram = torch.zeros(heads, head_dim), torch.eye(head_dim).expand(heads, -1, -1)
    noise = Moments(mean, gram, mean[:kv_heads], gram[:kv_heads])
    return {
        name: Sizes(len(tensor) == heads, tuple(tensor.shape[1:]))
        for name, tensor in method.fit(noise).items()
    }
