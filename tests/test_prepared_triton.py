"""A prepared layer computes what the layer's tile lists say, and chooses the same blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnplan.kernels import catalog, prepared
from attnplan.kernels.approximation import Approximation, Inputs
from attnplan.kernels.block_pattern import BlockGrid, pooled_keys, pooled_queries
from attnplan.kernels.engines import reference, select_triton
from attnplan.kernels.layer import LayerKernel, can_prepare
from attnplan.kernels.near.antidiagonal import Antidiagonal
from attnplan.kernels.near.block_topk import BlockTopK
from attnplan.kernels.near.off import Off
from attnplan.kernels.near.quest import Quest
from attnplan.kernels.near.strided import Strided
from attnplan.kernels.near.window import Window
from attnplan.kernels.token_selection import best

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

MIXED = (
    catalog.DENSE,
    Approximation(BlockTopK(2, 1)),
    Approximation(Window(100, 4)),
    Approximation(BlockTopK(1, 2)),
    Approximation(Quest(2, 1)),
    Approximation(Window(64, 64)),
)
CALLS = [
    pytest.param(6, 3, 400, 400, (0,), id="gqa-ragged"),
    pytest.param(6, 6, 384, 384, (0, 128), id="padding-of-whole-blocks"),
    pytest.param(6, 2, 330, 330, (75, 0), id="padding"),
    pytest.param(6, 3, 130, 500, (0,), id="chunked-prefill"),
    pytest.param(6, 3, 64, 448, (0,), id="one-block"),
    pytest.param(6, 3, 1, 450, (0,), id="one-query"),
    pytest.param(6, 3, 1, 1, (0,), id="length-1"),
]


def call(heads: int, kv_heads: int, queries: int, keys: int, start: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    tensors = (torch.randn(len(start), *size, 32, generator=generator).to(DEVICE) for size in sizes)
    return Inputs.of_layer(*tensors, scale=32**-0.5, start=start)


def expected(assignment: tuple[Approximation, ...], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What the reference engine gives for the layer's tile lists."""
    blocks = torch.arange(inputs.blocks, device=DEVICE)
    tiles, _ = LayerKernel(assignment).tiles(inputs, blocks)
    return reference.attend(
        inputs.query,
        inputs.key,
        inputs.value,
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles,
    )


@pytest.mark.parametrize(("heads", "kv_heads", "queries", "keys", "start"), CALLS)
def test_a_prepared_layer_computes_what_its_tile_lists_say(
    heads: int, kv_heads: int, queries: int, keys: int, start: tuple[int, ...]
) -> None:
    inputs = call(heads, kv_heads, queries, keys, start)
    output, log_mass = prepared.PreparedLayer(MIXED, inputs)(inputs)
    wanted, wanted_mass = expected(MIXED, inputs)
    torch.testing.assert_close(output, wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(log_mass, wanted_mass, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "assignment",
    [
        (catalog.DENSE,) * 2,
        (Approximation(Off()), Approximation(Strided(64, 4, 256))),
        (Approximation(Antidiagonal(2, 1)), Approximation(Antidiagonal(1, 2, 8))),
        (Approximation(BlockTopK(0, 1)), Approximation(BlockTopK(50, 3))),
    ],
    ids=["dense", "static", "antidiagonal", "none-and-all"],
)
def test_other_layers(assignment: tuple[Approximation, ...]) -> None:
    inputs = call(2, 1, 320, 320, (0,))
    output, _ = prepared.PreparedLayer(assignment, inputs)(inputs)
    torch.testing.assert_close(output, expected(assignment, inputs)[0], atol=2e-6, rtol=1e-5)


def test_a_prepared_layer_serves_every_call_of_its_shape() -> None:
    first, second = (call(6, 3, 400, 400, (0,)) for _ in range(2))
    second.query.mul_(-1)
    layer = prepared.PreparedLayer(MIXED, first)
    for inputs in (first, second, first):
        wanted = expected(MIXED, inputs)[0]
        torch.testing.assert_close(layer(inputs)[0], wanted, atol=2e-6, rtol=1e-5)


def test_which_layers_can_be_prepared() -> None:
    shape = call(1, 1, 512, 512, (0,)).shape
    far = next(a for a in catalog.choices(shape) if a.far is not None)
    other = next(a for a in catalog.choices(shape) if a.near.name == "vertical_slash")
    assert can_prepare(MIXED)
    assert not can_prepare((*MIXED, far))
    assert not can_prepare((*MIXED, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [(0, 0), (70, 5)], ids=str)
def test_block_means_leave_padding_out(start: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 200, 48, generator=generator).to(DEVICE, dtype)
    key = torch.randn(2, 2, 200, 48, generator=generator).to(DEVICE, dtype)
    inputs = Inputs.of_layer(query, key, key, scale=1.0, start=start)
    starts = select_triton.integers(start, DEVICE)
    heads = select_triton.integers((3, 1), DEVICE)
    blocks = torch.arange(4, device=DEVICE)
    close = {"atol": 1e-5, "rtol": 1e-5}
    made = select_triton.block_means(query, heads, starts, 0)
    torch.testing.assert_close(made, pooled_queries(inputs, blocks)[:, [3, 1]], **close)
    transposed = key.transpose(1, 2).contiguous().transpose(1, 2)
    made = select_triton.block_means(transposed, heads % 2, starts, 0)
    torch.testing.assert_close(made, pooled_keys(inputs)[:, [1, 1]], **close)


def test_equal_scores_go_to_the_earlier_block_and_signs_of_zero_do_not_count() -> None:
    inputs = call(1, 1, 12 * 64, 12 * 64, (0,))
    scores = torch.zeros(1, 1, 12, 12, device=DEVICE)
    scores[..., 5] = -0.0
    scores[..., 7] = 1.0
    scores[..., 3] = -1.0
    scores[..., 2] = -1e38
    selector = BlockTopK(4, 2)
    rows, place = prepared.scored_rows((selector,), inputs)
    out = torch.full((rows.chosen,), -1, dtype=torch.int32, device=DEVICE)
    ints = select_triton.integers
    select_triton.choose_blocks(
        scores,
        out,
        place=place.to(DEVICE),
        top=ints((4,), DEVICE),
        local=ints((2,), DEVICE),
        start=ints((0,), DEVICE),
        offset=0,
    )
    grid = BlockGrid.of(inputs, torch.arange(12, device=DEVICE))
    chosen = best(scores, grid.candidates(2), 4) | grid.always(2)
    chosen &= grid.key_block < grid.first
    wanted = [row.nonzero()[:, 0].tolist() for row in chosen[0, 0]]
    first = place[0, 0].tolist()
    assert [out[a : a + len(w)].tolist() for a, w in zip(first, wanted, strict=True)] == wanted
    assert len(out) == sum(map(len, wanted))
