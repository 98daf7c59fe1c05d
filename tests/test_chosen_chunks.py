"""Pairs of a selector that chooses key blocks with a far field of all other chunks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.attention import all_blocks, chosen_pairs, dense, run, text

from attnplan.kernels import catalog
from attnplan.kernels.compressors._chunk_slots import ChunkCompressor, chunk_tiles
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.compressors.multipole import Multipole
from attnplan.kernels.compressors.performer import Performer
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.gpu import prefill as gpu_prefill
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors._scored_blocks import BlockGrid, ScoredBlocks
from attnplan.kernels.selectors.antidiagonal import Antidiagonal
from attnplan.kernels.selectors.block_topk import BlockTopK
from attnplan.kernels.selectors.quest import Quest
from attnplan.kernels.selectors.window import Window

PAIRS = chosen_pairs()


def padded(*start: int, queries: int = 700, dtype: torch.dtype = torch.float64) -> Inputs:
    """One sequence per entry of `start`, all of 700 keys."""
    alone = [text(700, seed=seed, dtype=dtype) for seed in range(len(start))]
    query, key, value = (
        torch.cat([getattr(inputs, name) for inputs in alone]) for name in ("query", "key", "value")
    )
    query = query[:, :, -queries:]
    return dataclasses.replace(alone[0], query=query, key=key, value=value, start=start)


CALLS = {
    "prefill": padded(0),
    "continued": padded(0, queries=150),
    "padded": padded(77, 0, 130),
    "padded-continued": padded(500, 3, 699, queries=210),
}


def chosen(pair: Approximation, inputs: Inputs) -> list[list[list[tuple[int, set[int]]]]]:
    """For every row of the batch, head and query block: chunks before the floor, and those kept."""
    near, far = pair.near, pair.far
    assert isinstance(near, ScoredBlocks) and far is not None
    blocks, each = all_blocks(inputs), far.chunk // BLOCK
    scores = near.worth(inputs, blocks, BlockGrid.of(inputs, blocks))
    answer: list[list[list[tuple[int, set[int]]]]] = []
    for b, start in enumerate(inputs.start):
        answer.append([[] for _ in inputs.head])
        sink = start // BLOCK
        for h in range(len(inputs.head)):
            for row in range(inputs.blocks):
                own = (row * BLOCK + inputs.offset) // BLOCK
                before = max(own - near.local + 1 - sink, 0) // each
                best = {
                    c: float(scores[b, h, row, sink + c * each : sink + (c + 1) * each].max())
                    for c in range(1, before)
                }
                order = sorted(best, key=lambda c: (-best[c], c))
                kept = {*order[: -(-near.top // each)], *range(min(before, 1))}
                answer[b][h].append((before, kept))
    return answer


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("far", [CentroidT(64, 3), CentroidT(128, 16), CentroidT(192, 80)], ids=str)
@pytest.mark.parametrize("near", [BlockTopK(2, 2), Quest(3, 1), Antidiagonal(1, 3)], ids=str)
def test_a_key_is_near_or_in_a_chunk_that_is_read(
    near: ScoredBlocks, far: CentroidT, name: str
) -> None:
    """Exactly one of both, as the definition says, and a chunk ends before the queries begin."""
    inputs, pair = CALLS[name], Approximation(near, far)
    tiles, slots = pair.tiles(inputs, all_blocks(inputs))
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    is_near = tiles.counts(queries, keys)
    seen = reference_prefill._far(tiles, slots, inputs.query)
    count = 0 if slots is None else slots.key.shape[2]
    is_read = torch.zeros(*is_near.shape[:3], count) if seen is None else seen[1]
    for b, by_head in enumerate(chosen(pair, inputs)):
        start = inputs.start[b]
        origin = start // BLOCK * BLOCK
        for h, by_row in enumerate(by_head):
            for row, (before, kept) in enumerate(by_row):
                near_keys = torch.zeros(keys, dtype=torch.int64)
                slots_read = torch.zeros(count)
                near_keys[origin + before * far.chunk :] = 1
                for c in range(before):
                    first = origin + c * far.chunk
                    near_keys[first : first + far.chunk] = c in kept
                    slots_read[c * far.slots : (c + 1) * far.slots] = c not in kept
                    assert first + far.chunk <= row * BLOCK + inputs.offset
                    assert c in kept or first >= start
                for query in range(row * BLOCK, min((row + 1) * BLOCK, queries)):
                    expected = near_keys.clone()
                    expected[:start] = expected[query + inputs.offset + 1 :] = 0
                    assert torch.equal(is_near[b, h, query], expected)
                    assert torch.equal(is_read[b, h, query].float(), slots_read)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("pair", PAIRS, ids=catalog.key)
def test_all_blocks_are_dense_attention(pair: Approximation, name: str) -> None:
    everything = dataclasses.replace(pair, near=dataclasses.replace(pair.near, top=500))
    tiles, _ = everything.tiles(CALLS[name], all_blocks(CALLS[name]))
    assert not bool((tiles.tiles[:, 0] == 2).any())
    torch.testing.assert_close(run(everything, CALLS[name]), dense(CALLS[name]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS, ids=catalog.key)
def test_no_blocks_are_the_window_of_the_same_keys(pair: Approximation) -> None:
    """With the first chunk for its sinks."""
    assert pair.far is not None
    nothing = dataclasses.replace(pair, near=dataclasses.replace(pair.near, top=0, local=2))
    window = Approximation(Window(nothing.near.recent, sinks=pair.far.chunk), pair.far)
    for inputs in (CALLS["prefill"], padded(128, 0)):
        torch.testing.assert_close(run(nothing, inputs), run(window, inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("near", [BlockTopK(2, 2), Quest(3, 1), Antidiagonal(1, 1)], ids=str)
@pytest.mark.parametrize("chunk", [64, 128])
def test_a_slot_per_key_is_dense_attention(chunk: int, near: ScoredBlocks, name: str) -> None:
    """Nothing is lost and nothing counts twice, whatever was chosen."""
    pair = Approximation(near, Multipole(chunk, chunk))
    torch.testing.assert_close(run(pair, CALLS[name]), dense(CALLS[name]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS, ids=catalog.key)
def test_padding_is_not_summarised(pair: Approximation) -> None:
    inputs = padded(77, 300)
    key, value = inputs.key.clone(), inputs.value.clone()
    for b, start in enumerate(inputs.start):
        key[b, :, :start], value[b, :, :start] = 3.0, 1e6
    other = dataclasses.replace(inputs, key=key, value=value)
    torch.testing.assert_close(run(pair, other), run(pair, inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("queries", [1, 150, 1000])
@pytest.mark.parametrize("far", [CentroidT(64, 3), CentroidT(128, 16), CentroidT(192, 80)], ids=str)
@pytest.mark.parametrize("near", [BlockTopK(2, 2), Quest(4, 1), Antidiagonal(0, 3)], ids=str)
def test_cost_counts_the_pairs(near: ScoredBlocks, far: CentroidT, queries: int) -> None:
    inputs, pair = text(1000), Approximation(near, far)
    inputs = dataclasses.replace(inputs, query=inputs.query[:, :, -queries:])
    tiles, _ = pair.tiles(inputs, all_blocks(inputs))
    pairs = tiles.pairs(queries).double().mean().item()
    cost = pair.cost(inputs.shape)
    assert pairs == pytest.approx(cost.attention / (2 * 16), rel=1e-9)
    window = Approximation(Window(near.recent), far).cost(inputs.shape)
    assert cost.selection == pytest.approx(near.cost(inputs.shape).selection + window.selection)


def test_chosen_blocks_are_those_of_the_selector_alone() -> None:
    """With chunks of one block, the far field changes nothing about the near field."""
    for near in (BlockTopK(2, 2), Quest(3, 1), Antidiagonal(1, 3)):
        inputs = CALLS["padded"]
        tiles, _ = Approximation(near, CentroidT(64, 8)).tiles(inputs, all_blocks(inputs))
        assert torch.equal(tiles.counts(700, 700), near.keep(inputs).long())


def test_engines_and_a_mixed_layer_agree() -> None:
    """Beside a window with the same compressor, with padding, in float32."""
    inputs = padded(77, 0, dtype=torch.float32)
    far = CentroidT(64, 8)
    assignment = (
        Approximation(BlockTopK(2, 2), far),
        Approximation(Window(32), far),
        Approximation(Quest(3, 1), far),
        Approximation(BlockTopK(1, 1), Multipole(128, 8)),
    )
    kernel = LayerKernel(assignment, inputs.fitted)
    call = (inputs.query, inputs.key, inputs.value)
    output = kernel(*call, scale=inputs.scale, start=inputs.start)
    for head, approximation in enumerate(assignment):
        alone = run(approximation, inputs.heads((head,)))
        torch.testing.assert_close(output[:, head], alone[:, 0], rtol=0, atol=1e-5)
    tiles, slots = kernel.tiles(inputs, all_blocks(inputs))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert slots is not None
    moved = {f.name: getattr(slots, f.name).to(device) for f in dataclasses.fields(slots)}
    found, _ = gpu_prefill.attend(
        *(t.to(device) for t in call),
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles.to(device),
        slots=dataclasses.replace(slots, **moved),
    )
    torch.testing.assert_close(found.cpu(), output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 8, 64, 80, 130])
def test_chunk_tiles_read_the_slots_of_the_chunks(slots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    read = torch.rand(2, 3, 2, 11, generator=generator) < 0.6
    tiles = chunk_tiles(read, slots)
    seen = torch.zeros(12, 11 * slots + 2 * BLOCK, dtype=torch.bool)
    for row in range(12):
        for kind, index, mask in tiles.tiles[tiles.offsets[row] : tiles.offsets[row + 1]].tolist():
            word = torch.tensor(-1) if mask < 0 else tiles.masks[mask, 0]
            assert kind == 2 and word != 0
            seen[row, index * BLOCK : (index + 1) * BLOCK] = (word >> torch.arange(BLOCK) & 1) > 0
    assert torch.equal(seen[:, : 11 * slots], read.flatten(0, 2).repeat_interleave(slots, 1))
    assert not bool(seen[:, 11 * slots :].any())


@pytest.mark.parametrize(
    ("far", "message"),
    [
        (Performer(), "block_topk cannot be paired with performer, whose chunks"),
        (Multipole(64, 8, levels=2), "block_topk cannot be paired with multipole, whose chunks"),
        (CentroidT(100, 8), "chunk must be a multiple of 64 keys behind block_topk, got 100"),
    ],
)
def test_what_cannot_be_left_out_chunk_by_chunk_is_refused(
    far: ChunkCompressor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Approximation(BlockTopK(2, 2), far)


def test_few_pairs_are_tried() -> None:
    shape = AttentionShape(1, 9, 3, 4096, 4096, 64)
    tried = [a for a in catalog.choices(shape) if a.far is not None and a.near.keeps_chunks]
    assert 1 <= len(tried) <= 6
    assert all(a.density(shape) < 0.5 for a in tried)
