"""Far fields by features, against dense evaluations of the same kernels."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.kernel_approximation import PolynomialCountSketch
from tests.attention import all_blocks, dense, moments, run
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.compressors import _feature_map as feature_map
from attnplan.kernels.compressors._feature_map import FeatureMap, products, running_sums
from attnplan.kernels.compressors.csalr import CSALR
from attnplan.kernels.compressors.linear import Linear
from attnplan.kernels.compressors.performer import Performer
from attnplan.kernels.compressors.polysketch import PolySketch
from attnplan.kernels.compressors.taylor import Taylor
from attnplan.kernels.compressors.tensor_sketch import TensorSketch, hashes
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.cpu import prefill as cpu_prefill
from attnplan.kernels.engines.dispatch import attend
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands import partial_softmax
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors._static_pattern import causal
from attnplan.kernels.selectors.window import Window
from attnplan.search.scores import Observed, score_layer

MAPS = {
    "taylor": Taylor(64, 8),
    "polysketch": PolySketch(64, 8, 12),
    "polysketch-full": PolySketch(64, 4, 99),
    "tensor_sketch": TensorSketch(64, 512),
    "performer": Performer(64, 24),
    "csalr": CSALR(64, 20, 2),
    "linear": Linear(64),
    "tensor_sketch-narrow": TensorSketch(64, 512, rank=8),
    "performer-narrow": Performer(64, 24, rank=4),
    "csalr-narrow": CSALR(64, 20, 2, rank=4),
    "linear-narrow": Linear(64, rank=8),
}
CALLS = {
    "prefill": {},
    "continued": {"queries": 70, "keys": 333},
    "one-query": {"queries": 1, "keys": 300},
    "short": {"queries": 60, "keys": 60},
    "padded": {"batch": 2, "start": (0, 177)},
}


def text(
    queries: int = 300,
    keys: int | None = None,
    *,
    batch: int = 1,
    start: tuple[int, ...] | None = None,
    spread: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Four heads over two kv heads whose queries and keys have means, and what is fitted."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int, tokens: int) -> Tensor:
        size = (batch, heads, tokens, 16)
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tokens = queries if keys is None else keys
    query = randn(4, queries) * spread + 0.4
    key, value = randn(2, tokens) * spread + 0.6, randn(2, tokens)
    fitted = catalog.fit(moments(randn(4, 500) * spread + 0.4, randn(2, 500) * spread + 0.6))
    tensors = (t.to(dtype) for t in (query, key, value))
    return Inputs.of_layer(*tensors, scale=0.25, start=start, fitted=fitted)


def rows(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x, b and m of every query and key, [1, heads, tokens, ...], in float64."""
    heads = list(inputs.head)

    def fitted(name: str) -> Tensor:
        return inputs.fitted[f"balanced.{name}"][heads].double()

    query = inputs.query.double()
    centred = inputs.key.double()[:, list(inputs.kv_head)] - fitted("key_mean")[:, None]
    y = (query - fitted("query_mean")[:, None]) @ fitted("query_map") @ fitted("directions")
    x = centred @ fitted("key_map") @ fitted("directions")
    b = centred @ fitted("query_mean")[..., None] * inputs.scale
    m = query @ fitted("key_mean")[..., None] * inputs.scale
    return y * inputs.scale**0.5, x * inputs.scale**0.5, b[..., 0], m[..., 0]


def kernel(far: FeatureMap, inputs: Inputs, y: Tensor, x: Tensor) -> Tensor:
    """<f(y), f(x)> of all pairs, by products of features."""
    f, g = far.lift(y, "query", inputs), far.lift(x, "key", inputs)
    return f.exp() @ g.exp().mT if far.logarithmic else f @ g.mT


def oracle(approximation: Approximation, inputs: Inputs) -> Tensor:
    """Exact weights for near keys, the kernel's for far keys, over an N x N matrix in float64."""
    far, (window, sinks) = approximation.far, approximation.reach
    assert isinstance(far, FeatureMap)
    y, x, b, m = rows(inputs)
    floor = far.floor(inputs, all_blocks(inputs), window).repeat_interleave(BLOCK, 1)
    floor = floor[:, None, : inputs.query.shape[2], None]
    start = torch.tensor(inputs.start)[:, None, None, None]
    j = torch.arange(inputs.key.shape[2])
    is_far = (j >= start + sinks) & (j < floor)
    heads = list(inputs.kv_head)
    scores = inputs.query.double() @ inputs.key[:, heads].double().mT * inputs.scale
    near = causal(inputs) & ((j >= floor) | (j < start + sinks))
    top = scores.masked_fill(~near, float("-inf")).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    weight = (scores - top).exp() * near
    far_weight = kernel(far, inputs, y, x) * (b[:, :, None] + m[..., None] - top).exp() * is_far
    usable = far_weight.sum(-1, keepdim=True) > 0
    weight = weight + torch.where(usable, far_weight, 0.0)
    total = weight.sum(-1, keepdim=True)
    return weight @ inputs.value[:, heads].double() / torch.where(total == 0, 1.0, total)


@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("sinks", [0, 4, 100])
@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_the_output_is_that_of_the_kernel(
    far: FeatureMap, sinks: int, sizes: dict[str, object]
) -> None:
    """With 100 sinks the first chunk is empty."""
    inputs = text(**sizes)  # type: ignore[arg-type]
    approximation = Approximation(Window(32, sinks), far)
    output = run(approximation, inputs)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, oracle(approximation, inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_the_cpu_engine_and_a_mixed_layer_agree(far: FeatureMap) -> None:
    """Features, slots and near fields alone in one layer, in float32."""
    inputs = text(dtype=torch.float32)
    mine = Approximation(Window(32), far)
    assignment = (
        mine,
        catalog.from_dict(
            {
                "near": {"name": "window", "window": 64},
                "far": {"name": "centroid_t", "chunk": 64, "slots": 8},
            }
        ),
        Approximation(Window(16), far),
        Approximation(Window(100)),
    )
    output = LayerKernel(assignment, inputs.fitted)(
        inputs.query, inputs.key, inputs.value, scale=inputs.scale
    )
    for head, approximation in enumerate(assignment):
        exact = run(approximation, text().heads((head,)))[:, 0]
        assert (output[:, head].double() - exact).abs().max() < 2e-5
    tiles, slots = mine.tiles(inputs, all_blocks(inputs))
    alone, _ = attend(
        inputs.query,
        inputs.key,
        inputs.value,
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles,
        slots=slots,
        part=mine.part(inputs, all_blocks(inputs)),
    )
    assert (alone.double() - oracle(mine, inputs)).abs().max() < 2e-5


def test_scores_include_the_part() -> None:
    inputs = text(500, dtype=torch.float32)
    approximation = Approximation(Window(32), MAPS["taylor"])
    blocks = torch.tensor([1, 5, 7])
    scores = score_layer(
        Observed(inputs, None, torch.ones(4)), [approximation], np.ones((4, 1), bool), blocks
    )
    picked = torch.cat([torch.arange(500)[b * BLOCK : (b + 1) * BLOCK] for b in blocks])
    exact = dense(inputs)[0, :, picked]
    change = oracle(approximation, inputs)[0, :, picked] - exact
    expected = change.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    np.testing.assert_allclose(scores.relative_error[:, 0], expected, rtol=1e-3)


@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_slices_do_not_matter(far: FeatureMap, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = text(400)
    approximation = Approximation(Window(32), far)
    whole = run(approximation, inputs)
    monkeypatch.setattr(feature_map, "NUMBERS", 1)
    torch.testing.assert_close(run(approximation, inputs), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_rows_have_as_many_features_as_are_counted(far: FeatureMap) -> None:
    inputs = text(10)
    assert far.lift(torch.zeros(1, 4, 3, 16), "key", inputs).shape[-1] == far.count(16)
    shape = AttentionShape(1, 4, 2, 512, 512, 16)
    assert far.cost(shape, 32, 4).selection > 512 * far.count(16) * 17
    with pytest.raises(ValueError, match="chunk must be at least 64 keys, got 8"):
        dataclasses.replace(far, chunk=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Taylor(rank=0), "rank must be at least 1 direction, got 0"),
        (lambda: PolySketch(rank=0), "rank must be at least 1 direction, got 0"),
        (lambda: PolySketch(sketch=0), "sketch must be at least 1 feature, got 0"),
        (lambda: TensorSketch(features=0), "features must be at least 1, got 0"),
        (lambda: TensorSketch(degree=5), "degree must be 1 to 4, got 5"),
        (lambda: Performer(features=0), "features must be at least 1, got 0"),
        (lambda: CSALR(landmarks=0), "landmarks must be at least 1, got 0"),
        (lambda: CSALR(temperature=-1), "temperature must not be negative, got -1"),
        (lambda: Linear(rank=-1), "rank must not be negative, got -1"),
    ],
)
def test_bad_knobs_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_few_keys_are_not_worth_a_taylor_state() -> None:
    assert not list(Taylor.choices(AttentionShape(1, 1, 1, 900, 900, 16)))
    assert len(list(Taylor.choices(AttentionShape(1, 1, 1, 1024, 1024, 16)))) == 1


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_taylor_is_the_polynomial_of_its_directions(rank: int) -> None:
    inputs = text()
    y, x, _, _ = rows(inputs)
    score = y[..., :rank] @ x[..., :rank].mT
    expected = 1 + score + score.square() / 2
    torch.testing.assert_close(kernel(Taylor(64, rank), inputs, y, x), expected)
    assert float(expected.min()) >= 0.5 - 1e-12


def test_taylor_errs_to_the_third_order() -> None:
    errors = []
    for spread in (0.4, 0.2, 0.1):
        inputs = text(500, spread=spread)
        change = run(Approximation(Window(32), Taylor(64, 16)), inputs) - dense(inputs)
        errors.append(float(change.norm()))
    # halving both sides divides scores by 4, and what is left by about 4^3
    assert errors[0] > 30 * errors[1] > 900 * errors[2]


def test_taylor_beats_dropping_far_keys() -> None:
    inputs = text(700)
    exact = dense(inputs)
    dropped = (run(Approximation(Window(32)), inputs) - exact).norm()
    for far in (Taylor(64, 16), Performer(64, 512), CSALR(64, 64), PolySketch(64, 16, 64)):
        assert (run(Approximation(Window(32), far), inputs) - exact).norm() < 0.5 * dropped


def test_a_full_polysketch_is_the_fourth_power() -> None:
    inputs = text()
    y, x, _, _ = rows(inputs)
    expected = (1 + y[..., :4] @ x[..., :4].mT / 4) ** 4
    torch.testing.assert_close(kernel(PolySketch(64, 4, 15), inputs, y, x), expected)


def test_polysketch_is_positive_and_converges() -> None:
    inputs = text()
    y, x, _, _ = rows(inputs)
    exact = (1 + y @ x.mT / 4) ** 4
    errors = []
    for sketch in (4, 16, 64):
        found = kernel(PolySketch(64, 16, sketch), inputs, y, x)
        assert float(found.min()) >= 0
        errors.append(float((found - exact).norm()))
    assert errors[0] > 1.5 * errors[1] > 2.2 * errors[2]


def test_kernels_are_one_at_the_means() -> None:
    """At the mean query and the mean key every kernel is 1."""
    inputs = text(10)
    zero = torch.zeros(1, 4, 1, 16, dtype=torch.float64)
    for far in MAPS.values():
        found = kernel(far, inputs, zero, zero)
        torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-9)


@pytest.mark.parametrize("features", [64, 63, 2, 1])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_tensor_sketch_is_that_of_scikit_learn(degree: int, features: int) -> None:
    inputs = text(40)
    y, x, _, _ = rows(inputs)
    far = TensorSketch(64, features, degree, 7)
    buckets, signs = (h.numpy() for h in hashes(degree, 17, features, 7))
    theirs = PolynomialCountSketch(
        gamma=1 / degree, degree=degree, coef0=1, n_components=features, random_state=0
    )
    theirs.fit(y[0, 0].numpy())
    # their constant is the last column, ours the first
    theirs.indexHash_, theirs.bitHash_ = np.roll(buckets, -1, 1), np.roll(signs, -1, 1)
    expected = theirs.transform(y[0, 0].numpy()) @ theirs.transform(x[0, 0].numpy()).T
    found = kernel(far, inputs, y, x)[0, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("features", [2, 8, 128, 256])
@pytest.mark.parametrize("columns", [3, 16, 33])
def test_compiled_sketches_are_those_of_the_matrices(columns: int, features: int) -> None:
    """Scattered and transformed in float32, against products with F C in float64."""
    rows = torch.randn(2, 3, 21, columns, generator=torch.Generator().manual_seed(3)).double()
    inputs = text(10)
    far = TensorSketch(64, features, seed=5)
    expected = far.lift(rows, "key", inputs)
    wide = torch.nn.functional.pad(rows.float(), (0, 7))[..., :columns]  # rows apart in memory
    for some in (rows.float(), wide):
        found = far.lift(some, "key", inputs).double()
        assert float((found - expected).norm()) < 1e-6 * float(expected.norm())


def test_a_narrow_map_reads_the_strongest_directions_alone() -> None:
    inputs = text()
    y, x, _, _ = rows(inputs)
    for far in (TensorSketch(64, 64, rank=4), Performer(64, 8, rank=4), CSALR(64, 8, rank=4)):
        cut = [torch.cat([t[..., :4], torch.randn_like(t[..., 4:])], -1) for t in (y, x)]
        torch.testing.assert_close(kernel(far, inputs, *cut), kernel(far, inputs, y, x))


def test_some_offered_polysketch_really_sketches() -> None:
    shape = AttentionShape(1, 9, 3, 4096, 4096, 64)
    sketched = [f for f in PolySketch.choices(shape) if f.sketch < (f.rank + 1) * (f.rank + 2) // 2]
    assert len(sketched) >= 2
    assert all(far.count(64) == far.sketch * (far.sketch + 1) // 2 for far in sketched)


def test_tensor_sketches_are_unbiased_and_converge() -> None:
    inputs = text(40)
    y, x, _, _ = rows(inputs)
    exact = (1 + y @ x.mT / 2) ** 2
    sizes = (32, 128, 512)
    errors = []
    for features in sizes:
        found = torch.stack(
            [kernel(TensorSketch(64, features, 2, seed), inputs, y, x) for seed in range(40)]
        )
        wrong = found - exact
        errors.append(float(wrong.square().mean().sqrt()))
        assert float(wrong.mean(0).square().mean().sqrt()) < 2 * errors[-1] / math.sqrt(40)
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_performer_is_unbiased_with_the_variance_of_its_source() -> None:
    """Relative variance (e^{|y + x|^2} - 1) / features; orthogonal vectors stay below."""
    inputs = text(12, spread=0.5)
    y, x, _, _ = rows(inputs)
    exact = (y @ x.mT).exp()
    sizes = (16, 64, 256)
    errors = []
    for features in sizes:
        found = torch.stack(
            [kernel(Performer(64, features, seed), inputs, y, x) for seed in range(60)]
        )
        relative = found / exact - 1
        variance = relative.square().mean(0)
        bound = ((y[..., :, None, :] + x[..., None, :, :]).square().sum(-1).exp() - 1) / features
        assert float(variance.mean()) < 1.1 * float(bound.mean())
        assert float(relative.mean(0).square().mean()) < 2 * float(variance.mean()) / 60
        errors.append(float(variance.mean().sqrt()))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_directions_of_random_vectors_are_uniform() -> None:
    """Without the signs of the QR factors the first entries would lean to one side."""
    blocks = feature_map.orthogonal_rows(8 * 4000, 8, 3)
    gram = blocks[:8] @ blocks[:8].mT
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-9)
    first = blocks.unflatten(0, (-1, 8))[:, 0, 0]
    assert abs(float(first.mean())) < 4 / math.sqrt(4000)
    assert float(blocks.square().mean()) == pytest.approx(1, abs=0.02)


def test_performer_is_uniform_attention_without_differences() -> None:
    inputs = text(500)
    inputs = dataclasses.replace(
        inputs,
        query=inputs.query.mean(2, keepdim=True).expand_as(inputs.query),
        key=inputs.key.mean(2, keepdim=True).expand_as(inputs.key),
    )
    inputs = dataclasses.replace(inputs, fitted=catalog.fit(moments(inputs.query, inputs.key)))
    output = run(Approximation(Window(32), Performer(64, 4)), inputs)
    torch.testing.assert_close(output, dense(inputs), rtol=0, atol=1e-4)


def test_linear_is_its_formula() -> None:
    inputs = text()
    y, x, _, _ = rows(inputs)
    f, g = (torch.where(t > 0, t + 1, t.clamp(max=0).exp()) for t in (y, x))
    torch.testing.assert_close(kernel(Linear(64), inputs, y, x), f @ g.mT / 16)


def test_a_query_that_is_a_landmark_is_exact_at_a_high_temperature() -> None:
    inputs = text()
    _, x, _, _ = rows(inputs)
    far = CSALR(64, 6, 1000)
    y = far.drawn(inputs)[None].double()
    torch.testing.assert_close(kernel(far, inputs, y, x), (y @ x.mT).exp(), rtol=1e-5, atol=1e-5)


def test_landmarks_follow_the_queries() -> None:
    inputs = text(3000)
    inputs = dataclasses.replace(inputs, fitted=catalog.fit(moments(inputs.query, inputs.key)))
    y = rows(inputs)[0]
    drawn = CSALR(64, 3000).drawn(inputs).double()
    seen, made = (t.mT @ t / t.shape[-2] for t in (y[0], drawn))
    assert float((made - seen).norm() / seen.norm()) < 0.2


def test_mixtures_of_landmarks_are_convex() -> None:
    inputs = text()
    y, x, _, _ = rows(inputs)
    weight = CSALR(64, 6, 3).lift(y, "query", inputs).exp()
    torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight[..., 0]))
    equal = kernel(CSALR(64, 6, 0), inputs, y, x)
    landmarks = CSALR(64, 6, 0).drawn(inputs)[None].double()
    torch.testing.assert_close(equal, (landmarks @ x.mT).exp().mean(2, True).expand_as(equal))


def test_products_are_squares() -> None:
    a, c = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(products(a) @ products(c).mT, (a @ c.mT).square())


def test_running_sums_survive_any_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(1, 2, 13, 3, 4, generator=generator).double()
    shift = torch.randn(1, 2, 13, 3, generator=generator).double() * 400
    shift[:, :, [0, 5]] = feature_map.EMPTY
    sums[:, :, [0, 5]] = 0
    found, top = running_sums(sums, shift)
    for last in range(13):
        expected_top = shift[:, :, : last + 1].amax(2)
        share = (shift[:, :, : last + 1] - expected_top[:, :, None]).exp()
        expected = (sums[:, :, : last + 1] * share[..., None]).sum(2)
        assert torch.equal(top[:, :, last], expected_top)
        torch.testing.assert_close(found[:, :, last], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_hazards_give_finite_numbers(far: FeatureMap, dtype: torch.dtype) -> None:
    """A key and a sink of huge norm, equal keys, and far queries."""
    inputs = text(500, dtype=dtype)
    key, query = inputs.key.clone(), inputs.query.clone()
    key[:, :, 0] *= 1000
    key[:, :, 70] *= 60
    key[:, :, 80:120] = key[:, :, 80:81]
    query[:, :, 300:310] *= 8
    inputs = dataclasses.replace(inputs, key=key, query=query)
    output = run(Approximation(Window(32), far), inputs, cpu_prefill.attend)
    assert bool(output.isfinite().all())
    largest = inputs.value.float().abs().amax()
    bound = 50 if isinstance(far, TensorSketch) else 1.01  # signed weights are not convex
    assert float(output.float().abs().amax()) <= bound * float(largest)


@pytest.mark.parametrize("far", [MAPS["performer"], MAPS["csalr"]], ids=["performer", "csalr"])
def test_exponential_features_neither_over_nor_underflow(far: FeatureMap) -> None:
    """Scores of hundreds, far beyond what float32 can hold as e^s."""
    exact = text(500)
    exact = dataclasses.replace(exact, query=exact.query * 30, key=exact.key * 10)
    low = dataclasses.replace(
        exact, query=exact.query.float(), key=exact.key.float(), value=exact.value.float()
    )
    approximation = Approximation(Window(32), far)
    rough, fine = (approximation.part(i, all_blocks(i)) for i in (low, exact))
    assert rough is not None and fine is not None
    assert bool(rough.usable[:, :, 128:].all()) and float(fine.shift.abs().max()) > 300
    log_mass = fine.mass.log() + fine.shift
    seen = log_mass.isfinite()
    wrong = rough.mass.log() + rough.shift - log_mass
    assert float(wrong[seen].abs().max()) < 1e-3 * float(fine.shift[seen].abs().max())


@pytest.mark.parametrize("far", MAPS.values(), ids=MAPS)
def test_sinks_are_in_no_state(far: FeatureMap) -> None:
    inputs = text()
    key, value = inputs.key.clone(), inputs.value.clone()
    key[:, :, :4], value[:, :, :4] = 1e300, float("nan")
    changed = dataclasses.replace(inputs, key=key)
    approximation = Approximation(Window(32), far)
    before, after = (approximation.part(i, all_blocks(i)) for i in (inputs, changed))
    assert before is not None and after is not None
    for name in ("numerator", "mass", "shift"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_rows_of_negative_mass_take_the_near_field_alone() -> None:
    inputs = text(500)
    far = TensorSketch(64, 2)
    made = Approximation(Window(32), far).part(inputs, all_blocks(inputs))
    assert made is not None
    alone_rows = ~made.usable[:, :, :500]
    assert bool(alone_rows[:, :, 128:].any()) and not bool(alone_rows[:, :, 128:].all())
    tiles, _ = Approximation(Window(32), far).tiles(inputs, all_blocks(inputs))
    alone, _ = reference_prefill.attend(
        inputs.query,
        inputs.key,
        inputs.value,
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles,
    )
    output = run(Approximation(Window(32), far), inputs)
    assert torch.equal(output[alone_rows], alone[alone_rows])
    assert not torch.equal(output[~alone_rows], alone[~alone_rows])


def random_part(seed: int, rows: int = 6) -> Part:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(1, 2, rows, 5, generator=generator).double()
    scale = torch.randn(1, 2, rows, generator=generator).double() * 300
    return Part(numbers[..., :3], numbers[..., 3].abs(), scale, (0, 2))


def test_parts_add_up_in_any_order() -> None:
    a, b, c = (random_part(seed) for seed in range(3))
    nothing = Part(
        torch.zeros_like(a.numerator),
        torch.zeros_like(a.mass),
        torch.full_like(a.shift, float("-inf")),
        a.head,
    )
    for one, two in [((a + b) + c, a + (b + c)), (a + b, b + a), (a + nothing, a)]:
        for name in ("numerator", "mass", "shift"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name))
    assert not bool((nothing + nothing).usable.any())
    with pytest.raises(ValueError, match="parts of different heads"):
        a + dataclasses.replace(b, head=(0, 1))


def test_parts_of_the_keys_make_up_dense_attention() -> None:
    inputs = text(200)
    heads = list(inputs.kv_head)
    keep, early = causal(inputs), torch.arange(200) < 90
    tensors = (inputs.query, inputs.key[:, heads], inputs.value[:, heads])
    near = reference_prefill.masked(*tensors, keep & ~early, inputs.scale)
    output, mass = reference_prefill.masked(*tensors, keep & early, inputs.scale)
    far = Part(output * 7, torch.full_like(mass, 7.0), mass - math.log(7), (0, 1, 2, 3))
    merged, total = far.merge(*near)
    expected, expected_mass = reference_prefill.masked(*tensors, keep, inputs.scale)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(total, expected_mass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_compiled_merge_is_that_of_torch(dtype: torch.dtype) -> None:
    """Heads in any order, padding rows, rows that are not usable, rows without a near field."""
    generator = torch.Generator().manual_seed(0)
    numerator = torch.randn(2, 3, 70, 21, generator=generator, dtype=torch.float64)
    mass = torch.rand(2, 3, 70, generator=generator, dtype=torch.float64)
    mass[0, 0, 3], mass[1, 2, 5], mass[0, 1, 6] = -1.0, 0.0, float("nan")
    numerator[1, 0, 9, 4] = float("inf")
    shift = 40 * torch.randn(2, 3, 70, generator=generator, dtype=torch.float64)
    near = torch.randn(2, 65, 5, 21, generator=generator, dtype=torch.float64).to(dtype)
    log_mass = 40 * torch.randn(2, 5, 65, generator=generator, dtype=torch.float64)
    log_mass[:, 2, 20] = float("-inf")
    sums = (numerator, mass, shift)
    exact = Part(*sums, (4, 0, 2)).merge(near.double().transpose(1, 2).clone(), log_mass.clone())
    fast = Part(*(t.float() for t in sums), (4, 0, 2))
    found = fast.merge(near.clone().transpose(1, 2), log_mass.float())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mass", [0.0, -1.0, float("nan"), float("inf")])
def test_an_unusable_part_changes_nothing(mass: float) -> None:
    far = dataclasses.replace(random_part(0), mass=torch.full((1, 2, 6), mass).double())
    near, log_mass = torch.randn(1, 3, 5, 3).double(), torch.randn(1, 3, 5).double()
    output, total = far.merge(near.clone(), log_mass.clone())
    assert torch.equal(output, near) and torch.equal(total, log_mass)


def test_a_part_names_its_heads() -> None:
    """Heads that are not named keep what they have, and rows past the output are ignored."""
    near, log_mass = torch.randn(1, 3, 5, 3).double(), torch.zeros(1, 3, 5).double()
    one, two = random_part(0), random_part(1)
    both = partial_softmax.stack_heads([one, dataclasses.replace(two, head=(1, 3))])
    assert both.head == (0, 2, 1, 3)
    output, _ = one.merge(near.clone(), log_mass.clone())
    assert torch.equal(output[:, 1], near[:, 1])
    assert not torch.equal(output[:, [0, 2]], near[:, [0, 2]])


def test_missing_fitted_data_is_named() -> None:
    inputs = dataclasses.replace(text(), fitted={})
    with pytest.raises(ValueError, match=r"no fitted data 'balanced\."):
        run(Approximation(Window(32), MAPS["taylor"]), inputs)
