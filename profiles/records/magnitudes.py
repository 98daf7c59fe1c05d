"""How large the weights of a model are: what a digest of their signs does not tell.

Magnitudes are held against each other with a tolerance, and never digested: rounding to another
floating-point type moves each a little, and any edge between two digests would cut between copies
of some model.
"""

from __future__ import annotations

from collections.abc import Mapping

TOLERANCE = 0.01
"""Of a magnitude: bfloat16 rounds by 2^-9, so by 0.003, and the mean of many weights by less."""

Magnitudes = Mapping[str, float]
"""Kind of weight to the binary logarithm of its mean absolute value, mean over the layers."""


def difference(mine: Magnitudes | None, other: Magnitudes | None) -> str | None:
    """How other weights are larger or smaller, in words; None where they are as large.

    Where one side is unknown, as in files of older versions, nothing is said.
    """
    for kind in sorted((mine or {}).keys() & (other or {}).keys()):
        assert mine is not None and other is not None
        away = mine[kind] - other[kind]
        if abs(away) > TOLERANCE:
            return f"{kind} is {2**away:.3g} times as large"
    return None
