"""Queries and keys in coordinates in which both are as short as their products allow.

For any invertible A, q.k = (A q).(A^-T k). With second moments S_q of the queries and S_k of the
centred keys, E|Aq|^2 + E|A^-T k|^2 is least where M = A^-1 A^-T solves M S_k M = S_q, the geometric
mean of S_q and S_k^-1; M^1/2 is then the map of the keys and M^-1/2 that of the queries. Taking a
key mean away from all keys moves all scores of a query alike, so it changes no softmax.

Source: the stationarity condition of tr(G S_q) + tr(G^-1 S_k), whose solution is the matrix
geometric mean (Bhatia, Positive Definite Matrices, section 4.1).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attnplan.kernels.operands.indexing import heads_of
from attnplan.kernels.operands.inputs import Inputs, Moments

FLOOR = 1e-6
"""Directions with a smaller share of the largest energy are not stretched further."""


def fit(moments: Moments) -> dict[str, Tensor]:
    """Balanced coordinates of every head, float32.

    `balanced.query_mean` and `balanced.key_mean` [heads, head_dim], `balanced.key_map` and
    `balanced.query_map` [heads, head_dim, head_dim]: a centred key k becomes k @ key_map.
    """
    return dict(_balance(moments))


@lru_cache(maxsize=1)  # several methods ask for the same layer
def _balance(moments: Moments) -> dict[str, Tensor]:
    query_mean, query, key_mean, key = _centred(moments)
    root, inverse_root = _powers(key)
    middle, _ = _powers(root @ query @ root)
    key_map, query_map = _powers(inverse_root @ middle @ inverse_root)
    return {
        "balanced.query_mean": query_mean.float(),
        "balanced.key_mean": key_mean.float(),
        "balanced.key_map": key_map.float(),
        "balanced.query_map": query_map.float(),
    }


def fit_directions(moments: Moments) -> dict[str, Tensor]:
    """The principal directions of every head in balanced coordinates, float32, strongest first.

    `balanced.directions` [heads, head_dim, head_dim], in columns, and `balanced.spread`
    [heads, head_dim], the standard deviation along each: the same for queries and for keys.
    """
    return dict(_directions(moments))


def without_directions(fitted: frozenset[str]) -> frozenset[str]:
    """What is left of some names where the directions are not read."""
    return fitted - {"balanced.directions", "balanced.spread"}


@lru_cache(maxsize=1)
def _directions(moments: Moments) -> dict[str, Tensor]:
    *_, key = _centred(moments)
    key_map = fit(moments)["balanced.key_map"].double()
    values, vectors = torch.linalg.eigh(key_map @ key @ key_map)
    return {
        "balanced.directions": vectors.flip(-1).float().contiguous(),
        "balanced.spread": values.clamp(min=0).sqrt().flip(-1).float().contiguous(),
    }


def _centred(moments: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and covariance of the queries, then of the keys, of every head, float64."""
    heads = moments.query_mean.shape[0]
    group = heads // moments.key_mean.shape[0]
    key_mean = moments.key_mean.double().repeat_interleave(group, 0)
    query_mean = moments.query_mean.double()
    query = moments.query_gram.double() - query_mean[:, :, None] * query_mean[:, None, :]
    key = moments.key_gram.double().repeat_interleave(group, 0)
    return query_mean, query, key_mean, key - key_mean[:, :, None] * key_mean[:, None, :]


def coordinates(
    inputs: Inputs, query: Tensor, *, rank: int = 0, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and centred keys in balanced coordinates, each [batch, heads, rows, columns].

    float32, or float64 for float64 inputs. A query's products with all keys move alike.

    Args:
        inputs: the call, with its fitted data.
        query: rows of its queries.
        rank: along so many of the strongest directions; 0 for head_dim coordinates of no order.
        onto: vectors [head_dim, columns] to project on instead, at the cost of the columns.
    """
    wide = torch.promote_types(inputs.key.dtype, torch.float32)

    def fitted(name: str) -> Tensor:
        return inputs.fitted_heads(f"balanced.{name}", inputs.head).to(wide)

    maps = [fitted("query_map"), fitted("key_map")]
    if rank:
        strongest = fitted("directions")[..., :rank]
        maps = [each @ strongest for each in maps]
    elif onto is not None:
        maps = [each @ onto.to(each) for each in maps]
    key = heads_of(inputs.key, inputs.kv_head).to(wide) - fitted("key_mean")[:, None]
    return query.to(wide) @ maps[0], key @ maps[1]


def root(gram: Tensor) -> Tensor:
    """Symmetric square root of Grams [n, d, d], what rounding made negative taken for zero."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()[:, None, :] @ vectors.mT


def _powers(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of Grams [n, d, d], with a floor under eigenvalues."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    values = torch.maximum(values, values.amax(-1, keepdim=True).clamp(min=1e-12) * FLOOR)
    root = values.sqrt()[:, None, :]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT
