"""Heads of a tensor, and constants, without waiting for the device that they are on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@lru_cache(maxsize=1024)
def numbers_on(
    numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Some numbers on a device, moved there once: a move waits for the device."""
    return torch.tensor(numbers, dtype=dtype, device=device)


@lru_cache(maxsize=1024)
def first_numbers(count: int, device: torch.device) -> Tensor:
    """0, 1, ... as int64 on a device, the same tensor at every call."""
    return torch.arange(count, device=device)


def heads_of(rows: Tensor, heads: Sequence[int], dim: int = 1) -> Tensor:
    """The heads at `heads` of dimension `dim`: a view where they are neighbours, else a copy."""
    first, count = (heads[0], len(heads)) if heads else (0, 0)
    if tuple(heads) == tuple(range(first, first + count)):
        return rows.narrow(dim, first, count)
    return rows.index_select(dim, numbers_on(tuple(heads), rows.device))


_moved = WeakIdKeyDictionary()


def alike(constant: Tensor, rows: Tensor) -> Tensor:
    """A constant in the dtype and on the device of some rows, moved there once while it lives."""
    known: dict[object, Tensor] = _moved.setdefault(constant, {})
    place = rows.dtype, rows.device
    if place not in known:
        known[place] = constant.to(rows)
    return known[place]


def generator(seed: int, number: int) -> torch.Generator:
    """Random numbers for one of many things, on the CPU.

    torch's generator tells seeds apart by their lowest 32 bits alone.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % (1 << 32))
