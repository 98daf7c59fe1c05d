"""The settings that every method offers, and what they cost: a league compares at equal cost."""

from __future__ import annotations

import pytest

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.layer.layer_attention import can_prepare
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.window import Window
from attnplan.search.candidates import candidates

HEADS = {
    "grouped": (9, 3, 64),
    "wide": (32, 8, 128),
    "ungrouped": (8, 8, 64),
}
ONE_SETTING = {"dense", "off"}
"""Methods without a knob."""


def offered(
    keys: int, heads: tuple[int, int, int]
) -> tuple[AttentionShape, dict[str, list[float]]]:
    """Densities of what a search is offered, by method; a far field behind its windows alone."""
    shape = AttentionShape(1, *heads[:2], keys, keys, heads[2])
    found: dict[str, list[float]] = {}
    for approximation in candidates(shape):
        if approximation.far is None:
            found.setdefault(approximation.near.name, []).append(approximation.density(shape))
        elif approximation.near.name == "window":
            found.setdefault(approximation.far.name, []).append(approximation.density(shape))
    return shape, found


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("keys", [2048, 4096, 8192])
def test_every_method_reaches_every_cost(keys: int, heads: tuple[int, int, int]) -> None:
    _, found = offered(keys, heads)
    assert found.keys() == {*catalog.NEAR, *catalog.FAR}
    for name, densities in found.items():
        if name not in ONE_SETTING:
            assert len(densities) >= 3, name
            assert min(densities) <= 0.12, (name, min(densities))
            assert max(d for d in densities if d <= 0.25) >= 0.07, (name, densities)


@pytest.mark.parametrize("keys", [4096, 8192])
def test_no_row_of_a_league_is_empty(keys: int) -> None:
    """Pairs of methods too have a setting within the density that methods are compared at."""
    shape = AttentionShape(1, 9, 3, keys, keys, 64)
    least: dict[str, float] = {}
    for a in candidates(shape):
        least[a.name] = min(a.density(shape), least.get(a.name, 1.0))
    assert {name for name, density in least.items() if density > 0.25} == {"dense"}


@pytest.mark.parametrize("keys", [2048, 4096, 8192, 32768])
def test_searches_stay_short(keys: int) -> None:
    """Every candidate is scored on every head that it could suit."""
    assert len(candidates(AttentionShape(1, 9, 3, keys, keys, 64))) <= 235


def test_short_texts_are_offered_fewer() -> None:
    counts = [
        len(candidates(AttentionShape(1, 9, 3, keys, keys, 64))) for keys in (128, 512, 1024, 4096)
    ]
    assert counts == sorted(counts) and counts[0] <= 8


def test_a_plan_of_before_reads_and_names_the_same() -> None:
    """Knobs that came later are spelled where they change something."""
    old = {
        "near": {"name": "heavy_hitters", "top": 64, "window": 64, "segment": 128, "sinks": 4}
        | {"observers": 64}
    }
    approximation = catalog.from_dict(old)
    assert catalog.to_dict(approximation) == old
    assert catalog.key(approximation) == (
        "heavy_hitters(top=64, window=64, segment=128, sinks=4, observers=64)"
    )
    new = catalog.from_dict({"near": {**old["near"], "accumulate": 1, "observers": 16}})
    assert catalog.key(new).endswith("observers=16, accumulate=1)")
    assert catalog.from_dict(catalog.to_dict(new)) == new != approximation


def test_fitted_data_that_a_setting_does_not_read_is_not_asked_for() -> None:
    """Plans of before have no directions beside their routing and their landmarks."""
    for name in ("routing", "smyrf"):
        narrow, whole = (
            catalog.from_dict({"near": {"name": name, "top": 16, "rank": rank}}).near
            for rank in (8, 0)
        )
        assert "balanced.directions" in catalog.needed_names(16, narrow)
        assert "balanced.directions" not in catalog.needed_names(16, whole)
    for name in ("wildcat", "nystrom", "skyformer"):
        narrow, whole = (catalog.FAR[name](rank=rank) for rank in (8, 0))  # type: ignore[call-arg]
        assert "balanced.directions" in catalog.needed_names(16, narrow)
        assert "balanced.directions" not in catalog.needed_names(16, whole)
    linformer = Approximation(Window(128), catalog.FAR["linformer"]())  # type: ignore[call-arg]
    assert linformer.far is not None
    names = catalog.needed_names(16, linformer.far)
    assert {n for n in names if n.startswith("linformer.")} == {"linformer.projections_16"}


def test_parts_of_the_sink_block_are_not_prepared_as_whole_ones() -> None:
    """Prepared layers share their masks between settings."""
    few, whole = (
        catalog.from_dict({"near": {"name": "quest", "top": 2, "sink_keys": keys}})
        for keys in (4, 64)
    )
    assert can_prepare([whole]) and not can_prepare([whole, few])
