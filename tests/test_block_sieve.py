"""Choosing single keys behind a sieve of blocks."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnplan.kernels.selectors import _block_sieve as block_sieve
from attnplan.kernels.selectors._block_sieve import SIEVE
from attnplan.kernels.selectors._top_tokens import top_tokens

SELECTORS = [block_sieve.sieved_tokens, block_sieve.sieved_tokens_torch]


def brute_force(
    query: Tensor,
    key: Tensor,
    kv_head: tuple[int, ...],
    start: tuple[int, ...],
    sinks: int,
    high: Tensor,
    blocks: int,
    top: int,
) -> Tensor:
    out = torch.full((*query.shape[:3], top), -1, dtype=torch.int32)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            keys = key[b, kv_head[h], start[b] :]
            for i in range(query.shape[2]):
                q, end = query[b, h, i], int(high[i]) - start[b]
                bounds = {}
                for first in range(0, end, SIEVE):
                    if first + SIEVE > sinks:
                        run = keys[first : first + SIEVE]
                        bounds[first] = float(torch.maximum(q * run.amax(0), q * run.amin(0)).sum())
                best = sorted(bounds, key=lambda f: (-bounds[f], f))[:blocks]
                inside = [
                    j for f in best for j in range(max(f, sinks), min(f + SIEVE, end, len(keys)))
                ]
                score = {j: float(q @ keys[j]) for j in inside}
                chosen = sorted(sorted(score, key=lambda j: (-score[j], j))[:top])
                out[b, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32) + start[b]
    return out


@pytest.mark.parametrize("select", SELECTORS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    group=st.integers(1, 3),
    queries=st.integers(1, 12),
    keys=st.sampled_from([33, 64, 100, 700]),
    rank=st.sampled_from([1, 4, 17]),
    blocks=st.sampled_from([1, 2, 8, 40]),
    top=st.sampled_from([1, 3, 32]),
    sinks=st.sampled_from([0, 4, 20]),
    start=st.integers(0, 30),
)
def test_the_best_keys_of_the_best_blocks_are_chosen(
    select: Callable[..., Tensor],
    seed: int,
    group: int,
    queries: int,
    keys: int,
    rank: int,
    blocks: int,
    top: int,
    sinks: int,
    start: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(*size: int) -> Tensor:  # sums are exact, ties are many
        return torch.randint(-3, 4, size, generator=generator).float()

    query, key = integers(2, 2 * group, queries, rank), integers(2, 2, keys, rank)
    kv_head = tuple(h // group for h in range(2 * group))
    high = torch.randint(-1, keys + 1, (queries,), generator=generator)
    starts = (start, 0)
    chosen = select(
        query,
        key,
        kv_head=kv_head,
        start=starts,
        sinks=sinks,
        high=high,
        blocks=blocks,
        top=top,
    )
    expected = brute_force(query, key, kv_head, starts, sinks, high, blocks, top)
    assert torch.equal(chosen, expected)


def test_blocks_of_all_keys_choose_what_scores_best() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 300, 16, generator=generator)
    key = torch.randn(1, 2, 300, 16, generator=generator)
    high = torch.arange(300) - 15
    whole = {"kv_head": (0, 0, 1, 1), "top": 8}
    sieved = block_sieve.sieved_tokens(
        query, key, start=(0,), sinks=4, high=high, blocks=19, **whole
    )
    low = torch.full((1, 300), 4)
    assert torch.equal(sieved, top_tokens(query, key, low=low, high=high[None], **whole))
