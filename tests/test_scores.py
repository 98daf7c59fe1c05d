"""Scores are the formula, on the blocks asked for; captured tensors survive their files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.attention import moments
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors.window import Window
from attnplan.profiles.capture.capture import LayerCapture, SequenceCapture
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.search.scores import Observed, sampled_blocks, score_layer

DENSE = catalog.DENSE
SHAPE = AttentionShape(1, 4, 2, 400, 400, 16)
ONE_EACH = list({a.name: a for a in catalog.choices(SHAPE)}.values())
ALL_BLOCKS = torch.arange(7)


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def observed(queries: int = 400, *, gradient: bool = True, projection: bool = True) -> Observed:
    query, key = randn(1, 4, queries, 16, seed=0) + 0.5, randn(1, 2, queries, 16, seed=1) + 0.5
    value = randn(1, 2, queries, 16, seed=2)
    return Observed(
        Inputs.of_layer(query, key, value, scale=0.25, fitted=catalog.fit(moments(query, key))),
        randn(1, 4, queries, 16, seed=3) if gradient else None,
        torch.tensor([1.0, 2.0, 0.5, 3.0]) if projection else None,
    )


def output(approximation: Approximation, inputs: Inputs) -> Tensor:
    """The whole output by the oracle, float64 [heads, queries, value_dim]."""
    tiles, slots = approximation.tiles(inputs, torch.arange(inputs.blocks))
    found, log_mass = reference_prefill.attend(
        inputs.query.double(),
        inputs.key.double(),
        inputs.value.double(),
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles,
        slots=slots,
    )
    part = approximation.part(inputs, torch.arange(inputs.blocks))
    if part is not None:
        part.merge(found, log_mass)
    return found[0]


def offered(candidates: list[Approximation]) -> np.ndarray:
    return np.ones((4, len(candidates)), bool)


@pytest.mark.parametrize("blocks", [ALL_BLOCKS, torch.tensor([0, 3, 6])], ids=["all", "some"])
def test_scores_are_the_formula(blocks: Tensor) -> None:
    seen = observed()
    scores = score_layer(seen, ONE_EACH, offered(ONE_EACH), blocks)
    rows = torch.cat([torch.arange(400)[b * BLOCK : (b + 1) * BLOCK] for b in blocks])
    assert scores.positions == len(rows)
    assert seen.gradient is not None
    gradient = seen.gradient[0].double()
    exact = output(DENSE, seen.inputs)
    for c, candidate in enumerate(ONE_EACH):
        change = output(candidate, seen.inputs) - exact
        fisher = (gradient * change).sum(-1).square()[:, rows].mean(-1)
        error = change[:, rows].norm(dim=(1, 2)) / exact[:, rows].norm(dim=(1, 2))
        np.testing.assert_allclose(scores.fisher[:, c], fisher, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(scores.relative_error[:, c], error, rtol=1e-4, atol=1e-12)
        # the first segment of vertical_slash is dense
        assert fisher.min() > 0 or candidate.is_dense or candidate.name == "vertical_slash"


def test_without_a_gradient_the_change_is_weighed_by_the_projection() -> None:
    seen, window = observed(gradient=False), Approximation(Window(32))
    scores = score_layer(seen, [window], offered([window]), ALL_BLOCKS)
    change = output(window, seen.inputs) - output(DENSE, seen.inputs)
    assert seen.projection is not None
    expected = seen.projection.double().square() * change.square().sum(-1).mean(-1)
    np.testing.assert_allclose(scores.fisher[:, 0], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="needs a gradient, or the norm of the output projection"):
        nothing = observed(gradient=False, projection=False)
        score_layer(nothing, [window], offered([window]), ALL_BLOCKS)


def test_keeping_everything_loses_nothing() -> None:
    kept = [DENSE, Approximation(Window(400)), Approximation(Window(4096, 0))]
    scores = score_layer(observed(), kept, offered(kept), ALL_BLOCKS)
    assert not scores.fisher[:, 0].any() and not scores.relative_error[:, 0].any()
    assert scores.relative_error.max() < 1e-6  # rounding of float32 sums
    assert scores.fisher.max() < 1e-11


def test_an_output_that_is_no_number_loses_everything() -> None:
    """It can be stored, and no solver takes it."""
    seen = observed()
    seen.inputs.value[0, 1, 30] = float("inf")  # of heads 2 and 3
    scores = score_layer(seen, ONE_EACH, offered(ONE_EACH), ALL_BLOCKS)
    broken = np.isinf(scores.fisher).all(1)
    others = [c for c, candidate in enumerate(ONE_EACH) if not candidate.is_dense]
    assert np.isfinite(scores.fisher[:2]).all() and not broken[:2].any()
    assert (scores.fisher[2:, others] == np.inf).all()
    assert (scores.relative_error[2:, others] == np.inf).all()


def test_only_what_is_offered_is_scored() -> None:
    candidates = [DENSE, Approximation(Window(32)), Approximation(Window(64))]
    some = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 1]], bool)
    scores = score_layer(observed(), candidates, some, ALL_BLOCKS)
    everything = score_layer(observed(), candidates, offered(candidates), ALL_BLOCKS)
    for found, whole in zip(
        (scores.fisher, scores.relative_error),
        (everything.fisher, everything.relative_error),
        strict=True,
    ):
        assert np.array_equal(np.isnan(found), ~some)
        np.testing.assert_allclose(found[some], whole[some], rtol=1e-5)


def test_scores_do_not_depend_on_who_else_is_scored() -> None:
    pair = [Approximation(Window(32)), Approximation(Window(64))]
    together = score_layer(observed(), pair, offered(pair), ALL_BLOCKS)
    for c, candidate in enumerate(pair):
        single = score_layer(observed(), [candidate], offered([candidate]), ALL_BLOCKS)
        assert np.array_equal(single.fisher[:, 0], together.fisher[:, c])


def test_a_text_shorter_than_a_block_is_scored_on_its_positions() -> None:
    window = Approximation(Window(8))
    scores = score_layer(observed(40), [window], offered([window]), torch.arange(1))
    assert scores.positions == 40
    assert (scores.fisher > 0).all()


@pytest.mark.parametrize(("queries", "count"), [(2048, 12), (8192, 12), (1000, 7), (130, 2)])
def test_sampled_blocks_are_spread_over_the_text(queries: int, count: int) -> None:
    blocks = sampled_blocks(queries, count, seed=3)
    assert torch.equal(blocks, sampled_blocks(queries, count, seed=3))
    total = -(-queries // BLOCK)
    edges = np.linspace(0, total, count + 1)
    assert (blocks.diff() > 0).all()
    assert 0 <= int(blocks[0]) and int(blocks[-1]) < total
    for low, high in pairwise(edges):
        inside = (blocks >= int(low)) & (blocks <= int(np.ceil(high)))
        assert bool(inside.any()), f"no block between {low} and {high}"
    several = {tuple(sampled_blocks(queries, count, seed).tolist()) for seed in range(20)}
    assert len(several) > 1


def test_few_blocks_are_all_sampled() -> None:
    assert sampled_blocks(300, 12, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert sampled_blocks(320, 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert sampled_blocks(1, 12, seed=0).tolist() == [0]


def captured(*, gradient: bool = True) -> SequenceCapture:
    layers = []
    for number in range(2):
        tensors = {
            name: randn(1, heads, 50, 16, seed=10 * number + i)
            for i, (name, heads) in enumerate(
                {"query": 4, "key": 2, "value": 2, "output": 4, "gradient": 4}.items()
            )
        }
        if not gradient:
            del tensors["gradient"]
        projection = torch.rand(4) if number else None
        layers.append(
            LayerCapture(
                number, f"layer{number}", scale=0.1 + number / 3, projection=projection, **tensors
            )
        )
    return SequenceCapture(torch.arange(50), None, tuple(layers))


@pytest.mark.parametrize("gradient", [True, False])
def test_captured_tensors_survive_their_files(tmp_path: Path, gradient: bool) -> None:
    files, kept = CaptureFiles(tmp_path / "run"), captured(gradient=gradient)
    assert not files.has(0)
    files.save(0, kept)
    assert files.has(0) and not files.has(1)
    found = list(files.layers(0))
    assert [layer.layer for layer in found] == [0, 1]
    for mine, theirs in zip(kept.layers, found, strict=True):
        assert theirs.scale == mine.scale
        for name in ("query", "key", "value", "gradient"):
            expected, actual = getattr(mine, name), getattr(theirs, name)
            assert (actual is None) == (expected is None)
            if expected is not None:
                assert torch.equal(actual, expected.bfloat16())
        assert (theirs.projection is None) == (mine.projection is None)
        if mine.projection is not None:
            assert torch.equal(theirs.projection, mine.projection)


def test_captured_files_are_whole_or_absent_and_can_be_discarded(tmp_path: Path) -> None:
    files = CaptureFiles(tmp_path / "run")
    files.discard()  # nothing there yet
    for text in range(2):
        files.save(text, captured())
    files.save(1, captured(gradient=False))  # the last to come stays
    assert [layer.gradient for layer in files.layers(1)] == [None, None]
    assert sorted(path.name for path in files.folder.iterdir()) == [
        "0.safetensors",
        "1.safetensors",
    ]
    files.discard()
    assert not files.folder.exists()
    assert not files.has(0)
