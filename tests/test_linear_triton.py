"""Sums of features by kernels are those of the torch code, in the interpreter or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.attention import moments
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.compressors._feature_map import FeatureMap, exponents_of
from attnplan.kernels.compressors.csalr import CSALR
from attnplan.kernels.compressors.performer import Performer
from attnplan.kernels.compressors.taylor import Taylor
from attnplan.kernels.engines.gpu import feature_sums
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.partial_softmax import Part

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""What rounding may cost an output, of values around 1."""
LOGARITHMS = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 2e-4}
"""What rounding may cost the logarithm of a mass."""

MAPS = {
    "performer": Performer(64, 24),
    "performer-100": Performer(100, 40, seed=3),
    "performer-many": Performer(64, 150),
    "csalr": CSALR(64, 20, 2),
    "csalr-150": CSALR(64, 150, 1),
}
CALLS = {
    "prefill": {},
    "continued": {"queries": 70, "keys": 333},
    "one-query": {"queries": 1, "keys": 300},
    "padded": {"queries": 200, "batch": 2, "start": (0, 97)},
    "odd-dims": {"queries": 150, "dims": (24, 40)},
    "several-heads-of-one": {"queries": 130, "heads": (6, 1)},
}


def text(
    queries: int = 300,
    keys: int | None = None,
    *,
    batch: int = 1,
    start: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Queries and keys that have means, and what is fitted to such."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64)

    (query_heads, kv_heads), (head_dim, value_dim) = heads, dims
    tokens = queries if keys is None else keys
    query = randn(query_heads, queries, head_dim) + 0.4
    key, value = randn(kv_heads, tokens, head_dim) + 0.6, randn(kv_heads, tokens, value_dim)
    fitted = catalog.fit(
        moments(randn(query_heads, 500, head_dim) + 0.4, randn(kv_heads, 500, head_dim) + 0.6)
    )
    tensors = (t.to(DEVICE, dtype) for t in (query, key, value))
    return Inputs.of_layer(*tensors, scale=head_dim**-0.5, start=start, fitted=fitted)


def exactly(inputs: Inputs) -> Inputs:
    """The same numbers, in float64 on the CPU."""
    tensors = {name: getattr(inputs, name).cpu().double() for name in ("query", "key", "value")}
    return dataclasses.replace(inputs, **tensors)


def call(
    far: FeatureMap, inputs: Inputs, blocks: Tensor, sinks: int = 4, window: int = 32
) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
    """Blocks, floors and sinks of all heads, and the most chunks before a floor."""
    heads = len(inputs.head)
    floor = far.floor(inputs, blocks, window)[:, None].expand(-1, heads, -1)
    return blocks, floor, (sinks,) * heads, int(far.chunks_before(inputs, floor).max())


def by_kernels(
    far: FeatureMap,
    inputs: Inputs,
    blocks: Tensor,
    floor: Tensor,
    sinks: tuple[int, ...],
    chunks: int,
) -> Part | None:
    """The part, on whatever device."""
    exponents = exponents_of(far, inputs)
    return feature_sums.part(exponents, far.chunk, inputs, blocks, floor, sinks, chunks)


def both(
    far: FeatureMap, inputs: Inputs, sinks: int = 4, window: int = 32, blocks: Tensor | None = None
) -> tuple[Part, Part]:
    """The part by kernels, and by the torch code in float64 on the same numbers."""
    blocks = torch.arange(inputs.blocks) if blocks is None else blocks
    exact = far.part(exactly(inputs), *call(far, inputs, blocks, sinks, window))
    found = by_kernels(far, inputs, *call(far, inputs, blocks.to(DEVICE), sinks, window))
    assert exact is not None and found is not None
    return found, exact


def check(found: Part, exact: Part, dtype: torch.dtype) -> None:
    """Same rows are usable, with the same masses and means."""
    assert found.head == exact.head
    assert found.numerator.shape == exact.numerator.shape
    assert {t.dtype for t in (found.numerator, found.mass, found.shift)} == {torch.float32}
    usable = exact.usable
    assert torch.equal(found.usable.cpu(), usable)
    numerator, mass, shift = (t.cpu().double() for t in (found.numerator, found.mass, found.shift))
    assert bool((numerator[~usable] == 0).all()) and bool((mass[~usable] == 0).all())
    log_mass, expected = mass.log() + shift, exact.mass.log() + exact.shift
    torch.testing.assert_close(
        log_mass[usable], expected[usable], rtol=1e-6, atol=LOGARITHMS[dtype]
    )
    mean, expected = numerator / mass[..., None], exact.numerator / exact.mass[..., None]
    torch.testing.assert_close(mean[usable], expected[usable], rtol=0, atol=2 * DTYPES[dtype])


TWO = pytest.mark.parametrize("far", [MAPS["performer"], MAPS["csalr"]], ids=["squares", "sums"])


@pytest.mark.parametrize("name", CALLS)
@TWO
def test_parts_are_those_of_the_torch_code(far: FeatureMap, name: str) -> None:
    check(*both(far, text(**CALLS[name])), torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_every_dtype_and_number_of_features(far: FeatureMap, dtype: torch.dtype) -> None:
    check(*both(far, text(260, heads=(2, 1), dims=(32, 16), dtype=dtype)), dtype)


@TWO
def test_logarithms_describe_the_features(far: FeatureMap) -> None:
    inputs = exactly(text(20))
    rows = torch.randn(1, 4, 7, 16, generator=torch.Generator().manual_seed(0)).double()
    for side in ("query", "key"):
        expected = far.lift(rows, side, inputs)  # type: ignore[arg-type]
        found = far.logarithms(inputs).lift(rows, side)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="features of taylor have no logarithms"):
        Taylor().logarithms(inputs)


@TWO
@pytest.mark.parametrize("sinks", [0, 100])
def test_sinks_are_in_no_state(far: FeatureMap, sinks: int) -> None:
    """With 100 sinks the first chunk is empty. Whatever the sinks hold, nothing of it shows."""
    inputs = text(250)
    before, exact = both(far, inputs, sinks)
    check(before, exact, torch.float32)
    inputs.key[:, :, :sinks], inputs.value[:, :, :sinks] = 1e15, float("nan")
    after, _ = both(far, inputs, sinks)
    for name in ("numerator", "mass", "shift"):
        assert torch.equal(getattr(before, name), getattr(after, name))


@TWO
def test_some_blocks_and_some_heads(far: FeatureMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads one at a time change nothing, and blocks may be named in any order."""
    inputs = text(270)
    whole, _ = both(far, inputs)
    monkeypatch.setattr(feature_sums, "NUMBERS", 1)
    found, exact = both(far, inputs, blocks=torch.tensor([3, 1, 2]))
    check(found, exact, torch.float32)
    rows = torch.cat([torch.arange(64) + 64 * block for block in (3, 1, 2)]).to(DEVICE)
    for name in ("numerator", "mass", "shift"):
        assert torch.equal(getattr(found, name), getattr(whole, name)[:, :, rows])
    check(*both(far, inputs.heads((3, 0))), torch.float32)


@TWO
def test_inputs_may_lie_in_memory_in_any_way(far: FeatureMap) -> None:
    inputs = text(200)
    query = inputs.query.transpose(1, 2).contiguous().transpose(1, 2)  # tokens before heads
    key = inputs.key.mT.contiguous().mT
    value = torch.cat([inputs.value, inputs.value], -1)[..., 1:17]
    check(*both(far, dataclasses.replace(inputs, query=query)), torch.float32)
    check(*both(far, dataclasses.replace(inputs, key=key, value=value)), torch.float32)


@TWO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hazards_give_finite_convex_means(far: FeatureMap, dtype: torch.dtype) -> None:
    """A key of huge norm, equal keys, and far queries."""
    inputs = text(260, dtype=dtype)
    inputs.key[:, :, 0] *= 1000
    inputs.key[:, :, 70] *= 60
    inputs.key[:, :, 80:120] = inputs.key[:, :, 80:81].clone()
    inputs.query[:, :, 200:210] *= 30
    found, exact = both(far, inputs, sinks=0)
    assert torch.equal(found.usable.cpu(), exact.usable)
    mean = (found.numerator / found.mass[..., None])[found.usable]
    assert float(mean.abs().max()) <= 1.01 * float(inputs.value.float().abs().max())


@TWO
def test_features_neither_over_nor_underflow(far: FeatureMap) -> None:
    """Scores of hundreds, far beyond what float32 can hold as e^s."""
    inputs = text(260)
    inputs = dataclasses.replace(inputs, query=inputs.query * 60, key=inputs.key * 20)
    found, exact = both(far, inputs)
    seen = exact.usable
    assert torch.equal(found.usable.cpu(), seen)
    log_mass, expected = ((p.mass.log() + p.shift).cpu().double()[seen] for p in (found, exact))
    assert float(expected.abs().max()) > 200
    assert float((log_mass - expected).abs().max()) < 1e-5 * float(exact.shift[seen].abs().max())


def test_without_a_chunk_there_is_no_part() -> None:
    far, first = MAPS["performer"], torch.arange(1, device=DEVICE)
    inputs = text(60)
    assert by_kernels(far, inputs, *call(far, inputs, first)) is None
    inputs = text(64)  # a chunk that nobody reads yet
    assert by_kernels(far, inputs, *call(far, inputs, first)) is None
    found = by_kernels(far, inputs, *call(far, inputs, first)[:3], 1)
    assert found is not None and not bool(found.usable.any())
    assert float(found.numerator.abs().max()) == 0


def test_what_depends_on_fitted_data_alone_is_made_once() -> None:
    inputs, other, far = text(100), text(100, seed=1), MAPS["performer"]
    made = exponents_of(far, inputs)
    assert exponents_of(Performer(64, 24), inputs) is made
    assert exponents_of(far, inputs.heads((1,))) is not made
    assert exponents_of(far, other) is not made


def test_bad_input_is_refused() -> None:
    inputs, far = text(200), MAPS["performer"]
    blocks = torch.arange(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"computed in .* got torch.float64"):
        by_kernels(far, exactly(inputs), *call(far, inputs, blocks))
    mixed = dataclasses.replace(inputs, value=inputs.value.half())
    with pytest.raises(ValueError, match="must share a dtype"):
        by_kernels(far, mixed, *call(far, inputs, blocks))
    bare = dataclasses.replace(inputs, fitted={})
    with pytest.raises(ValueError, match=r"no fitted data 'balanced\.directions'"):
        by_kernels(far, bare, *call(far, inputs, blocks))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@TWO
def test_a_gpu_takes_the_kernels_and_waits_for_nothing(far: FeatureMap) -> None:
    inputs = text(300, dtype=torch.float16)
    blocks = torch.arange(inputs.blocks, device=DEVICE)
    far.part(inputs, *call(far, inputs, blocks))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = far.part(inputs, *call(far, inputs, blocks))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = far.part(exactly(inputs), *call(far, inputs, blocks.cpu()))
    assert found is not None and exact is not None
    check(found, exact, torch.float16)
