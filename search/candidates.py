"""Which approximations a search considers."""

from __future__ import annotations

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape

MOST = 0.9
"""A candidate that computes a larger share than this is no alternative to dense."""


def parse_methods(spelled: str) -> frozenset[str]:
    """Names of methods, separated by commas.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name.strip() for name in spelled.split(",")]
    known = [*catalog.NEAR, *catalog.FAR]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return frozenset(names)


def candidates(
    shape: AttentionShape, methods: frozenset[str] | None = None
) -> tuple[Approximation, ...]:
    """Every approximation of the catalog that saves something at this shape; dense comes first.

    Args:
        shape: of a layer's attention.
        methods: names of the methods to consider; of a pair, both must be among them. None for all.
    """
    found = dict.fromkeys(catalog.choices(shape))
    return tuple(
        a
        for a in found
        if a.is_dense
        or (a.density(shape) <= MOST and (methods is None or methods.issuperset(_parts(a))))
    )


def _parts(approximation: Approximation) -> list[str]:
    far = [] if approximation.far is None else [approximation.far.name]
    return [approximation.near.name, *far]
