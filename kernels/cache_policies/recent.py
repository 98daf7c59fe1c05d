"""Keep the first and the newest keys.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks,
https://arxiv.org/abs/2309.17453, section 3.2. Unlike there, keys keep their rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from attnplan.kernels.contracts.cache_policy import BoundedKeeper


@dataclass(frozen=True)
class Recent(BoundedKeeper):
    """Keep the first `sinks` keys and the last `window`."""

    name: ClassVar[str] = "recent"
    family: ClassVar[str] = "window"

    @classmethod
    def of(cls, rows: int) -> Self | None:
        return cls(rows - cls.sinks) if rows >= 32 + cls.sinks else None
