"""Contracts that every method of the catalog keeps; a new method is tested without an edit."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention import all_blocks, chosen_pairs, dense, moments, run

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors._static_pattern import causal

LONG = AttentionShape(1, 4, 2, 1024, 1024, 16)
CHOICES = list(dict.fromkeys([*catalog.choices(LONG), *chosen_pairs()]))
NEAR = [a for a in CHOICES if a.far is None]
ONE_EACH = list({a.name: a for a in CHOICES}.values())


def call(
    approximation: Approximation,
    queries: int = 300,
    keys: int = 300,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    start: tuple[int, ...] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(n_heads: int, tokens: int) -> torch.Tensor:
        size = (batch, n_heads, tokens, head_dim)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    # keys share a component, as those of language models do
    query, key = randn(heads, queries) * 1.5 + 0.5, randn(kv_heads, keys) + 0.7
    fitted = approximation.fit(moments(query.double(), key.double()))
    return Inputs.of_layer(
        query, key, randn(kv_heads, keys), scale=head_dim**-0.5, start=start, fitted=fitted
    )


CALLS = {
    "prefill": {},
    "one-token": {"queries": 1, "keys": 1},
    "one-block": {"queries": 64, "keys": 64},
    "long": {"queries": 700, "keys": 700},
    "continued": {"queries": 70, "keys": 333},
    "padded": {"batch": 2, "start": (0, 77)},
    "padded-long": {"batch": 2, "start": (601, 3), "queries": 700, "keys": 700},
}


@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("approximation", NEAR, ids=catalog.key)
def test_tiles_are_the_definition(approximation: Approximation, sizes: dict[str, object]) -> None:
    inputs = call(approximation, **sizes)  # type: ignore[arg-type]
    tiles = approximation.near.near(inputs, all_blocks(inputs))
    counts = tiles.counts(inputs.query.shape[2], inputs.key.shape[2])
    real = causal(inputs)
    assert int(counts.max()) <= 1 and int((counts * ~real).sum()) == 0
    # scores that agree to rounding may swap places: in float32 that is one pair in 10,000 at most
    differ = (counts != approximation.near.keep(inputs)).sum()
    assert int(differ) <= (0 if approximation.static else 1e-4 * int(counts.sum()))
    assert torch.equal(tiles.pairs(inputs.query.shape[2]), counts.sum((2, 3)))


@pytest.mark.parametrize("approximation", ONE_EACH, ids=catalog.key)
def test_some_blocks_are_the_same_as_in_the_whole(approximation: Approximation) -> None:
    inputs = call(approximation, 700, 700)
    some = torch.tensor([1, 4, 10])
    output = run(approximation, inputs, blocks=some)
    padded = torch.nn.functional.pad(run(approximation, inputs), (0, 0, 0, 4))
    whole = padded.unflatten(2, (-1, BLOCK))[:, :, some].flatten(2, 3)
    torch.testing.assert_close(output[:, :, :188], whole[:, :, :188], rtol=0, atol=1e-9)


@pytest.mark.parametrize("approximation", ONE_EACH, ids=catalog.key)
def test_nothing_of_the_future_is_read(approximation: Approximation) -> None:
    inputs = call(approximation, 700, 700)
    changed = []
    for tensor in (inputs.query, inputs.key, inputs.value):
        noise = torch.randn((*tensor.shape[:2], 200, 16), dtype=tensor.dtype) * 3
        changed.append(torch.cat([tensor[:, :, :500], noise], dim=2))
    after = dataclasses.replace(inputs, query=changed[0], key=changed[1], value=changed[2])
    before = run(approximation, inputs)[:, :, :500]  # in the middle of a block of queries
    torch.testing.assert_close(run(approximation, after)[:, :, :500], before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("approximation", ONE_EACH, ids=catalog.key)
def test_batch_mates_do_not_matter(approximation: Approximation) -> None:
    inputs = call(approximation, batch=2)
    both = run(approximation, inputs)
    for row in range(2):
        alone = dataclasses.replace(
            inputs,
            query=inputs.query[row : row + 1],
            key=inputs.key[row : row + 1],
            value=inputs.value[row : row + 1],
            start=(0,),
        )
        torch.testing.assert_close(run(approximation, alone)[0], both[row], rtol=0, atol=1e-9)


@pytest.mark.parametrize("approximation", ONE_EACH, ids=catalog.key)
def test_padding_rows_are_zero_and_padding_keys_are_not_read(approximation: Approximation) -> None:
    inputs = call(approximation, 400, 400, batch=2, start=(0, 128))
    output = run(approximation, inputs)
    assert bool((output[1, :, :128] == 0).all()) and output.isfinite().all()
    garbage = inputs.value.clone()
    garbage[1, :, :128] = 1e6
    again = run(approximation, dataclasses.replace(inputs, value=garbage))
    torch.testing.assert_close(again, output, rtol=0, atol=1e-9)
    # a padding of whole blocks is the same as none
    alone = dataclasses.replace(
        inputs,
        query=inputs.query[1:, :, 128:],
        key=inputs.key[1:, :, 128:],
        value=inputs.value[1:, :, 128:],
        start=(0,),
    )
    if approximation.near.name != "vertical_slash":  # its segments count from the first row
        torch.testing.assert_close(
            run(approximation, alone)[0], output[1, :, 128:], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("approximation", CHOICES, ids=catalog.key)
def test_cost_counts_the_pairs(approximation: Approximation) -> None:
    """Exactly, or from above where the content decides."""
    inputs = call(approximation, 1024, 1024)
    shape = inputs.shape
    tiles, _ = approximation.tiles(inputs, all_blocks(inputs))
    pairs = tiles.pairs(1024).double().mean().item()
    predicted = approximation.cost(shape).attention / (2 * shape.head_dim)
    if approximation.near.cost_is_bound:
        assert 0.6 * predicted <= pairs <= 1.02 * predicted
    else:
        assert pairs == pytest.approx(predicted, rel=1e-9)
    assert approximation.density(shape) > 0 or pairs == 0


@pytest.mark.parametrize("approximation", CHOICES, ids=catalog.key)
def test_a_plan_spells_it(approximation: Approximation) -> None:
    assert catalog.from_dict(catalog.to_dict(approximation)) == approximation


def test_keys_are_distinct() -> None:
    assert len({catalog.key(a) for a in CHOICES}) == len(CHOICES)


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        (
            {"near": {"name": "slidingwindow"}},
            "unknown approximation 'slidingwindow'; known: dense",
        ),
        ({"near": {"name": "window", "widow": 3}}, "window has no knob 'widow'; known: sinks, win"),
        ({"near": {"name": "window", "window": 0}}, "window must be at least 1 key, got 0"),
        ({"near": {"name": "window", "window": 1.5}}, "window: window must be a whole number"),
        ({"near": {"name": "window"}}, "bad knobs for window"),
        ({"near": {"name": "dense"}, "fra": 1}, "unknown key 'fra'; known: near, far"),
        ({"near": {"name": "dense"}, "far": {"name": "centroid_t"}}, "cannot be paired"),
        ({"far": {}}, "needs the key 'near'"),
    ],
)
def test_a_bad_spelling_says_what_is_wrong(spelled: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        catalog.from_dict(spelled)


EVERYTHING = [
    {"near": {"name": "dense"}},
    {"near": {"name": "window", "window": 500}},
    {"near": {"name": "strided", "window": 500, "stride": 7, "span": 500}},
    {"near": {"name": "vertical_slash", "columns": 1, "diagonals": 0, "local": 8}},
    {"near": {"name": "block_topk", "top": 500}},
    {"near": {"name": "loki", "rank": 2, "top": 500}},
    {"near": {"name": "random_blocks", "window": 64, "blocks": 8}},
    {"near": {"name": "heavy_hitters", "top": 500, "window": 1, "segment": 64}},
    {"near": {"name": "leverage", "top": 500, "window": 1, "segment": 100}},
    {"near": {"name": "quest", "top": 500}},
    {"near": {"name": "moba", "top": 500}},
    {"near": {"name": "antidiagonal", "top": 500}},
    {"near": {"name": "lsh", "buckets": 1, "rounds": 2, "top": 500}},
    {"near": {"name": "smyrf", "top": 500, "window": 1, "segment": 64}},
    {"near": {"name": "sorted_blocks", "top": 500, "window": 1, "segment": 64}},
    {"near": {"name": "routing", "top": 500, "window": 1, "segment": 100}},
    {"near": {"name": "window", "window": 500}, "far": {"name": "centroid_t"}},
    {"near": {"name": "quest", "top": 500}, "far": {"name": "centroid_t", "chunk": 64}},
    {
        "near": {"name": "block_topk", "top": 1, "local": 1},
        "far": {"name": "multipole", "chunk": 64, "slots": 64},
    },
    {
        "near": {"name": "antidiagonal", "top": 0, "local": 1},
        "far": {"name": "sampled_columns", "chunk": 64, "slots": 64, "uniform": 100},
    },
    {
        "near": {"name": "window", "window": 16},
        "far": {"name": "sampled_columns", "chunk": 64, "slots": 64, "uniform": 100},
    },
    {
        "near": {"name": "window", "window": 16},
        "far": {"name": "multipole", "chunk": 64, "slots": 64},
    },
]


@pytest.mark.parametrize("spelled", EVERYTHING, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    queries=st.integers(1, 260),
    past=st.sampled_from([0, 0, 1, 63, 100]),
    group=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9),
)
def test_everything_kept_is_dense(
    spelled: dict[str, object], queries: int, past: int, group: int, seed: int
) -> None:
    approximation = catalog.from_dict(spelled)
    inputs = call(approximation, queries, queries + past, heads=2 * group, kv_heads=2, seed=seed)
    torch.testing.assert_close(run(approximation, inputs), dense(inputs), rtol=0, atol=1e-10)


def test_full_rank_selection_picks_the_true_best_keys() -> None:
    approximation = catalog.from_dict({"near": {"name": "loki", "rank": 16, "top": 9}})
    inputs = call(approximation)
    tiles = approximation.near.near(inputs, all_blocks(inputs))
    counts = tiles.counts(300, 300)
    scores = inputs.query @ inputs.key[:, list(inputs.kv_head)].mT
    i = torch.arange(300)
    eligible = (i[None, :] >= 4) & (i[None, :] <= i[:, None] - 64)
    best = scores.masked_fill(~eligible, float("-inf")).topk(9, dim=-1)
    rows = best.values.isfinite().all(-1)
    picked = torch.gather(counts, 3, best.indices).sum(-1)
    assert bool((picked[rows] == 9).all()) and int(rows.sum()) > 500


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_weighing_both_sides_beats_principal_components(rank: int) -> None:
    """The fitted maps lose less of q.k than the keys' principal components do."""
    generator = torch.Generator().manual_seed(1)
    asked = torch.where(torch.arange(16) < 8, 0.1, 1.0)  # queries ignore what keys vary most in
    query = torch.randn(1, 2, 900, 16, generator=generator) * asked
    key = torch.randn(1, 1, 900, 16, generator=generator) * torch.logspace(0, -1, 16)
    fitted = catalog.NEAR["loki"].fit(moments(query, key))
    low = query @ fitted["loki.query_map"][0, :, :rank]
    approximate = low @ (key @ fitted["loki.key_map"][0, :, :rank]).mT
    basis = torch.linalg.svd(key[0, 0], full_matrices=False).Vh[:rank].mT
    principal = query @ basis @ (key @ basis).mT
    exact = query @ key.mT
    assert (approximate - exact).norm() < 0.9 * (principal - exact).norm()


def test_coinciding_keys_are_clustered_exactly() -> None:
    approximation = catalog.from_dict(
        {
            "near": {"name": "window", "window": 64, "sinks": 4},
            "far": {"name": "centroid_t", "chunk": 64, "slots": 8},
        }
    )
    inputs = call(approximation, 500, 500)
    key, value = inputs.key.clone(), inputs.value.clone()
    prototypes = inputs.key[:, :, :3]
    key[:, :, 4:] = prototypes[:, :, torch.arange(496) % 3]
    inputs = dataclasses.replace(inputs, key=key, value=value)
    torch.testing.assert_close(run(approximation, inputs), dense(inputs), rtol=0, atol=1e-9)


def test_more_slots_lose_less() -> None:
    errors = []
    for slots in (1, 4, 16, 64):
        approximation = catalog.from_dict(
            {
                "near": {"name": "window", "window": 64, "sinks": 4},
                "far": {"name": "centroid_t", "chunk": 64, "slots": slots},
            }
        )
        inputs = call(approximation, 600, 600)
        errors.append((run(approximation, inputs) - dense(inputs)).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_missing_fitted_data_is_named() -> None:
    approximation = catalog.from_dict({"near": {"name": "loki", "rank": 8, "top": 8}})
    inputs = dataclasses.replace(call(approximation), fitted={})
    with pytest.raises(ValueError, match="no fitted data"):
        run(approximation, inputs)
