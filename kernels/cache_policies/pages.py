"""Keep everything, and read the pages that could matter to a token.

A page is 16 neighbouring keys; of each the store keeps the largest and the smallest number of every
channel. No key of a page scores more with a query q than

    s sum_c max(q_c high_c, q_c low_c)

A group of query heads reads one list: every head's softmax over these bounds, summed over the
heads, and of that the largest. The first page (sinks) and the newest are always read.

Source: Tang et al., Quest, https://arxiv.org/abs/2406.10774, section 3.3. Deviations: a group of
heads that shares its keys shares its pages; bounds go through a softmax before heads are added, so
that heads of large scores do not decide for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.cache_policy import Keeper, Past
from attnplan.kernels.operands.kv_rows import PAGE

SHARES = (32, 16, 8, 4)
"""Parts of a context that are worth reading."""


@dataclass(frozen=True)
class Pages(Keeper):
    """Read `pages` chosen pages beside the first and those of the last `window` keys."""

    name: ClassVar[str] = "pages"
    family: ClassVar[str] = "sparse"
    reads: ClassVar[bool] = True

    pages: int
    window: int = 64

    def __post_init__(self) -> None:
        if self.pages < 1:
            raise ValueError(f"pages must be at least 1, got {self.pages}")
        if self.window < PAGE:
            raise ValueError(f"window must be at least {PAGE} keys, got {self.window}")

    @property
    def limit(self) -> None:
        return None

    @property
    def recent(self) -> int:
        return self.window

    @classmethod
    def choices(cls, context: int) -> Iterator[Self]:
        for share in SHARES:
            rows = context // share
            window = max(2 * PAGE, rows // 4 // PAGE * PAGE)
            pages = (rows - window) // PAGE - 2
            if pages >= 1:
                yield cls(pages, window)

    def condense(self, past: Past) -> Past:
        return past

    def choose(
        self, bounds: Tensor, query: Tensor, scale: float, length: int, first: Tensor | None
    ) -> Tensor | None:
        used = -(-length // PAGE)
        newest = max(length - self.window, 0) // PAGE  # the page in which the window begins
        if newest <= self.pages + 1:
            return None
        signed = torch.cat([query.clamp(min=0), query.clamp(max=0)], -1).float() * scale
        logits = signed @ bounds[:, :, :newest].float().mT  # [batch, kv_heads, group, pages]
        if first is None:
            worth = logits.softmax(-1).sum(2)
            worth[..., 0] = float("inf")
        else:
            page = torch.arange(newest, device=query.device)
            start = (first // PAGE)[:, None, None]
            logits = logits.masked_fill((page < start)[:, :, None], float("-inf"))
            worth = logits.softmax(-1).nan_to_num(0.0).sum(2)
            # pages of padding alone come last, and hold nothing
            worth = torch.where(page < start, -1.0, worth)
            worth = torch.where(page == start, float("inf"), worth)
        chosen = worth.topk(self.pages + 1, sorted=False).indices.int()
        rest = torch.arange(newest, used, dtype=torch.int32, device=query.device)
        return torch.cat([chosen, rest.expand(*chosen.shape[:2], -1)], -1)
