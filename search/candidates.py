"""Which approximations a search considers."""

from __future__ import annotations

from attnplan.kernels import catalog
from attnplan.kernels.approximation import Approximation, AttentionShape

MOST = 0.9
"""A candidate that computes a larger share than this is no alternative to dense."""


def candidates(shape: AttentionShape) -> tuple[Approximation, ...]:
    """Every approximation of the catalog that saves something at this shape; dense comes first."""
    found = dict.fromkeys(catalog.choices(shape))
    return tuple(a for a in found if a.is_dense or a.density(shape) <= MOST)
