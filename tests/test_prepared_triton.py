"""A prepared layer computes what the layer's tile lists say, and chooses the same blocks."""

from __future__ import annotations

import traceback
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.attention import chosen_pairs, moments, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan.kernels import catalog
from attnplan.kernels.compressors._chunk_slots import ChunkCompressor
from attnplan.kernels.compressors.multipole import Multipole
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.gpu import merge_partial, top_blocks
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer import prepared
from attnplan.kernels.layer.layer_attention import LayerKernel, can_prepare, rounded
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.selectors._scored_blocks import (
    ASKING,
    BlockGrid,
    followed,
    pooled_keys,
    pooled_queries,
)
from attnplan.kernels.selectors._top_tokens import best
from attnplan.kernels.selectors.antidiagonal import Antidiagonal
from attnplan.kernels.selectors.block_topk import BlockTopK
from attnplan.kernels.selectors.off import Off
from attnplan.kernels.selectors.quest import Quest
from attnplan.kernels.selectors.strided import Strided
from attnplan.kernels.selectors.window import Window

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

MIXED = (
    catalog.DENSE,
    Approximation(BlockTopK(2, 1)),
    Approximation(Window(100, 4)),
    Approximation(BlockTopK(1, 2)),
    Approximation(Quest(2, 1)),
    Approximation(Window(64, 64)),
)
FAR = {
    name: Approximation(Window(32), small(cls) if issubclass(cls, ChunkCompressor) else cls(64))
    for name, cls in catalog.FAR.items()
} | {"multipole": Approximation(Window(32), Multipole(64, 8, levels=2))}
"""One pair for every compressor."""
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
    tensors = [torch.randn(len(start), *size, 32, generator=generator) for size in sizes]
    tensors[:2] = tensors[0] * 1.2 + 0.4, tensors[1] + 0.6
    tensors = [t.to(DEVICE) for t in tensors]
    fitted = fit(heads, kv_heads)
    return Inputs.of_layer(*tensors, scale=32**-0.5, start=start, fitted=fitted)


@cache
def fit(heads: int, kv_heads: int) -> dict[str, Tensor]:
    """What the catalog fits to the queries and keys of `call`."""
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(1, heads, 300, 32, generator=generator) * 1.2 + 0.4
    key = torch.randn(1, kv_heads, 300, 32, generator=generator) + 0.6
    return {name: t.to(DEVICE) for name, t in catalog.fit(moments(query, key)).items()}


def expected(assignment: tuple[Approximation, ...], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What the reference engine gives for the layer's tile lists."""
    blocks = torch.arange(inputs.blocks, device=DEVICE)
    kernel = LayerKernel(assignment, inputs.fitted)
    tiles, slots = kernel.tiles(inputs, blocks)
    output, log_mass = reference_prefill.attend(
        inputs.query,
        inputs.key,
        inputs.value,
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles,
        slots=slots,
    )
    part = kernel.part(inputs, blocks)
    return (output, log_mass) if part is None else part.merge(output, log_mass)


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


def test_a_prepared_layer_reads_no_later_row() -> None:
    """Within a block of 64 too."""
    at = 220
    assignment = (
        *(Approximation(BlockTopK(1, 1)), Approximation(Quest(1, 1))),
        *(Approximation(Antidiagonal(1, 1)), Approximation(Window(20, 4))),
        *(FAR["centroid_t"], FAR["performer"]),
    )
    inputs = call(6, 3, 240, 240, (5,))
    layer = prepared.PreparedLayer(assignment, inputs)
    before = layer(inputs)[0][:, :, :at].clone()
    for tensor in (inputs.query, inputs.key, inputs.value):
        tensor[:, :, at:] = torch.randn(tensor[:, :, at:].shape, device=DEVICE) * 30
    torch.testing.assert_close(layer(inputs)[0][:, :, :at], before, atol=1e-6, rtol=0)


GROWING = (
    *(catalog.DENSE, Approximation(Window(100, 4)), Approximation(BlockTopK(2, 1))),
    *(FAR["centroid_t"], FAR["performer"], Approximation(Strided(64, 4, 256))),
)


@pytest.mark.parametrize("tokens", [1, 64, 65, 300, 449, 512])
def test_a_shorter_text_reads_the_first_of_what_a_longer_one_reads(tokens: int) -> None:
    longer = prepared.PreparedLayer(GROWING, call(6, 3, 512, 512, (0,)))
    inputs = call(6, 3, tokens, tokens, (0,))
    first = longer.first(inputs.blocks)
    wanted, wanted_mass = expected(GROWING, inputs)
    output, log_mass = first(inputs)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(log_mass, wanted_mass, atol=1e-5, rtol=1e-5)
    length = first._work[:, 2] - first._work[:, 1] + first._work[:, 6] - first._work[:, 3]
    assert bool((length.diff() <= 0).all()), "longest first"
    assert first.schedule.index is longer.schedule.index
    if inputs.blocks < 8:
        with pytest.raises(ValueError, match=f"prepared for {inputs.blocks} blocks"):
            first.first(8)


def test_prompts_share_what_is_made_for_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnplan.kernels.layer.layer_attention.is_gpu", lambda device: True)
    made: list[int] = []
    init = prepared.PreparedLayer.__init__

    def counted(self: Any, assignment: Any, inputs: Inputs) -> None:
        made.append(inputs.blocks)
        init(self, assignment, inputs)

    monkeypatch.setattr(prepared.PreparedLayer, "__init__", counted)
    assignment = (catalog.DENSE, Approximation(Window(100, 4)), Approximation(BlockTopK(2, 1)))

    def run(kernel: LayerKernel, tokens: int, start: tuple[int, ...] = (0,)) -> None:
        inputs = call(3, 3, tokens, tokens, start)
        tensors = inputs.query, inputs.key, inputs.value
        output = kernel(*tensors, scale=inputs.scale, start=start)
        wanted = expected(kernel.assignment, inputs)[0]
        torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-5)

    kernel = LayerKernel(assignment)
    for tokens in (300, 128, 500, 33, 300):
        run(kernel, tokens)
    assert made == [16], "of 1,024 tokens"
    run(kernel, 100, (30,))  # padding moves what rows read
    assert made == [16, 2]
    made.clear()
    nested = LayerKernel((FAR["multipole"], *assignment[:2]), call(3, 3, 1, 1, (0,)).fitted)
    for tokens in (200, 300):
        inputs = call(3, 3, tokens, tokens, (0,))
        nested(inputs.query, inputs.key, inputs.value, scale=inputs.scale)
    assert made == [4, 5], "slots of groups come after those of all chunks"


@pytest.mark.parametrize(
    ("blocks", "more"), [(1, 16), (17, 32), (128, 128), (129, 144), (520, 576)]
)
def test_lengths_are_rounded_by_an_eighth(blocks: int, more: int) -> None:
    assert rounded(blocks) == more


def test_which_layers_can_be_prepared() -> None:
    shape = call(1, 1, 512, 512, (0,)).shape
    other = next(a for a in catalog.choices(shape) if a.near.name == "vertical_slash")
    assert can_prepare(MIXED)
    assert can_prepare((*MIXED, *FAR.values()))
    assert not can_prepare((*MIXED, other))
    assert not can_prepare((*MIXED, chosen_pairs()[0]))  # it chooses which slots are read


def test_a_selector_that_chooses_how_much_it_reads_is_refused() -> None:
    loki = catalog.from_dict({"near": {"name": "loki", "top": 8, "rank": 8}})
    with pytest.raises(ValueError, match="loki does not say how many tiles it reads beforehand"):
        prepared.PreparedLayer([loki], call(1, 1, 128, 128, (0,)))


@pytest.mark.parametrize("name", FAR)
def test_far_fields_are_prepared_for(name: str) -> None:
    near, wide = Approximation(Window(40)), Approximation(Window(100, 70), FAR[name].far)
    check((FAR[name], near, wide), call(3, 1, 200, 300, (70, 0)))


def check(assignment: tuple[Approximation, ...], inputs: Inputs) -> None:
    output, log_mass = prepared.PreparedLayer(assignment, inputs)(inputs)
    wanted, wanted_mass = expected(assignment, inputs)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(log_mass, wanted_mass, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "queries", "keys", "start"), CALLS)
def test_mixed_far_fields_at_any_shape(
    heads: int, kv_heads: int, queries: int, keys: int, start: tuple[int, ...]
) -> None:
    kinds = ("centroid_t", "multipole", "taylor", "performer")
    assignment = (*(FAR[kind] for kind in kinds), catalog.DENSE, Approximation(BlockTopK(2, 1)))
    check(assignment, call(heads, kv_heads, queries, keys, start))


@pytest.mark.parametrize("name", ["mixed", *FAR])
def test_a_prepared_layer_waits_for_nothing(name: str) -> None:
    """It asks for no number of a tensor, and makes none of numbers: both would wait for a GPU."""
    assignment = MIXED if name == "mixed" else (catalog.DENSE, FAR[name], FAR[name])
    inputs = call(len(assignment), 3, 150, 300, (0,))
    layer = prepared.PreparedLayer(assignment, inputs)
    layer(inputs)  # what is made once may wait
    with Waits() as seen:
        layer(inputs)
    assert seen.found == []


def test_a_wait_is_seen() -> None:
    inputs = call(6, 3, 400, 430, (0,))
    layer = LayerKernel(MIXED)
    with Waits() as seen:
        layer.tiles(inputs, inputs.all_blocks)
        inputs.query[:, [0, 2]]
        inputs.query[inputs.query > 100]
        torch.tensor([1])
        inputs.scale * float(inputs.query.sum())
        torch.linalg.cholesky(torch.eye(3))
    assert {name.split()[0] for name in seen.found} >= {
        "_local_scalar_dense",
        "_linalg_check_errors",
        "nonzero",
        "lift_fresh",
        "index",
    }


class Waits(TorchDispatchMode):
    """Notes operations that wait for a GPU, but for those of Triton's interpreter."""

    ALWAYS = (
        *("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "masked_select"),
        *("bincount", "linalg_cholesky", "_linalg_check_errors"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        waits = name in self.ALWAYS or "unique" in name
        if name.startswith("index") and isinstance(args[1], list | tuple):
            waits |= any(t is not None and t.dtype == torch.bool for t in args[1])
        if waits:
            stack = traceback.extract_stack()
            if not any("triton" in Path(f.filename).parts for f in stack):
                ours = [f for f in stack if {"kernels", "tests"} & set(Path(f.filename).parts)]
                self.found.append(f"{name} {ours[-2].filename}:{ours[-2].lineno}")
        return func(*args, **(kwargs or {}))


def test_heads_that_cannot_be_prepared_are_computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one layer with others, which do not wait for them."""
    monkeypatch.setattr("attnplan.kernels.layer.layer_attention.is_gpu", lambda device: True)
    slow = next(
        a for a in catalog.choices(call(1, 1, 512, 512, (0,)).shape) if a.near.name == "moba"
    )
    assignment = (catalog.DENSE, slow, FAR["centroid_t"], chosen_pairs()[0], slow, MIXED[1])
    inputs = call(6, 3, 300, 300, (0,))
    kernel = LayerKernel(assignment, inputs.fitted)
    for _ in range(2):
        output = kernel(inputs.query, inputs.key, inputs.value, scale=inputs.scale)
        wanted = expected(assignment, inputs)[0]
        torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-5)
    (ready, _), (others, _) = kernel._sides
    assert (ready, others) == ((0, 2, 5), (1, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parts_are_added_as_torch_adds_them(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    numerator, mass, shift = randn(2, 3, 128, 24), randn(2, 3, 128), 30 * randn(2, 3, 128)
    mass[0, 1] = mass[0, 1].abs()
    mass[1, 0, :40] = float("inf")
    shift[1, 1, 3:9] = float("-inf")
    numerator[1, 2, 7, 5] = float("nan")
    part = Part(numerator, mass, shift, (4, 0, 3))
    output = randn(2, 100, 5, 24).to(dtype).transpose(1, 2)
    log_mass = 30 * randn(2, 5, 100)
    log_mass[0, 0, :20] = float("-inf")
    wanted, wanted_mass = part.merge(output.clone(), log_mass.clone())
    merge_partial.merge(part, output, log_mass)
    limit = torch.finfo(dtype).eps
    torch.testing.assert_close(output, wanted, atol=limit, rtol=limit)
    torch.testing.assert_close(log_mass, wanted_mass, atol=1e-5, rtol=1e-6)
    with pytest.raises(ValueError, match=r"must be float32, got torch\.float64"):
        merge_partial.merge(Part(numerator.double(), mass, shift, (4, 0, 3)), output, log_mass)
    with pytest.raises(ValueError, match="whole rows"):
        merge_partial.merge(part, output.mT.contiguous().mT, log_mass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [(0, 0), (70, 5)], ids=str)
def test_block_means_leave_padding_out(start: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 200, 48, generator=generator).to(DEVICE, dtype)
    key = torch.randn(2, 2, 200, 48, generator=generator).to(DEVICE, dtype)
    inputs = Inputs.of_layer(query, key, key, scale=1.0, start=start)
    starts = top_blocks.integers(start, DEVICE)
    heads = top_blocks.integers((3, 1), DEVICE)
    blocks = torch.arange(4, device=DEVICE)
    close = {"atol": 1e-5, "rtol": 1e-5}
    made = top_blocks.block_means(query, heads, starts, 0, up_to=ASKING, scale=0.5)
    torch.testing.assert_close(made, pooled_queries(inputs, blocks)[:, [3, 1]] / 2, **close)
    transposed = key.transpose(1, 2).contiguous().transpose(1, 2)
    made = top_blocks.block_means(transposed, heads % 2, starts, 0)
    torch.testing.assert_close(made, pooled_keys(inputs)[:, [1, 1]], **close)


@pytest.mark.parametrize("follows", [False, True])
def test_equal_scores_go_to_the_earlier_block_and_signs_of_zero_do_not_count(
    follows: bool,
) -> None:
    inputs = call(1, 1, 12 * 64, 12 * 64, (0,))
    scores = torch.zeros(1, 1, 12, 12, device=DEVICE)
    scores[..., 5] = -0.0
    scores[..., 7] = 1.0
    scores[..., 3] = -1.0
    scores[..., 2] = -1e38
    selector = BlockTopK(4, 2)
    rows, place = prepared.scored_rows((selector,), inputs)
    out = torch.full((rows.chosen,), -1, dtype=torch.int32, device=DEVICE)
    ints = top_blocks.integers
    top_blocks.choose_blocks(
        scores,
        out,
        place=place.to(DEVICE),
        top=ints((4,), DEVICE),
        local=ints((2,), DEVICE),
        start=ints((0,), DEVICE),
        offset=0,
        follows=follows,
    )
    grid = BlockGrid.of(inputs, torch.arange(12, device=DEVICE))
    scores = followed(scores, grid) if follows else scores
    chosen = best(scores, grid.candidates(2), 4) | grid.always(2)
    chosen &= grid.key_block < grid.first
    wanted = [row.nonzero()[:, 0].tolist() for row in chosen[0, 0]]
    first = place[0, 0].tolist()
    assert [out[a : a + len(w)].tolist() for a, w in zip(first, wanted, strict=True)] == wanted
    assert len(out) == sum(map(len, wanted))
