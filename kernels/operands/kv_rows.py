"""What a layer stores of its past: for every kv head one list of rows, keys and pseudo-keys alike.

Kv heads that store equally many rows share tensors. A row adds e^{scale q.k + bias} to a query's
mass and as much of its value to the numerator: an exact key has bias 0, a pseudo-key the logarithm
of the mass that it stands for, a row of padding -inf. The newest rows stand last.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 16
"""Rows that are chosen together, where a list names pages."""


@dataclass(frozen=True)
class StoredRows:
    """The rows of some kv heads of one layer.

    Attributes:
        kv_heads: which kv heads of the layer, in the order of dimension 1.
        key: [batch, kv_heads, capacity, head_dim]; may be a view with any strides but the last.
        value: [batch, kv_heads, capacity, value_dim].
        bias: float32 [batch, kv_heads, capacity] or None for zero.
        length: rows in use, the first `length`; at least the number of queries.
        pages: int32 [batch, kv_heads, ceil(length / PAGE)] or None: row i of the list is row
            `i % PAGE` of page `pages[..., i // PAGE]` of the tensors.
    """

    kv_heads: tuple[int, ...]
    key: Tensor
    value: Tensor
    bias: Tensor | None
    length: int
    pages: Tensor | None = None

    def fits(self, queries: int) -> bool:
        """Whether so many rows can be in use, `queries` of them new."""
        pages = self.pages
        return queries <= self.length <= self.key.shape[2] and (
            pages is None or pages.shape[2] == -(-self.length // PAGE)
        )

    def gathered(self) -> StoredRows:
        """The same list without pages, copied into one piece."""
        if self.pages is None:
            return self
        place = torch.arange(self.length, device=self.key.device)
        index = PAGE * self.pages[..., place // PAGE].long() + place % PAGE
        key, value = (
            torch.gather(t, 2, index[..., None].expand(*index.shape, t.shape[3]))
            for t in (self.key, self.value)
        )
        bias = None if self.bias is None else self.bias.gather(2, index)
        return StoredRows(self.kv_heads, key, value, bias, self.length)


def identity(query: Tensor, stored: Sequence[StoredRows]) -> tuple[Hashable, ...]:
    """What `check` looks at but for lengths, and where the rows are: calls alike read the same."""
    places = (
        (rows.kv_heads, *(_place(t) for t in (rows.key, rows.value, rows.bias, rows.pages)))
        for rows in stored
    )
    return query.shape, query.dtype, query.device, *places


def _place(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def check(query: Tensor, stored: Sequence[StoredRows]) -> int:
    """How many query heads share a kv head.

    Args:
        query: [batch, heads, queries, head_dim].
        stored: every kv head of the layer once.

    Raises:
        ValueError: heads, dtypes or lengths do not fit together.
    """
    batch, heads, queries, head_dim = query.shape
    named = sorted(h for rows in stored for h in rows.kv_heads)
    if named != list(range(len(named))) or not named or heads % len(named):
        raise ValueError(f"kv heads {named} do not serve {heads} query heads")
    for rows in stored:
        shape = (batch, len(rows.kv_heads), rows.key.shape[2])
        if rows.key.shape != (*shape, head_dim) or rows.value.shape[:3] != shape:
            raise ValueError(
                f"key {list(rows.key.shape)} and value {list(rows.value.shape)} do not fit query "
                f"{list(query.shape)} and kv heads {rows.kv_heads}"
            )
        if rows.key.dtype != query.dtype or rows.value.dtype != query.dtype:
            raise ValueError(f"query is {query.dtype}, the stored rows are {rows.key.dtype}")
        if rows.bias is not None and rows.bias.shape != shape:
            raise ValueError(f"bias is {list(rows.bias.shape)}, expected {list(shape)}")
        pages = rows.pages
        if pages is not None and (
            pages.dtype != torch.int32 or pages.shape != (*shape[:2], -(-rows.length // PAGE))
        ):
            raise ValueError(
                f"pages are {pages.dtype} {list(pages.shape)}, expected int32 "
                f"{[*shape[:2], -(-rows.length // PAGE)]} for {rows.length} rows"
            )
        if not queries <= rows.length <= shape[2]:
            raise ValueError(
                f"{rows.length} rows are in use of {shape[2]}, with {queries} of them new"
            )
    return heads // len(named)


def bounds_of(key: Tensor) -> Tensor:
    """Largest and smallest numbers of each page, [..., pages, 2 head_dim].

    Args:
        key: [..., rows, head_dim]; the last page may have fewer rows.
    """
    missing = -key.shape[-2] % PAGE
    if missing:
        key = torch.cat([key, key[..., -1:, :].expand(*key.shape[:-2], missing, -1)], -2)
    paged = key.unflatten(-2, (-1, PAGE))
    return torch.cat([paged.amax(-2), paged.amin(-2)], -1)
