"""Keep everything: the layer's own cache, without concatenations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from attnplan.kernels.contracts.cache_policy import Keeper, Past


@dataclass(frozen=True)
class Full(Keeper):
    """Keep every key."""

    name: ClassVar[str] = "full"
    family: ClassVar[str] = "dense"

    @property
    def limit(self) -> None:
        return None

    @property
    def recent(self) -> int:
        return 1 << 31

    @classmethod
    def choices(cls, context: int) -> Iterator[Self]:
        yield cls()

    def condense(self, past: Past) -> Past:
        return past
