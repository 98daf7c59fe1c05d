"""Starting a Triton kernel at little cost on the host.

Triton inspects every argument at every start (types, alignment, divisibility) to find the compiled
kernel: about a microsecond each. Where all tensors and strides are aligned, what it finds depends
on what the caller knows already, and the compiled kernel is started at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

ALIGNED = 16
"""Bytes of an address, or numbers of a stride, that Triton specialises kernels for."""
LARGEST = 2**31 - 1


class Launcher:
    """Starts one kernel.

    Args:
        kernel: a function under `triton.jit`, whose constexpr parameters come last.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        arguments: Sequence[object],
        constants: Mapping[str, object],
        options: Mapping[str, object],
        key: Hashable = None,
    ) -> None:
        """Start it.

        Args:
            grid: programs, in one to three directions.
            arguments: all that are no constexpr.
            constants: the constexpr parameters, in their order.
            options: warps, stages and so on.
            key: names dtypes, constants, options and device; given only where all tensors and all
                specialised numbers among the arguments are aligned.
        """
        compiled = None if key is None else self._known.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
            return
        compiled = self._kernel[grid](*arguments, **constants, **options)
        if key is not None and compiled is not None:  # None: in the interpreter
            self._known[key] = compiled


def are_aligned(tensors: Iterable[Tensor], strides: Iterable[int]) -> bool:
    """Whether a launch with these tensors and numbers may go without Triton's inspection."""
    return all(t.data_ptr() % ALIGNED == 0 for t in tensors) and all(
        n % ALIGNED == 0 and n <= LARGEST for n in strides
    )
