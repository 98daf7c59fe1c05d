"""A memory budget: what kv heads keep is scored, solved and measured as it will run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny_model

from attnplan.costs.decode import decode_costs, time_keepers
from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.cache_policies.pages import Pages
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.cache_policy import SLACK, Keeper
from attnplan.kernels.kv_cache.layer_cache import capacity, row_bytes
from attnplan.models.load import LoadedModel, load_model
from attnplan.pipeline.score_policies import candidates_for, score_layer
from attnplan.pipeline.search_cache import remember
from attnplan.profiles.capture.capture import capture
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import load_sequences
from attnplan.profiling.profiling import Workload, capture_files, run_key
from attnplan.quality.continuation import Continuation, continued, decode_ms, held_bytes, peak_bytes
from attnplan.quality.prefill import Reference, original
from attnplan.runtime.patch import patch_assignment, unpatch
from attnplan.search.budget import Budget, BudgetError, parse_memory

CONTEXT = 256


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("remembering")
    tiny_model.save(folder)
    return load_model(str(folder))


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(32, 127, (CONTEXT,), generator=torch.Generator().manual_seed(0))


@contextmanager
def keeping(loaded: LoadedModel, kept: list[list[Keeper]]) -> Iterator[None]:
    patch_assignment(loaded.model, [[catalog.DENSE] * 4] * 2, keepers=kept)
    try:
        yield
    finally:
        unpatch(loaded.model)


def test_keeping_everything_loses_nothing(loaded: LoadedModel, text: torch.Tensor) -> None:
    """The continuation, its bytes, and the scores."""
    full = [[cache_catalog.FULL] * 2] * 2
    found = Continuation(Reference(loaded.model, text[None]))
    assert found.kl(lambda: keeping(loaded, full), 0) == pytest.approx(0, abs=1e-6)
    before, after = held_bytes(loaded.model, lambda: keeping(loaded, full), text, 70)
    each = 2 * 2 * row_bytes(cache_catalog.FULL, 16, 16, 4)
    assert before == capacity(cache_catalog.FULL, CONTEXT) * each
    assert capacity(cache_catalog.FULL, CONTEXT + 70) * each >= after >= (CONTEXT + 70) * each


def test_fewer_rows_are_fewer_bytes_at_the_peak_too(
    loaded: LoadedModel, text: torch.Tensor
) -> None:
    """And timing a token gives two positive numbers."""
    kept = [[Recent(32)] * 2] * 2
    some = held_bytes(loaded.model, lambda: keeping(loaded, kept), text, 40)
    dense = held_bytes(loaded.model, original, text, 40)
    assert max(a / b for a, b in zip(some, dense, strict=True)) < 0.4
    assert peak_bytes(loaded.model, original, text) > dense[0]
    assert min(decode_ms(loaded.model, lambda: keeping(loaded, kept), text, steps=4)) > 0


def test_scores_predict_what_a_kv_head_costs(loaded: LoadedModel, text: torch.Tensor) -> None:
    """To the order of magnitude, on the text that they are taken of."""
    captured = capture(loaded.model, text, seed=0)
    narrow = Recent(32)
    scores = np.stack(
        [score_layer(layer, (cache_catalog.FULL, narrow), {})[:, 1] for layer in captured.layers]
    )
    assert (scores > 0).all()
    reference = Continuation(Reference(loaded.model, text[None]))
    measured = np.zeros_like(scores)
    for layer, head in np.ndindex(*scores.shape):
        kept: list[list[Keeper]] = [[cache_catalog.FULL] * 2 for _ in range(2)]
        kept[layer][head] = narrow
        measured[layer, head] = reference.kl(lambda kept=kept: keeping(loaded, kept), 0)  # type: ignore[misc]
    assert 0.1 < scores.sum() / measured.sum() < 10


def test_a_continuation_is_whole_condensings() -> None:
    """At most half of the text."""
    assert [continued(n) for n in (8, 100, 256, 512, 4096)] == [1, 32, 128, 256, 256]
    assert continued(4096) % SLACK == 0


def test_candidates_use_the_whole_limit() -> None:
    """For every kind of keeper one is as large as the budget lets it be."""

    def share(keeper: Keeper) -> float:
        return capacity(keeper, 4096) / 4096

    found = candidates_for(4096, 0.4, share)
    assert found[0] == cache_catalog.FULL
    largest = {
        k.name: max(share(k) for k in found if k.name == k0.name and share(k) <= 0.4)
        for k0 in found[1:]
        for k in [k0]
    }
    assert set(largest) == {"recent", "observed", "clusters"}
    assert all(0.399 < value <= 0.4 for value in largest.values())


def test_a_search_keeps_its_budget_and_is_read_back(loaded: LoadedModel, tmp_path: Path) -> None:
    """Bytes are counted from storage; what cannot be met says what could."""
    sets = [
        load_sequences(loaded.tokenizer, "builtin", context=CONTEXT, sequences=2, split=split)
        for split in ("calibration", "holdout")
    ]
    work, url = Workload(sets[0], seed=0), f"sqlite:///{tmp_path}/store.db"
    files = capture_files(run_key(loaded, work), tmp_path / "captures")
    with Store(url) as store:

        def search(limit: str) -> object:
            budget = Budget(max_memory=parse_memory(limit))
            return remember(loaded, work, sets[1], store, url, files, budget, trials=2)

        found = search("0.75x")
        again = search("0.75x")
        assert found.best.share <= 0.75  # type: ignore[attr-defined]
        assert not found.misses  # type: ignore[attr-defined]
        assert again.best.kept == found.best.kept  # type: ignore[attr-defined]
        assert found.uniform is not None  # type: ignore[attr-defined]
        with pytest.raises(BudgetError, match=r"no plan stores 0\.1x of the KV cache"):
            search("0.1x")


def test_the_cost_of_a_token_is_fitted_to_timings(loaded: LoadedModel, tmp_path: Path) -> None:
    """Timings of layers of one keeper, held against layers of several; kept in the store."""
    tokens = load_sequences(
        loaded.tokenizer, "builtin", context=CONTEXT, sequences=1, split="calibration"
    )
    work = Workload(tokens, seed=0)
    candidates = (cache_catalog.FULL, Recent(32), Pages(4, 64))
    with Store(f"sqlite:///{tmp_path}/store.db") as store:
        fit = decode_costs(loaded, work, store, {}, candidates, steps=8)
        again = decode_costs(loaded, work, store, {}, candidates, steps=8)
        rows = [(keeper,) * 2 for keeper in candidates]
        full, recent, pages = time_keepers(loaded, work, store, {}, rows, steps=8)
    assert fit.model.dense_layer_ms > 0 and fit.model.rest_ms >= 0
    assert np.array_equal(fit.model.head_ms, again.model.head_ms)
    assert min(full.median_ms, recent.mean_ms, pages.q25_ms, full.dense_mean_ms) > 0
    assert recent.share < 1 < full.share < pages.share
    assert full.layers == 2 and full.steps == 8
    assert recent.kept == "2 x recent(window=32, sinks=4)"
