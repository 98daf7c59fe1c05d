"""Single keys beside a far field: exact where chosen, an estimate elsewhere, none twice."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention import all_blocks, dense, run, text
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.compressors import _left_out as left_out
from attnplan.kernels.compressors._chunk_slots import ChunkCompressor
from attnplan.kernels.compressors._feature_map import FeatureMap, Frame
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.compressors.multipole import Multipole
from attnplan.kernels.compressors.performer import Performer
from attnplan.kernels.compressors.sampled_columns import SampledColumns
from attnplan.kernels.compressors.wildcat import Wildcat
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.engines.cpu import prefill as cpu_prefill
from attnplan.kernels.engines.gpu import prefill as gpu_prefill
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.native import build
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK, SLOTS, TAKEN
from attnplan.kernels.selectors._single_keys import SingleKeys, row_floor
from attnplan.kernels.selectors._static_pattern import causal
from attnplan.kernels.selectors._top_tokens import distinct
from attnplan.kernels.selectors.heavy_hitters import HeavyHitters
from attnplan.kernels.selectors.leverage import Leverage
from attnplan.kernels.selectors.loki import Loki
from attnplan.kernels.selectors.lsh import LSH
from attnplan.kernels.selectors.moba import MoBA
from attnplan.kernels.selectors.routing import Routing
from attnplan.kernels.selectors.smyrf import Smyrf
from attnplan.kernels.selectors.sorted_blocks import SortedBlocks
from attnplan.kernels.selectors.two_stage import TwoStage
from attnplan.kernels.selectors.window import Window

PICKERS: list[SingleKeys] = [
    Loki(4, 9, 16),
    TwoStage(4, 4, 9, 16),
    LSH(4, 2, 6, 16),
    MoBA(1),
    Smyrf(8, 16, 64),
    SortedBlocks(8, 16, 64),
    Routing(8, 16, 64),
    HeavyHitters(8, 16, 64),
    Leverage(8, 16, 64),
]
EVERYTHING: list[SingleKeys] = [
    Loki(4, 700, 16),
    TwoStage(4, 60, 700, 16),
    LSH(1, 1, 700, 16),
    MoBA(20),
    Smyrf(700, 16, 64),
    SortedBlocks(700, 16, 64),
    Routing(700, 16, 64),
    HeavyHitters(700, 16, 64),
    Leverage(700, 16, 64),
]
PARTITIONS: list[ChunkCompressor] = [
    CentroidT(64, 1),
    CentroidT(64, 5),
    CentroidT(128, 70),
    Multipole(64, 4),
    SampledColumns(64, 6),
]
FEATURES: list[FeatureMap] = [
    cls(chunk=64)  # type: ignore[call-arg]
    for cls in catalog.FAR.values()
    if issubclass(cls, FeatureMap)
]


def padded(*start: int, queries: int = 500, seed: int = 0) -> Inputs:
    """One sequence per entry of `start`, all of 500 keys."""
    alone = [text(500, seed=seed + n) for n in range(len(start))]
    query, key, value = (
        torch.cat([getattr(inputs, name) for inputs in alone]) for name in ("query", "key", "value")
    )
    query = query[:, :, -queries:]
    return dataclasses.replace(alone[0], query=query, key=key, value=value, start=start)


CALLS = {
    "prefill": padded(0),
    "continued": padded(0, queries=150),
    "padded": padded(77, 0),
    "padded-continued": padded(300, 3, 499, queries=210),
}


def near_pairs(pair: Approximation, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What a row reads exactly, and what is before its floor and no sink, [batch, heads, i, j]."""
    assert pair.far is not None
    blocks, queries, keys = all_blocks(inputs), inputs.query.shape[2], inputs.key.shape[2]
    end = pair.far.floor(inputs, blocks, pair.near.recent)
    tokens = pair.near.chosen(inputs, blocks, end)[:, :, :queries].long()
    picked = torch.zeros(*tokens.shape[:3], keys + 1, dtype=torch.int64)
    picked.scatter_add_(3, torch.where(tokens < 0, keys, tokens), torch.ones_like(tokens))
    picked = picked[..., :keys]
    j = torch.arange(keys)
    start = torch.tensor(inputs.start)[:, None, None, None]
    floor = row_floor(inputs, blocks, end)[:, None, :queries, None]
    far = (j >= start + pair.reach[1]) & (j < floor) & causal(inputs)
    assert int(picked.max()) <= 1 and not bool((picked.bool() & ~far).any())
    return causal(inputs) & (picked.bool() | ~far), far


def estimate(near: Tensor, far: Tensor, log_weights: Tensor, inputs: Inputs) -> Tensor:
    """e^{q.k} (1, v) of every near pair, and e^{log-weight} (1, v) of every other far one."""
    heads = list(inputs.kv_head)
    exact = inputs.query @ inputs.key[:, heads].mT * inputs.scale
    logits = torch.where(near, exact, log_weights.masked_fill(~far, float("-inf")))
    weight = logits.softmax(-1).nan_to_num(0.0)  # rows of padding read nothing
    return weight @ inputs.value[:, heads]


def by_slots(far: ChunkCompressor, inputs: Inputs, sinks: int, reach: int) -> Tensor:
    """Log-weight of every key for every query as a part of its slot; checks what slots say."""
    floor = far.floor(inputs, all_blocks(inputs), reach)[:, None]
    chunks = int(far.chunks_before(inputs, floor).max())
    slots = far.compress(inputs, chunks, (sinks,) * len(inputs.head), members=True)
    assert slots is not None
    member, share = slots.member.long(), slots.share
    held = torch.where(member < 0, slots.key.shape[2], member)
    value = inputs.value[:, list(inputs.kv_head)]
    for own, summed in (
        (torch.ones_like(value[..., :1]), slots.weight[..., None]),
        (value, slots.value),
    ):
        total = torch.zeros(*summed.shape[:2], summed.shape[2] + 1, summed.shape[3]).to(summed)
        index = held[..., None].expand(own.shape)
        total.scatter_add_(2, index, torch.where(member >= 0, share, 0.0)[..., None] * own)
        for b, start in enumerate(inputs.start):  # what lies past the text is never read
            real = (inputs.key.shape[2] - start) // far.chunk * far.slots
            mine, theirs = total[b, :, :-1][:, :real], summed[b, :, :real]
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    logits = inputs.query @ slots.key.mT * inputs.scale + slots.log_weight[:, :, None]
    index = member.clamp(min=0)[:, :, None].expand(-1, -1, logits.shape[2], -1)
    log_share = torch.where(member >= 0, share, 0.0).log()
    return logits.gather(3, index) + log_share[:, :, None]


SLOTTED = [
    *((PICKERS[0], far, name) for far in PARTITIONS for name in CALLS),
    *((near, PARTITIONS[1], "padded-continued") for near in PICKERS[1:]),
    *((near, PARTITIONS[4], "prefill") for near in PICKERS[1:]),
]


@pytest.mark.parametrize(("near", "far", "name"), SLOTTED, ids=str)
def test_a_chosen_key_leaves_its_slot(near: SingleKeys, far: ChunkCompressor, name: str) -> None:
    inputs, pair = CALLS[name], Approximation(near, far)
    pairs, rest = near_pairs(pair, inputs)
    expected = estimate(pairs, rest, by_slots(far, inputs, near.sinks, near.recent), inputs)
    torch.testing.assert_close(run(pair, inputs), expected, rtol=0, atol=1e-9)


FEATURED = [
    *((LSH(4, 2, 6, 16), far, "padded-continued") for far in FEATURES),
    *((near, Performer(64), "prefill") for near in PICKERS),
]


@pytest.mark.parametrize(("near", "far", "name"), FEATURED, ids=str)
def test_a_chosen_key_leaves_the_features(near: SingleKeys, far: FeatureMap, name: str) -> None:
    """Scatterbrain, beside other maps too: where the features left tell a mass at all."""
    inputs, pair = CALLS[name], Approximation(near, far)
    pairs, rest = near_pairs(pair, inputs)
    frame, heads = Frame.of(inputs), list(inputs.kv_head)
    x, log_key = frame.keys(inputs.key[:, heads])
    y, log_query = frame.queries(inputs.query)
    f, g = far.lift(y, "query", inputs), far.lift(x, "key", inputs)
    if far.logarithmic:
        f, g = f.exp(), g.exp()
    kernel = (f @ g.mT) * (log_query[..., None] + log_key[..., 0][:, :, None]).exp()
    kernel = kernel.masked_fill(~rest | pairs, 0.0)
    exact = (inputs.query @ inputs.key[:, heads].mT * inputs.scale).exp().masked_fill(~pairs, 0.0)
    kernel = torch.where(kernel.sum(-1, keepdim=True) > 1e-9, kernel, 0.0)
    weight = exact + kernel
    expected = weight @ inputs.value[:, heads] / weight.sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(run(pair, inputs), expected, rtol=0, atol=1e-8)


WHOLE = [
    *((near, far) for near in EVERYTHING for far in (PARTITIONS[1], PARTITIONS[4], Performer(64))),
    *((EVERYTHING[0], far) for far in (*PARTITIONS, *FEATURES)),
]


@pytest.mark.parametrize(("near", "far"), WHOLE, ids=str)
def test_all_keys_chosen_are_dense_attention(near: SingleKeys, far: Compressor) -> None:
    """Keys that only the far field could tell are read by nobody."""
    for name in ("prefill", "padded-continued"):
        inputs, pair = CALLS[name], Approximation(near, far)
        pairs, _ = near_pairs(pair, inputs)
        every = bool((pairs == causal(inputs)).all())
        assert every or near.name not in ("loki", "two_stage", "lsh")
        if every:
            torch.testing.assert_close(run(pair, inputs), dense(inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("far", PARTITIONS, ids=str)
def test_a_slot_of_chosen_keys_is_not_read(far: ChunkCompressor) -> None:
    """Not even to be subtracted: nothing of it is left to rounding."""
    tiles, slots = Approximation(Loki(4, 700, 16), far).tiles(text(512), torch.arange(8))
    assert slots is not None
    assert not bool(((tiles.tiles[:, 0] == TAKEN) | (tiles.tiles[:, 0] == SLOTS)).any())


def test_drawn_columns_are_never_subtracted() -> None:
    """A drawn key is its slot: read by itself, the slot is masked away."""
    pair = Approximation(SortedBlocks(8, 16, 64), SampledColumns(64, 6))
    tiles, _ = pair.tiles(CALLS["prefill"], all_blocks(CALLS["prefill"]))
    assert not bool((tiles.tiles[:, 0] == TAKEN).any())


@pytest.mark.parametrize("near", PICKERS, ids=str)
@settings(max_examples=6, deadline=None)
@given(queries=st.integers(1, 260), past=st.sampled_from([0, 1, 63, 100]), seed=st.integers(0, 9))
def test_a_slot_per_key_is_dense_attention(
    near: SingleKeys, queries: int, past: int, seed: int
) -> None:
    inputs = text(queries + past, seed=seed)
    inputs = dataclasses.replace(inputs, query=inputs.query[:, :, past:])
    pair = Approximation(near, Multipole(64, 64))
    torch.testing.assert_close(run(pair, inputs), dense(inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "far", [CentroidT(64, 1), CentroidT(64, 5), SampledColumns(64, 6)], ids=str
)
def test_engines_agree(far: ChunkCompressor, dtype: torch.dtype, compiled: bool) -> None:
    inputs = CALLS["padded"]
    narrow = dataclasses.replace(
        inputs, **{n: getattr(inputs, n).to(dtype) for n in ("query", "key", "value")}
    )
    pair = Approximation(Loki(4, 9, 16), far)
    tiles, slots = pair.tiles(narrow, all_blocks(narrow))
    assert slots is not None
    wide = {n: getattr(narrow, n).double() for n in ("query", "key", "value")}
    names = ("key", "log_weight", "weight", "value", "share")
    exact = dataclasses.replace(slots, **{n: getattr(slots, n).double() for n in names})
    call = {"scale": inputs.scale, "kv_head": inputs.kv_head, "tiles": tiles}
    expected, expected_mass = reference_prefill.attend(**wide, **call, slots=exact)
    attend = cpu_prefill.attend if compiled else cpu_prefill.attend_torch
    found, mass = attend(narrow.query, narrow.key, narrow.value, **call, slots=slots)
    budget = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=budget)
    torch.testing.assert_close(mass.double(), expected_mass, rtol=0, atol=4 * budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_engine_subtracts_too(dtype: torch.dtype) -> None:
    """With another head that reads single keys and has no slots, on a GPU or interpreted."""
    inputs = text(200)
    names = ("query", "key", "value")
    narrow = dataclasses.replace(inputs, **{n: getattr(inputs, n).to(dtype) for n in names})
    pair = Approximation(Loki(4, 9, 16), CentroidT(64, 5))
    assignment = (pair, Approximation(Loki(4, 9)), pair, Approximation(Window(16)))
    kernel = LayerKernel(assignment, inputs.fitted)
    tiles, slots = kernel.tiles(narrow, all_blocks(narrow))
    assert slots is not None and bool((tiles.tiles[:, 0] == TAKEN).any())
    call = {"scale": inputs.scale, "kv_head": inputs.kv_head}
    floats = ("key", "log_weight", "weight", "value", "share")
    exact = dataclasses.replace(slots, **{n: getattr(slots, n).double() for n in floats})
    wide = {n: getattr(narrow, n).double() for n in names}
    expected, expected_mass = reference_prefill.attend(**wide, **call, tiles=tiles, slots=exact)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = {f.name: getattr(slots, f.name).to(device) for f in dataclasses.fields(slots)}
    found, mass = gpu_prefill.attend(
        *(getattr(narrow, n).to(device) for n in names),
        **call,
        tiles=tiles.to(device),
        slots=dataclasses.replace(slots, **moved),
    )
    budget = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=budget)
    torch.testing.assert_close(mass.cpu().double(), expected_mass, rtol=0, atol=4 * budget)


def test_heads_of_a_layer_are_as_alone() -> None:
    inputs = dataclasses.replace(
        CALLS["padded"],
        **{n: getattr(CALLS["padded"], n).float() for n in ("query", "key", "value")},
    )
    far = CentroidT(64, 4)
    for assignment in (
        (
            Approximation(Loki(4, 9, 16), far),
            Approximation(Window(32), far),
            Approximation(Loki(8, 20, 16), far),
            Approximation(Window(32), dataclasses.replace(far, opened=24)),
        ),
        (
            Approximation(LSH(4, 2, 6, 16), Performer(64)),
            Approximation(Window(16), Performer(64)),
            Approximation(SortedBlocks(8, 16, 64), SampledColumns(64, 6)),
            Approximation(MoBA(1), Multipole(64, 4)),
        ),
    ):
        kernel = LayerKernel(assignment, inputs.fitted)
        call = (inputs.query, inputs.key, inputs.value)
        output = kernel(*call, scale=inputs.scale, start=inputs.start)
        for head, approximation in enumerate(assignment):
            alone = run(approximation, inputs.heads((head,)), cpu_prefill.attend)
            torch.testing.assert_close(output[:, head], alone[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("near", PICKERS, ids=str)
@pytest.mark.parametrize("far", [CentroidT(64, 4), SampledColumns(64, 6)], ids=str)
def test_cost_counts_the_pairs(near: SingleKeys, far: ChunkCompressor) -> None:
    """From above: slots that are left out are counted, and so are keys that nobody chose."""
    inputs, pair = text(1000), Approximation(near, far)
    tiles, _ = pair.tiles(inputs, all_blocks(inputs))
    pairs = tiles.pairs(1000).double().mean().item()
    predicted = pair.cost(inputs.shape).attention / (2 * 16)
    assert pair.cost_is_bound and 0.6 * predicted <= pairs <= predicted
    assert pair.cost(inputs.shape).selection > 0


def test_the_pairs_of_the_survey_are_offered() -> None:
    shape = AttentionShape(1, 9, 3, 4096, 4096, 64)
    offered = {a.name for a in catalog.choices(shape) if a.density(shape) <= 0.25}
    scatterbrain, hyper_attention = "lsh+performer", "sorted_blocks+sampled_columns"
    assert {scatterbrain, hyper_attention, "loki+centroid_t", "two_stage+centroid_t"} <= offered


@pytest.mark.parametrize(
    "far", [Wildcat(), CentroidT(64, 4, opened=32), Multipole(64, 4, levels=2)]
)
def test_what_cannot_leave_out_single_keys_is_refused(far: Compressor) -> None:
    with pytest.raises(ValueError, match=r"loki cannot be paired with .*cannot leave out single"):
        Approximation(Loki(4, 9), far)


def test_rows_may_read_different_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 62), 1 << 62, (2, 3, 2 * BLOCK, 2), generator=generator)
    words[0, 0], words[1, 2, :BLOCK, 1] = -1, 0
    tiles = left_out.row_tiles(words)
    seen = torch.zeros(12, BLOCK, 2, dtype=torch.int64)
    for row in range(12):
        for kind, index, mask in tiles.tiles[tiles.offsets[row] : tiles.offsets[row + 1]].tolist():
            assert kind == SLOTS
            seen[row, :, index] = -1 if mask < 0 else tiles.masks[mask]
    assert torch.equal(seen.view(2, 3, 2 * BLOCK, 2), words)


def test_the_compiled_split_is_that_of_torch() -> None:
    library = build.load().library
    if library is None:
        pytest.skip("needs a C++ compiler")
    generator = torch.Generator().manual_seed(0)
    member = torch.randint(-1, 2 * BLOCK, (2, 3, 200), generator=generator)
    words = torch.randint(-(1 << 62), 1 << 62, (2, 3, 2, 2), generator=generator)
    tokens = torch.randint(-1, 200, (2, 3, 2 * BLOCK, 60), generator=generator)
    call = (2 * BLOCK, member, words, distinct(tokens).to(torch.int32))
    for mine, theirs in zip(
        left_out._split_compiled(library, *call), left_out.split_torch(*call), strict=True
    ):
        assert torch.equal(mine, theirs)
