"""Far fields that open their best clusters: Multipole Attention, and weighted clusters too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.attention import all_blocks, dense, run, text
from tests.test_single_keys import CALLS, by_slots, estimate
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.compressors import _open_clusters as open_clusters
from attnplan.kernels.compressors._clustered_chunks import ClusterCompressor
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.compressors.multipole import Multipole
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.native import build
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors._single_keys import row_floor
from attnplan.kernels.selectors._static_pattern import causal
from attnplan.kernels.selectors.window import Window

FAR: list[ClusterCompressor] = [
    Multipole(64, 8, opened=24),
    Multipole(128, 70, opened=9),
    CentroidT(64, 3, opened=64),
    CentroidT(128, 8, opened=40),
]


def opened(pair: Approximation, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Row by row: the keys of the heaviest clusters, and those before the floor but sinks."""
    far, near = pair.far, pair.near
    assert isinstance(far, ClusterCompressor) and isinstance(near, Window)
    end = far.floor(inputs, all_blocks(inputs), near.window)
    chunks = int(far.chunks_before(inputs, end[:, None]).max())
    plain = dataclasses.replace(far, opened=0)
    slots = plain.compress(inputs, chunks, (near.sinks,) * len(inputs.head), members=True)
    assert slots is not None
    batch, heads, queries, _ = inputs.query.shape
    j = torch.arange(inputs.key.shape[2])
    start = torch.tensor(inputs.start)[:, None, None, None]
    floor = row_floor(inputs, all_blocks(inputs), end)[:, :queries]
    rest = (j >= start + near.sinks) & (j < floor[:, None, :, None]) & causal(inputs)
    chosen = torch.zeros(batch, heads, queries, len(j), dtype=torch.bool)
    logits = inputs.query @ slots.key.mT * inputs.scale
    mass = logits + (slots.log_weight + slots.weight.log())[:, :, None]
    for b in range(batch):
        for h in range(heads):
            members = slots.member[b, h]
            for i in range(queries):
                count = max(int(floor[b, i]) - inputs.start[b], 0) // far.chunk * far.slots
                left = far.opened
                for c in mass[b, h, i, :count].argsort(descending=True).tolist():
                    own = members == c
                    left -= int(own.sum())
                    if left < 0:
                        break
                    chosen[b, h, i] |= own
    return chosen & rest, rest


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("far", FAR, ids=str)
def test_the_best_clusters_are_read_key_by_key(far: ClusterCompressor, name: str) -> None:
    inputs, pair = CALLS[name], Approximation(Window(16), far)
    chosen, rest = opened(pair, inputs)
    plain = dataclasses.replace(far, opened=0)
    near = causal(inputs) & (chosen | ~rest)
    expected = estimate(near, rest, by_slots(plain, inputs, 4, 16), inputs)
    torch.testing.assert_close(run(pair, inputs), expected, rtol=0, atol=1e-9)
    tiles, _ = pair.tiles(inputs, all_blocks(inputs))
    counts = tiles.counts(inputs.query.shape[2], inputs.key.shape[2])
    assert torch.equal(counts, near.long())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("far", [Multipole(64, 8, opened=500), CentroidT(128, 70, opened=500)])
def test_all_clusters_open_are_dense_attention(far: ClusterCompressor, name: str) -> None:
    pair = Approximation(Window(16), far)
    torch.testing.assert_close(run(pair, CALLS[name]), dense(CALLS[name]), rtol=0, atol=1e-10)


def test_none_open_is_the_far_field_alone() -> None:
    """A budget that no cluster fits in."""
    inputs = CALLS["padded"]
    tight = Approximation(Window(16), CentroidT(64, 1, opened=63))
    plain = Approximation(Window(16), CentroidT(64, 1))
    sinks = Approximation(Window(16, sinks=0), CentroidT(64, 1, opened=63))
    assert not torch.equal(run(tight, inputs), run(plain, inputs))  # the first chunk has 60 keys
    plain = dataclasses.replace(plain, near=Window(16, sinks=0))
    torch.testing.assert_close(run(sinks, inputs), run(plain, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("far", FAR, ids=str)
def test_more_keys_lose_less(far: ClusterCompressor) -> None:
    inputs, exact = text(600), dense(text(600))
    errors = []
    for most in (0, 32, 128, 600):
        pair = Approximation(Window(16), dataclasses.replace(far, opened=most))
        errors.append(float((run(pair, inputs) - exact).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9 * errors[0]


@pytest.mark.parametrize("far", FAR, ids=str)
def test_cost_counts_the_pairs_from_above(far: ClusterCompressor) -> None:
    inputs, pair = text(1000), Approximation(Window(16), far)
    tiles, _ = pair.tiles(inputs, all_blocks(inputs))
    pairs = tiles.pairs(1000).double().mean().item()
    predicted = pair.cost(inputs.shape).attention / (2 * 16)
    assert pair.cost_is_bound and 0.6 * predicted <= pairs <= predicted
    plain = Approximation(Window(16), dataclasses.replace(far, opened=0))
    assert pair.cost(inputs.shape).selection > plain.cost(inputs.shape).selection


def test_they_are_offered_in_longer_texts_and_spelled() -> None:
    shape = AttentionShape(1, 9, 3, 2048, 2048, 64)
    found = [a for a in catalog.choices(shape) if a.far is not None and a.far.opens]
    assert {a.far.name for a in found if a.far is not None} == {"centroid_t", "multipole"}
    assert all(catalog.from_dict(catalog.to_dict(a)) == a for a in found)
    assert any(a.density(shape) <= 0.25 for a in found if a.name == "window+multipole")


def test_a_plan_that_opens_none_is_spelled_as_before() -> None:
    pair = Approximation(Window(128), CentroidT(256, 16))
    assert catalog.key(pair) == "window(window=128, sinks=4) + centroid_t(chunk=256, slots=16)"
    assert catalog.to_dict(pair)["far"] == {"name": "centroid_t", "chunk": 256, "slots": 16}
    pair = Approximation(Window(128), CentroidT(256, 16, opened=64))
    assert catalog.key(pair).endswith("centroid_t(chunk=256, slots=16, opened=64)")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"opened": -1}, "opened must not be negative"), ({"opened": 8, "levels": 2}, "levels 1")],
)
def test_bad_settings_are_refused(knobs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Multipole(64, 8, **knobs)


@pytest.mark.parametrize("far", FAR, ids=str)
def test_the_compiled_choice_is_that_of_torch(far: ClusterCompressor) -> None:
    library = build.load().library
    if library is None:
        pytest.skip("needs a C++ compiler")
    wide = CALLS["padded"]
    names = ("query", "key", "value")
    inputs = dataclasses.replace(wide, **{n: getattr(wide, n).float() for n in names})
    floor = far.floor(inputs, inputs.all_blocks, 16)[:, None].expand(-1, 4, -1)
    chunks = far.chunks_before(inputs, floor)
    slots = far.compress(inputs, int(chunks.max()), (4,) * 4, members=True)
    assert slots is not None
    call = (inputs.rows(inputs.all_blocks), slots, far.words(chunks), far.opened, inputs.scale)
    read, keys = open_clusters.opened_torch(*call)
    found, found_keys = open_clusters._opened_compiled(library, *call)
    same = (found == read).all(-1)  # scores that agree to rounding may swap places
    assert float(same.float().mean()) > 0.999 and bool((keys >= 0).any())
    assert torch.equal(found_keys.sort(-1).values[same], keys.sort(-1).values[same])
