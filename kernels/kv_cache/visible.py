"""Which tokens of a text are there and which are padding, for every row of a batch, on the host.

A mask is read once per forward pass; layers then compare and slice by whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Pattern = tuple[int, ...]
"""Lengths of runs of tokens, hidden and visible in turn, hidden first: (3, 5) is 3 of padding and 5
of text, (0, 5) text alone, (0, 5, 2) text and padding after it."""
Places = tuple[int, ...]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Visible:
    """A mask that hides something.

    Attributes:
        mask: bool [batch, tokens], true where a token is visible.
        patterns: the same for each row.
    """

    mask: Tensor
    patterns: tuple[Pattern, ...]
    _heads: dict[int, tuple[Pattern, ...]] = field(default_factory=dict)
    _news: dict[int, tuple[Places | None, ...]] = field(default_factory=dict)

    def before(self, tokens: int) -> tuple[Pattern, ...]:
        """The patterns of the first `tokens` tokens."""
        if tokens not in self._heads:
            self._heads[tokens] = tuple(head(pattern, tokens) for pattern in self.patterns)
        return self._heads[tokens]

    def after(self, tokens: int) -> tuple[Places | None, ...]:
        """For each row, which of the tokens from `tokens` on are visible; None for all."""
        if tokens not in self._news:
            new = self.mask.shape[1] - tokens
            found = (tuple(p - tokens for p in places(each, tokens)) for each in self.patterns)
            self._news[tokens] = tuple(None if len(each) == new else each for each in found)
        return self._news[tokens]


def read(mask: Tensor) -> Visible | None:
    """What a mask [batch, tokens] hides; None where it hides nothing. Waits for the device."""
    shown = mask != 0  # a new tensor, so that what was read can be noted on the mask
    batch, tokens = shown.shape
    runs: list[list[int]] = [[0] if visible else [] for visible in shown[:, 0].tolist()]
    last = [0] * batch
    for row, place in (shown[:, 1:] != shown[:, :-1]).nonzero().tolist():
        runs[row].append(place + 1 - last[row])
        last[row] = place + 1
    patterns = tuple((*run, tokens - end) for run, end in zip(runs, last, strict=True))
    return None if all(p == (0, tokens) for p in patterns) else Visible(shown, patterns)


def head(pattern: Pattern, tokens: int) -> Pattern:
    """The pattern of the first tokens."""
    kept: list[int] = []
    for run in pattern:
        if kept and tokens <= 0:
            break
        kept.append(min(run, tokens))
        tokens -= kept[-1]
    return tuple(kept)


def joined(first: Pattern, whole: Pattern) -> Pattern:
    """The tokens of `first`, and after them those of `whole` that come later."""
    tokens = sum(first)
    flags = [*_flags(first), *_flags(whole)[tokens:]]
    runs: list[int] = [0]
    for visible in flags:
        if visible != (len(runs) % 2 == 0):
            runs.append(0)
        runs[-1] += 1
    return tuple(runs)


def _flags(pattern: Pattern) -> list[bool]:
    return [number % 2 == 1 for number, run in enumerate(pattern) for _ in range(run)]


def count(pattern: Pattern) -> int:
    """Visible tokens."""
    return sum(pattern[1::2])


def spans(pattern: Pattern) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run of visible tokens."""
    place = 0
    for number, run in enumerate(pattern):
        if number % 2 and run:
            yield place, place + run
        place += run


def places(pattern: Pattern, first: int = 0) -> list[int]:
    """Positions of the visible tokens from `first` on."""
    return [place for low, high in spans(pattern) for place in range(max(low, first), high)]


def alike(kinds: Sequence[Kind], rows: Sequence[int]) -> dict[Kind, list[int]]:
    """Which of `rows` are of which kind; `kinds` names it for every row of the batch."""
    found: dict[Kind, list[int]] = {}
    for row in rows:
        found.setdefault(kinds[row], []).append(row)
    return found


def part(tensor: Tensor, index: Tensor | None, chosen: Places | None) -> Tensor:
    """Some rows and some tokens of [batch, heads, tokens, ...]; None for all."""
    if index is not None:
        tensor = tensor.index_select(0, index)
    if chosen is None:
        return tensor
    if chosen[-1] - chosen[0] == len(chosen) - 1:
        return tensor[:, :, chosen[0] : chosen[-1] + 1]
    return tensor.index_select(2, torch.tensor(chosen, device=tensor.device))


def fill(whole: Tensor, found: Tensor, index: Tensor | None, chosen: Places | None) -> None:
    """The inverse of `part`: write `found` into those rows and tokens of `whole`."""
    if index is None and chosen is None:
        whole.copy_(found)
        return
    device = whole.device
    rows = torch.arange(whole.shape[0], device=device) if index is None else index
    tokens = torch.arange(whole.shape[2], device=device)
    if chosen is not None:
        tokens = torch.tensor(chosen, device=device)
    whole[rows[:, None], :, tokens] = found.transpose(1, 2)
