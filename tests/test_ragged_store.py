"""A batch with padding: every row gives and keeps what it gives and keeps alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_layer_store import DIM, GROUP, SMALL, fitted
from tests.test_patch import CONFIGS, build, logits, text
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.cache_policies.observed import Observed
from attnplan.kernels.cache_policies.pages import Pages
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.kernels.kv_cache import visible
from attnplan.kernels.kv_cache.layer_cache import LayerStore
from attnplan.kernels.kv_cache.ragged_cache import RaggedStore
from attnplan.kernels.operands.inputs import Moments
from attnplan.runtime.patch import patch_assignment

PATTERNS = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(
    lambda runs: (runs[0], *(run or 1 for run in runs[1:]))
)


def flags(pattern: tuple[int, ...]) -> list[bool]:
    return [n % 2 == 1 for n, run in enumerate(pattern) for _ in range(run)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
def test_patterns_are_their_flags(row: list[bool], data: st.DataObject) -> None:
    """Read from a mask, cut, joined, counted, placed."""
    other = [not row[0], *row[1:]]
    seen = visible.read(torch.tensor([row, other]))
    assert seen is not None
    for pattern, expected in zip(seen.patterns, (row, other), strict=True):
        assert flags(pattern) == expected
        cut = data.draw(st.integers(0, len(row)))
        assert flags(visible.head(pattern, cut)) == expected[:cut]
        assert visible.count(pattern) == sum(expected)
        assert visible.places(pattern, cut) == [
            i for i, shown in enumerate(expected) if shown and i >= cut
        ]
        first = visible.head(pattern, cut)
        assert visible.joined(first, pattern) == pattern
    assert visible.read(torch.ones(2, 5)) is None


def some_tokens(batch: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, heads, count, DIM, generator=generator) for heads in (GROUP * 2, 2, 2)
    )


@pytest.mark.parametrize("keeper", SMALL)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_every_row_is_stored_as_it_would_be_alone(keeper: Keeper, data: st.DataObject) -> None:
    """Any padding of the prompt, holes in later chunks, rows reordered in between."""
    batch = data.draw(st.integers(1, 4))
    prompt = data.draw(st.integers(40, 150))
    starts = [data.draw(st.integers(0, prompt - 1)) for _ in range(batch)]
    steps = [prompt, *data.draw(st.lists(st.sampled_from([1, 3, 30]), min_size=2, max_size=8))]
    total = sum(steps)
    query, key, value = some_tokens(batch, total, 3)
    mask = torch.ones(batch, total, dtype=torch.bool)
    for row, start in enumerate(starts):
        mask[row, :start] = False
    hole = prompt + data.draw(st.integers(0, total - prompt))
    mask[0, hole : hole + 2] = False
    kept = (keeper, Full())
    store = RaggedStore(kept, scale=DIM**-0.5, fitted=fitted(2))
    alone = [LayerStore(kept, scale=DIM**-0.5, fitted=fitted(2)) for _ in range(batch)]
    order = list(range(batch))
    first = 0
    for step in steps:
        part = slice(first, first + step)
        now = mask[order, : part.stop]
        store.append(key[order, :, part], value[order, :, part], visible.read(now))
        found = store.attend(query[order, :, part])
        store.settle(query[order, :, part])
        for place, row in enumerate(order):
            own = mask[row, part]
            if not own.any():
                continue
            q, k, v = (t[row : row + 1, :, part][:, :, own] for t in (query, key, value))
            alone[row].append(k, v)
            expected = alone[row].attend(q)
            alone[row].settle(q)
            if not isinstance(keeper, Full):
                assert not found[place][:, ~own].any()
            torch.testing.assert_close(
                found[place : place + 1][:, :, own], expected, rtol=0, atol=2e-5
            )
        if data.draw(st.booleans()):
            turn = data.draw(st.permutations(range(batch)))
            store.select(torch.tensor(turn))
            order = [order[place] for place in turn]
        first = part.stop
    lengths = {alone[row].rows for row in range(batch)}
    if store.rows[0] != store.seen:
        assert store.rows == tuple(max(each) for each in zip(*lengths, strict=True))


MODEL_KEEPERS: list[Keeper] = [
    Full(),
    Recent(window=32, sinks=2),
    Observed(window=32, keys=16),
    Pages(pages=2, window=32),
]


@pytest.mark.parametrize("keeper", MODEL_KEEPERS)
def test_a_batch_generates_what_its_rows_generate_alone(keeper: Keeper) -> None:
    """Forty tokens, over several condensings."""
    model = build(CONFIGS["llama"]())
    patch_assignment(model, [[catalog.DENSE] * 4] * 2, keepers=[[keeper] * 2] * 2)
    ids, mask = text(120, 3), torch.ones(3, 120, dtype=torch.long)
    for row, start in enumerate((0, 37, 90)):
        mask[row, :start], ids[row, :start] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, **options)
    for row, start in enumerate((0, 37, 90)):
        alone = model.generate(ids[row : row + 1, start:], **options)
        assert torch.equal(found[row, 120:], alone[0, 120 - start :])


METHODS = ["window", "block_topk", "vertical_slash", "loki", "window+centroid_t"]


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_beside_others_gives_what_it_gives_alone(name: str) -> None:
    """Methods of every kind, aligned to each row's own beginning; padding on either side."""
    model = build(CONFIGS["llama"]())
    shape = catalog.AttentionShape(1, 4, 2, 400, 400, 16)
    method: Approximation = next(a for a in catalog.choices(shape) if a.name == name)
    gram = torch.eye(16).expand(4, 16, 16)
    noise = Moments(torch.zeros(4, 16), gram, torch.zeros(2, 16), gram[:2])
    patch_assignment(model, [[method] * 4] * 2, dict.fromkeys(range(2), catalog.fit(noise)))
    ids, mask = text(400, 3), torch.ones(3, 400, dtype=torch.long)
    mask[1, :137], mask[2, 290:] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)  # loki's directions are not those of other places
    found = logits(model, ids, attention_mask=mask, position_ids=places)
    for row in range(3):
        own = mask[row].bool()
        alone = logits(model, ids[row : row + 1, own])
        error = (found[row, own] - alone[0]).abs().max()
        assert error <= 1e-4 * alone.abs().max()
