"""Choosing single keys and packing them into gather tiles."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.token_tiles import pack_tokens
from attnplan.kernels.selectors import _top_tokens as top_tokens

SELECTORS = [top_tokens.top_tokens, top_tokens.top_tokens_torch]


def brute_force(
    query: Tensor, key: Tensor, kv_head: tuple[int, ...], low: Tensor, high: Tensor, top: int
) -> Tensor:
    out = torch.full((*query.shape[:3], top), -1, dtype=torch.int32)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            score = (query[b, h] @ key[b, kv_head[h]].mT).tolist()
            for i in range(query.shape[2]):
                candidates = range(max(0, int(low[b, i])), min(key.shape[2], int(high[b, i])))
                best = sorted(candidates, key=lambda j: (-score[i][j], j))[:top]
                out[b, h, i, : len(best)] = torch.tensor(sorted(best), dtype=torch.int32)
    return out


@pytest.mark.parametrize("select", SELECTORS)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.sampled_from([1, 15, 64, 100, 700]),
    rank=st.sampled_from([1, 4, 16, 33]),
    top=st.sampled_from([1, 3, 32, 100]),
    levels=st.sampled_from([1, 2, 50]),
)
def test_the_largest_scores_are_chosen_and_ties_go_to_the_smaller_position(
    select: Callable[..., Tensor],
    seed: int,
    batch: int,
    group: int,
    queries: int,
    keys: int,
    rank: int,
    top: int,
    levels: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(*size: int) -> Tensor:  # sums are exact, ties are many
        return torch.randint(-levels, levels + 1, size, generator=generator).float()

    query, key = integers(batch, 2 * group, queries, rank), integers(batch, 2, keys, rank)
    kv_head = tuple(h // group for h in range(2 * group))
    low = torch.randint(-2, keys, (batch, queries), generator=generator)
    high = torch.randint(-2, keys + 9, (batch, queries), generator=generator)
    actual = select(query, key, kv_head=kv_head, low=low, high=high, top=top)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, brute_force(query, key, kv_head, low, high, top))


def test_both_paths_agree_on_long_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 70, 16, generator=generator).bfloat16()
    key = torch.randn(1, 1, 5000, 16, generator=generator).bfloat16()
    low, high = torch.full((1, 70), 4), torch.arange(4900, 4970)[None]
    arguments = {"kv_head": (0, 0), "low": low, "high": high, "top": 48}
    first, second = (select(query, key, **arguments) for select in SELECTORS)
    assert (first != second).float().mean() < 0.01  # sums in another order may swap near ties


def test_wrong_inputs_are_named() -> None:
    query, key = torch.randn(1, 2, 8, 4), torch.randn(1, 1, 8, 4)
    bound = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="top must be at least 1 key, got 0"):
        top_tokens.top_tokens(query, key, kv_head=(0, 0), low=bound, high=bound, top=0)
    with pytest.raises(ValueError, match=r"low and high are \[1, 8\] or \[1, 2, 8\], got \[1, 7\]"):
        top_tokens.top_tokens(query, key, kv_head=(0, 0), low=bound[:, :7], high=bound, top=3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    queries=st.sampled_from([1, 63, 64, 65, 200]),
    keys=st.sampled_from([1, 64, 130, 1000]),
    top=st.sampled_from([1, 5, 32]),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_packed_tokens_are_the_same_list_as_the_definition(
    seed: int, batch: int, queries: int, keys: int, top: int, kept: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, 3, queries, keys)
    order = torch.rand(size, generator=generator).argsort(-1)[..., :top].to(torch.int32)
    tokens = torch.full((*size[:3], top), -1, dtype=torch.int32)
    there = torch.rand(order.shape, generator=generator) < kept
    tokens[..., : order.shape[-1]] = torch.where(there, order, -1)
    packed = pack_tokens(tokens, keys)
    expected = tile_list.from_tokens(tokens, keys)
    assert (packed.batch, packed.heads, packed.blocks) == (batch, 3, expected.blocks)
    for field in ("offsets", "tiles", "gather", "masks"):
        actual, wanted = getattr(packed, field), getattr(expected, field)
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted), field


def test_no_tokens_make_no_tiles() -> None:
    packed = pack_tokens(torch.zeros(1, 2, 70, 0, dtype=torch.int32), 70)
    assert packed.tiles.shape == (0, 3) and packed.rows == 4


def test_a_token_outside_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match="a token is outside the text: 70 of 70 keys"):
        pack_tokens(torch.full((1, 1, 3, 1), 70, dtype=torch.int32), 70)
