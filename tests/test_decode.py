"""Attention over stored rows: every engine computes what the reference defines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnplan.kernels.engines.cpu import decode as cpu_decode
from attnplan.kernels.engines.reference import decode as reference_decode
from attnplan.kernels.operands.kv_rows import PAGE, StoredRows

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ENGINES: list[Callable[..., tuple[Tensor, Tensor]]] = [cpu_decode.decode, cpu_decode.decode_torch]


def layer(
    lengths: list[tuple[tuple[int, ...], int]],
    *,
    group: int,
    queries: int,
    batch: int = 2,
    sizes: tuple[int, int] = (64, 64),
    padded: bool = False,
    paged: bool = False,
    seed: int = 0,
) -> tuple[Tensor, list[StoredRows]]:
    """Queries, and rows of some groups of kv heads, with room to spare that holds garbage."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stored = []
    for heads, length in lengths:
        shape = (batch, len(heads), length + 7)
        key, value, bias = randn(*shape, sizes[0]), randn(*shape, sizes[1]), randn(*shape).float()
        for tensor in (key, value, bias):
            tensor[:, :, length:] = float("nan")
        if padded:
            hidden = min(3, length - queries)
            bias[0, :, :hidden] = float("-inf")
            value[0, :, :hidden] = float("nan")
        rows = StoredRows(heads, key, value, bias if padded else None, length)
        stored.append(scattered(rows, generator) if paged else rows)
    heads = sum(len(names) for names, _ in lengths) * group
    return randn(batch, heads, queries, sizes[0]), stored


def scattered(rows: StoredRows, generator: torch.Generator) -> StoredRows:
    """The same list, its rows on pages in any order, with garbage between."""
    batch, heads, length = *rows.key.shape[:2], rows.length
    used = -(-length // PAGE)
    order = torch.rand(batch, heads, used + 3, generator=generator).argsort(-1)[..., :used]
    row = torch.arange(length)
    place = PAGE * order[..., row // PAGE] + row % PAGE

    def spread(old: Tensor) -> Tensor:
        new = torch.full((batch, heads, PAGE * (used + 3), *old.shape[3:]), float("nan")).to(old)
        index = place.view(*place.shape, *[1] * (old.ndim - 3)).expand_as(old[:, :, :length])
        return new.scatter(2, index, old[:, :, :length])

    bias = None if rows.bias is None else spread(rows.bias)
    key, value = spread(rows.key), spread(rows.value)
    return StoredRows(rows.kv_heads, key, value, bias, length, order.int())


def cast(rows: StoredRows, dtype: torch.dtype) -> StoredRows:
    return replace(rows, key=rows.key.to(dtype), value=rows.value.to(dtype))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    group=st.integers(1, 5),
    queries=st.integers(1, 9),
    dims=st.tuples(st.sampled_from([16, 40, 64, 80]), st.sampled_from([16, 33, 64, 96])),
    padded=st.booleans(),
    paged=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_engines_agree_with_the_reference(
    engine: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    lengths: list[int],
    group: int,
    queries: int,
    dims: tuple[int, int],
    padded: bool,
    paged: bool,
    seed: int,
) -> None:
    """Ragged kv heads, any group, new tokens, padding, pages, values of another width."""
    queries = min(queries, *lengths)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [((head,), length) for head, length in zip(order, lengths, strict=True)]
    query, stored = layer(
        parts, group=group, queries=queries, sizes=dims, padded=padded, paged=paged, seed=seed
    )
    low, stored = query.to(dtype), [cast(rows, dtype) for rows in stored]
    wide = [cast(rows, torch.float64) for rows in stored]
    expected, mass = reference_decode.decode(low.double(), wide, scale=0.3)
    output, log_mass = engine(low, stored, scale=0.3)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=DTYPES[dtype] * 4)
    torch.testing.assert_close(log_mass.double(), mass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_runs_of_rows_are_merged(engine: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Lists of several work items, of very different magnitude, in one layer."""
    query, stored = layer([((1, 2), 3000), ((0,), 40)], group=3, queries=1, batch=1)
    stored[0].key[:, :, 1500] *= 30
    expected, mass = reference_decode.decode(query, stored, scale=0.125)
    single = [cast(rows, torch.float32) for rows in stored]
    output, log_mass = engine(query.float(), single, scale=0.125)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_mass.double(), mass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", [*ENGINES, reference_decode.decode])
def test_a_query_that_sees_nothing_is_zero(engine: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """All rows are padding: no mass, and no NaN."""
    query, stored = layer([((0,), 5)], group=2, queries=1, batch=1)
    hidden = StoredRows(
        (0,),
        stored[0].key.float(),
        torch.full_like(stored[0].value, float("nan")).float(),
        torch.full(stored[0].key.shape[:3], float("-inf")),
        5,
    )
    output, log_mass = engine(query.float(), [hidden], scale=1.0)
    assert not output.any()
    assert log_mass.isneginf().all()


def test_what_does_not_fit_is_refused() -> None:
    """Missing kv heads, dtypes that differ, more new tokens than rows."""
    query, stored = layer([((0,), 5), ((1,), 5)], group=1, queries=1)
    with pytest.raises(ValueError, match="do not serve 2 query heads"):
        cpu_decode.decode(query.float(), [cast(stored[1], torch.float32)], scale=1.0)
    with pytest.raises(ValueError, match="the stored rows are"):
        cpu_decode.decode(query.float(), stored, scale=1.0)
    more = query.float().expand(2, 2, 9, 64)
    with pytest.raises(ValueError, match="5 rows are in use of 12, with 9 of them new"):
        cpu_decode.decode(more, [cast(rows, torch.float32) for rows in stored], scale=1.0)
    paged = layer([((0,), 40), ((1,), 5)], group=1, queries=1, paged=True)[1]
    short = replace(paged[0], pages=paged[0].pages[..., :2])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"expected int32 \[2, 1, 3\] for 40 rows"):
        cpu_decode.decode(query, [short, paged[1]], scale=1.0)


def test_pages_are_a_list_of_rows() -> None:
    """What the oracle reads of pages is what they were made from."""
    plain, paged = (
        layer([((0, 1), 77)], group=1, queries=1, padded=True, paged=paged)[1][0]
        for paged in (False, True)
    )
    found = paged.gathered()
    for name in ("key", "value", "bias"):
        expected = getattr(plain, name)[:, :, :77]
        assert torch.equal(getattr(found, name).nan_to_num(), expected.nan_to_num())
