"""Far fields of slots that are fitted, filtered or nested: what each of them promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from tests.attention import all_blocks, error, moments, pair, run, text
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.compressors.attention_matching import match_mass
from attnplan.kernels.compressors.linformer import Linformer, project
from attnplan.kernels.compressors.skyformer import newton_schulz
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.numerics import query_draws
from attnplan.kernels.numerics.gaussian import gaussian
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape

NESTED = pair("multipole", chunk=64, slots=8, levels=2)
FLAT = pair("multipole", chunk=64, slots=8)


def test_drawn_queries_have_the_moments_of_the_head() -> None:
    inputs = text(4000)
    found = moments(inputs.query, inputs.key)
    drawn = query_draws.draw(found, 20000)
    torch.testing.assert_close(drawn.mean(1), found.query_mean, rtol=0, atol=1e-9)
    gram = drawn.mT @ drawn / drawn.shape[1]
    assert float((gram - found.query_gram).norm() / found.query_gram.norm()) < 0.05
    torch.testing.assert_close(query_draws.draw(found, 8), query_draws.draw(found, 8))


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_masses_are_matched_as_well_as_by_an_active_set_solver(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 64, 128, generator=generator, dtype=torch.float64) * spread
    share = logits.softmax(-1)
    for columns in (share[..., :4], share[..., :16]):
        found = match_mass(columns, 1e9)
        for c, weight in zip(columns.numpy(), found.numpy(), strict=True):
            assert (weight >= 0).all()
            _, least = nnls(c, np.ones(64))
            assert np.linalg.norm(c @ weight - 1) <= 1.01 * least


def test_two_levels_are_exact_for_few_distinct_keys() -> None:
    inputs = text(700)
    key = inputs.key.clone()
    key[:, :, 4:] = inputs.key[:, :, torch.arange(696) % 3]
    assert error(NESTED, dataclasses.replace(inputs, key=key)) < 1e-6


def test_two_levels_read_fewer_slots_and_lose_a_little_more() -> None:
    inputs = text(1200)
    pairs = [a.tiles(inputs, all_blocks(inputs))[0].pairs(1200).sum() for a in (FLAT, NESTED)]
    assert pairs[1] < pairs[0]
    dropped = error(catalog.from_dict({"near": {"name": "window", "window": 32}}), inputs)
    assert error(FLAT, inputs) < error(NESTED, inputs) < 0.7 * dropped


def test_the_second_level_keeps_the_masses_of_a_group() -> None:
    inputs = text(700)
    _, slots = NESTED.tiles(inputs, all_blocks(inputs))
    _, fine = FLAT.tiles(inputs, all_blocks(inputs))
    assert slots is not None and fine is not None
    count = fine.key.shape[2]
    assert torch.equal(slots.key[:, :, :count], fine.key)
    assert slots.key.shape[2] == count + 64  # slots of one group, padded to a tile
    for name in ("weight", "value"):
        below, above = getattr(fine, name)[:, :, :32], getattr(slots, name)[:, :, count : count + 8]
        torch.testing.assert_close(above.sum(2), below.sum(2))
    centre = (fine.key * fine.weight[..., None])[:, :, :32].sum(2)
    coarse = (slots.key * slots.weight[..., None])[:, :, count : count + 8].sum(2)
    torch.testing.assert_close(coarse, centre)


@pytest.mark.parametrize("queries", [70, 1200], ids=["continued", "prefill"])
def test_two_levels_cost_what_they_compute(queries: int) -> None:
    inputs = text(1200)
    inputs = dataclasses.replace(inputs, query=inputs.query[:, :, -queries:])
    pairs = NESTED.tiles(inputs, all_blocks(inputs))[0].pairs(queries).double().mean().item()
    cost = NESTED.cost(inputs.shape)
    assert pairs == pytest.approx(cost.attention / (2 * 16), rel=1e-9)
    assert cost.selection > FLAT.cost(inputs.shape).selection


def test_two_levels_read_nothing_of_the_future_nor_of_batch_mates() -> None:
    inputs = text(1200)
    before = run(NESTED, inputs)
    other = text(1200, seed=5)
    mixed = dataclasses.replace(
        inputs,
        **{
            name: torch.cat(
                [getattr(inputs, name)[:, :, :1000], getattr(other, name)[:, :, 1000:]], 2
            )
            for name in ("query", "key", "value")
        },
    )
    torch.testing.assert_close(
        run(NESTED, mixed)[:, :, :960], before[:, :, :960], rtol=0, atol=1e-9
    )
    both = dataclasses.replace(
        inputs,
        **{
            name: torch.cat([getattr(inputs, name), getattr(other, name)])
            for name in ("query", "key", "value")
        },
        start=(0, 128),
    )
    output = run(NESTED, both)
    torch.testing.assert_close(output[:1], before, rtol=0, atol=1e-9)
    alone = dataclasses.replace(
        other, **{name: getattr(other, name)[:, :, 128:] for name in ("query", "key", "value")}
    )
    torch.testing.assert_close(output[1:, :, 128:], run(NESTED, alone), rtol=0, atol=1e-9)


def test_engine_and_layer_agree_on_two_levels() -> None:
    """Heads with other windows share the slots of one compressor; tiles begin within a tile."""
    inputs = text(1200, dtype=torch.float32)
    wide = pair("multipole", 200, chunk=64, slots=8, levels=2)
    kernel = LayerKernel((NESTED, wide, FLAT, NESTED), inputs.fitted)
    output = kernel(inputs.query, inputs.key, inputs.value, scale=inputs.scale)
    for head, approximation in enumerate(kernel.assignment):
        alone = run(approximation, inputs.heads((head,)))
        torch.testing.assert_close(output[:, head], alone[:, 0], rtol=0, atol=1e-5)


def test_two_levels_are_offered_for_long_texts() -> None:
    def levels(keys: int) -> list[int]:
        shape = AttentionShape(1, 4, 2, keys, keys, 16)
        return [choice.levels for choice in catalog.FAR["multipole"].choices(shape)]

    assert levels(2048) == [1] and levels(4096) == [1, 2]
    assert catalog.from_dict(catalog.to_dict(NESTED)) == NESTED


def normalised(x: Tensor, ridge: float) -> Tensor:
    """D^-1/2 (g(x, x) + ridge I) D^-1/2."""
    kernel = gaussian(x, x) + ridge * torch.eye(x.shape[-2], dtype=x.dtype)
    root = kernel.sum(-1, keepdim=True).rsqrt()
    return kernel * root * root.mT


def test_newton_schulz_inverts_a_well_conditioned_kernel() -> None:
    x = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = normalised(x, 0.1)
    torch.testing.assert_close(
        newton_schulz(matrix, 6), torch.linalg.inv(matrix), rtol=0, atol=1e-6
    )


def test_six_newton_schulz_steps_are_a_spectral_filter() -> None:
    """Small eigenvalues x of matrix @ result follow x = 1 - (3 (1 - x)^3 + (1 - x)^4) / 4."""
    expected = torch.logspace(-8, 0, 9, dtype=torch.float64)
    basis = torch.linalg.qr(
        torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    matrix = basis * expected @ basis.mT
    found = (basis.mT @ matrix @ newton_schulz(matrix, 6) @ basis).diagonal()
    for _ in range(6):
        expected = 1 - (3 * (1 - expected) ** 3 + (1 - expected) ** 4) / 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert found[0] < 1e-4 and found[-1] > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_newton_schulz_stays_finite_on_an_ill_conditioned_kernel(dtype: torch.dtype) -> None:
    """All landmarks nearly the same, without a ridge."""
    x = 1e-3 * torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(normalised(x, 0.0).to(dtype), 6)
    assert bool(found.isfinite().all()) and float(found.float().abs().amax()) < 1.1 * 3.25**6


def test_all_keys_as_landmarks_are_exact_where_they_lie_apart() -> None:
    inputs = text(700)
    inputs = dataclasses.replace(inputs, scale=4.0)
    exact = pair("skyformer", chunk=64, slots=64, drawn=0, ridge=12)
    assert error(exact, inputs) < 1e-6
    assert error(dataclasses.replace(exact, far=None), inputs) > 0.1


def test_drawn_landmarks_lie_where_the_queries_are() -> None:
    """In balanced coordinates, as keys, the draws have the covariance of the queries."""
    inputs = text(4000)
    fitted = catalog.FAR["skyformer"].fit(moments(inputs.query, inputs.key))
    draws = fitted["skyformer.draws"].double() @ fitted["balanced.key_map"].double()
    centred = inputs.query[0] - inputs.query[0].mean(1, keepdim=True)
    queries = centred @ fitted["balanced.query_map"].double()
    ratio = draws.square().sum(-1).mean(1) / queries.square().sum(-1).mean(1)
    assert bool(((ratio > 0.7) & (ratio < 1.3)).all())


def drifting(inputs: Inputs, span: int = 24) -> Inputs:
    """The same call with keys that are moving averages, of the same mean and variance."""
    mean = inputs.key.mean(2, keepdim=True)
    total = torch.nn.functional.pad(inputs.key - mean, (0, 0, span, 0)).cumsum(2)
    return dataclasses.replace(
        inputs, key=mean + (total[:, :, span:] - total[:, :, :-span]) / span**0.5
    )


def by_position(key: Tensor) -> Tensor:
    """Gram matrices of a key tensor [1, kv_heads, tokens, head_dim] by position in chunks."""
    chunks = key.shape[2] // 128
    rows = key[0, :, : chunks * 128].unflatten(1, (chunks, 128))
    return torch.einsum("hcid,hcjd->hij", rows, rows) / chunks


def test_linformer_without_positions_is_the_mean_of_segments() -> None:
    """Exact where the keys of a segment of 8 are the same."""
    inputs = text(700)
    segment = torch.arange(700) // 8 * 8
    fitted = catalog.FAR["linformer"].fit(moments(inputs.query, inputs.key))
    # the first chunk starts with sinks: they stay near, and the rest of their segment is whole
    inputs = dataclasses.replace(inputs, key=inputs.key[:, :, segment], fitted=fitted)
    assert error(pair("linformer", slots=16), inputs) < 1e-6
    assert error(pair("linformer", slots=8), inputs) > 1e-3


def test_more_projections_lose_less_of_drifting_keys() -> None:
    inputs = drifting(text(700))
    found = moments(inputs.query, inputs.key)
    found = dataclasses.replace(found, key_position_gram=by_position(inputs.key))
    inputs = dataclasses.replace(inputs, fitted=catalog.FAR["linformer"].fit(found))
    errors = [error(pair("linformer", slots=slots), inputs) for slots in (8, 16, 32)]
    dropped = error(catalog.from_dict({"near": {"name": "window", "window": 32}}), inputs)
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.5 * dropped


def test_projections_are_stochastic_and_fit_better_with_every_step() -> None:
    gram = by_position(drifting(text(1000)).key)
    run_of = torch.arange(128) // 16
    share = torch.nn.functional.one_hot(run_of, 8).double()
    errors = []
    for steps in (0, 1, 5, 20, 80):
        mean, shares = project(gram, share.mT / 16, share, steps)
        assert bool((mean >= 0).all()) and bool((shares >= 0).all())
        for rows in (mean, shares):
            torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
        rest = torch.eye(128).double() - shares @ mean
        errors.append(float((rest @ gram @ rest.mT).diagonal(dim1=1, dim2=2).sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("knobs", [{"chunk": 64, "slots": 8}, {"chunk": 128, "slots": 9}])
def test_linformer_has_the_sizes_that_are_fitted(knobs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="as is fitted, got"):
        Linformer(**knobs)


MATCHED = {
    "centroid_t": {},
    "multipole": {},
    "wildcat": {"rank": 12},
    "nystrom": {"rank": 8},
    "skyformer": {"rank": 8},
    "linformer": {"chunk": 128},
}


@pytest.mark.parametrize("name", MATCHED)
def test_masses_that_are_matched_are_right_on_average(name: str) -> None:
    """Mean logarithm of total mass over true mass, over late rows of four heads."""
    inputs = text(900)
    knobs = {"chunk": 64, "slots": 8} | MATCHED[name]

    def bias(references: int) -> float:
        far = pair(name, **knobs, references=references)
        blocks = torch.arange(6, 14)
        found = []
        for approximation in (far, catalog.DENSE):
            tiles, slots = approximation.tiles(inputs, blocks)
            options = {"scale": inputs.scale, "kv_head": inputs.kv_head}
            rows = (inputs.rows(blocks), inputs.key, inputs.value)
            found.append(reference_prefill.attend(*rows, **options, tiles=tiles, slots=slots)[1])  # type: ignore[arg-type]
        assert bool(found[0].isfinite().all())
        return float((found[0] - found[1]).mean())

    plain, matched = bias(0), bias(16)
    # the keys of this text have no strong directions, which few pivots of wildcat live on
    limit = 0.12 if name == "wildcat" else 0.03
    assert abs(matched) <= limit and abs(matched) < abs(plain)


@pytest.mark.parametrize("name", ["centroid_t", "multipole", "wildcat"])
def test_matching_leaves_exact_slots_alone(name: str) -> None:
    inputs = text()
    assert error(pair(name, chunk=64, slots=64, references=16), inputs) < 1e-6
