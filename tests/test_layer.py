"""A layer of different heads gives what each of its heads gives alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention import chosen_pairs
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer import layer_attention
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.loki import Loki
from attnplan.kernels.selectors.window import Window

DENSE = catalog.DENSE
CHOICES = [a for a in catalog.choices(AttentionShape(1, 4, 2, 600, 600, 16)) if not a.is_dense]
ONE_EACH = list({a.name: a for a in [*CHOICES, *chosen_pairs()]}.values())
WINDOWS = [Approximation(Window(w)) for w in (16, 64, 100)]
FAR = [
    Approximation(Window(64), CentroidT(64, 8)),
    Approximation(Window(32), CentroidT(64, 16)),
    Approximation(Window(32), CentroidT(256, 80)),
]


def call(
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 200,
    keys: int = 200,
    *,
    batch: int = 1,
    start: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(n_heads: int, tokens: int) -> Tensor:
        return torch.randn((batch, n_heads, tokens, 16), generator=generator).to(dtype)

    query, key = randn(heads, queries) + 0.5, randn(kv_heads, keys) + 0.5
    moments = Moments(
        query.float().mean((0, 2)),
        torch.einsum("bhid,bhie->hde", query.float(), query.float()) / (batch * queries),
        key.float().mean((0, 2)),
        torch.einsum("bhid,bhie->hde", key.float(), key.float()) / (batch * keys),
    )
    value = randn(kv_heads, keys)
    return Inputs.of_layer(query, key, value, scale=0.25, start=start, fitted=catalog.fit(moments))


def run(assignment: list[Approximation], inputs: Inputs) -> Tensor:
    kernel = LayerKernel(tuple(assignment), inputs.fitted)
    return kernel(inputs.query, inputs.key, inputs.value, scale=inputs.scale, start=inputs.start)


def alone(approximation: Approximation, inputs: Inputs, head: int) -> Tensor:
    """One head by the reference, in float64 where the keys are chosen at the inputs' precision."""
    some = inputs.heads((head,))
    tiles, slots = approximation.tiles(some, torch.arange(inputs.blocks))
    if slots is not None:
        wide = {n: getattr(slots, n).double() for n in ("key", "log_weight", "weight", "value")}
        slots = replace(slots, **wide)
    output, log_mass = reference_prefill.attend(
        some.query.double(),
        some.key.double(),
        some.value.double(),
        scale=some.scale,
        kv_head=some.kv_head,
        tiles=tiles,
        slots=slots,
    )
    part = approximation.part(some, torch.arange(inputs.blocks))
    if part is not None:
        part.merge(output, log_mass)
    return output[:, 0]


def assert_as_each_alone(assignment: list[Approximation], inputs: Inputs) -> None:
    output = run(assignment, inputs)
    assert output.dtype == inputs.query.dtype
    # sums of hundreds of terms in float32, and a few roundings to the dtype
    tolerance = 2 * torch.finfo(output.dtype).eps + 16 * torch.finfo(torch.float32).eps
    for head, approximation in enumerate(assignment):
        expected = alone(approximation, inputs, head)
        wrong = (output[:, head].double() - expected).abs().max()
        allowed = tolerance * expected.abs().max()
        assert wrong <= allowed, f"head {head}, {catalog.key(approximation)}: {wrong} > {allowed}"


CALLS = {
    "prefill": {},
    "one-token": {"queries": 1, "keys": 1},
    "whole-blocks": {"queries": 256, "keys": 256},
    "continued": {"queries": 70, "keys": 333},
    "one-query": {"queries": 1, "keys": 300},
    "padded": {"batch": 2, "start": (0, 77)},
    "padded-by-blocks": {"batch": 3, "start": (128, 0, 199)},
    "eight-heads-per-kv-head": {"heads": 8, "kv_heads": 1},
    "no-groups": {"heads": 4, "kv_heads": 4},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16-padded": {"dtype": torch.bfloat16, "batch": 2, "start": (5, 0)},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
def test_every_method_beside_all_others_gives_what_it_gives_alone(
    sizes: dict[str, object],
) -> None:
    inputs = call(**sizes)  # type: ignore[arg-type]
    heads = len(inputs.head)
    kinds = [DENSE, *ONE_EACH]
    for first in range(0, len(kinds), heads):
        assignment = (kinds[first:] + kinds)[:heads]
        assert_as_each_alone(assignment, inputs)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.sampled_from([DENSE, *CHOICES]), min_size=6, max_size=6),
    queries=st.integers(1, 150),
    before=st.integers(0, 80),
    padding=st.integers(0, 60),
)
def test_any_mixture_gives_what_its_heads_give(
    rows: list[Approximation], queries: int, before: int, padding: int
) -> None:
    start = (min(padding, queries + before - 1), 0)
    inputs = call(6, 3, queries, queries + before, batch=2, start=start)
    assert_as_each_alone(rows, inputs)


def test_all_dense_is_scaled_dot_product_attention() -> None:
    inputs = call(queries=300, keys=300)
    kernel = LayerKernel((DENSE,) * 4)
    assert kernel.is_dense
    output = kernel(inputs.query, inputs.key, inputs.value, scale=inputs.scale)
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=True,
        scale=inputs.scale,
        enable_gqa=True,
    )
    torch.testing.assert_close(output, expected)
    assert not LayerKernel((DENSE,) * 3 + (WINDOWS[0],)).is_dense


def test_rows_of_padding_are_zero() -> None:
    inputs = call(batch=2, start=(0, 130))
    output = run([DENSE, WINDOWS[0], FAR[0], Approximation(Loki(8, 16, 32))], inputs)
    assert not output[1, :, :130].any()
    assert output[1, :, 130:].abs().amax(-1).min() > 0
    assert output[0].abs().amax(-1).min() > 0


def test_slots_of_several_far_fields_merge() -> None:
    """Far fields of different lengths, next to heads that have none."""
    inputs = call(8, 2, 600, 600)
    assignment = [FAR[0], DENSE, FAR[1], FAR[0], WINDOWS[0], FAR[2], FAR[0], FAR[2]]
    kernel = LayerKernel(tuple(assignment), inputs.fitted)
    _, slots = kernel.tiles(inputs, torch.arange(inputs.blocks))
    assert slots is not None
    assert slots.key.shape[2] % 64 == 0
    assert [int(row) >= 0 for row in slots.head] == [a.far is not None for a in assignment]
    used = slots.head[slots.head >= 0].tolist()
    assert sorted(used) == list(range(slots.key.shape[1]))
    assert_as_each_alone(assignment, inputs)


def test_a_far_field_without_slots_yet_leaves_none() -> None:
    inputs = call(queries=60, keys=60)
    assignment = [FAR[0], DENSE, FAR[1], WINDOWS[0]]
    _, slots = LayerKernel(tuple(assignment), inputs.fitted).tiles(inputs, torch.arange(1))
    assert slots is None
    assert_as_each_alone(assignment, inputs)


def test_one_kernel_serves_calls_of_any_shape() -> None:
    """Static tile lists are kept per shape, padding and blocks, and never mixed up."""
    assignment = (*WINDOWS, DENSE)
    kernel = LayerKernel(assignment)
    calls = [
        call(),
        call(queries=70),
        call(queries=300, keys=300),
        call(batch=2),
        call(batch=2, start=(0, 40)),
        call(batch=2, start=(40, 0)),
        call(kv_heads=1),
    ]
    for _ in range(2):  # the second time, from the cache
        for inputs in calls:
            output = kernel(
                inputs.query, inputs.key, inputs.value, scale=inputs.scale, start=inputs.start
            )
            for head, approximation in enumerate(assignment):
                expected = alone(approximation, inputs, head).float()
                torch.testing.assert_close(output[:, head], expected, atol=2e-6, rtol=1e-5)


def test_some_blocks_do_not_use_the_list_of_all() -> None:
    kernel = LayerKernel((*WINDOWS, DENSE))
    inputs = call()
    every, _ = kernel.tiles(inputs, torch.arange(4))
    some, _ = kernel.tiles(inputs, torch.tensor([1, 3]))
    counts = every.counts(256, 200).view(1, 4, 4, 64, 200)[:, :, [1, 3]]
    assert torch.equal(some.counts(128, 200).view(1, 4, 2, 64, 200), counts)


def test_layers_with_the_same_heads_in_another_order_share_one_list() -> None:
    inputs = call()
    blocks = torch.arange(inputs.blocks)
    one, _ = LayerKernel((WINDOWS[0], WINDOWS[0], WINDOWS[1], WINDOWS[1])).tiles(inputs, blocks)
    two, _ = LayerKernel((WINDOWS[0], WINDOWS[1], WINDOWS[0], WINDOWS[1])).tiles(inputs, blocks)
    assert torch.equal(one.counts(200, 200)[:, [0, 2, 1, 3]], two.counts(200, 200))


def test_the_cache_of_static_lists_is_bounded() -> None:
    kernel = LayerKernel((WINDOWS[0],) * 4)
    for keys in range(1, 2 * layer_attention._CACHED_LISTS):
        row = torch.zeros(1, 4, keys, 16)  # static selectors look at sizes alone
        kernel.tiles(Inputs.of_layer(row[:, :, :1], row, row, scale=1.0), torch.arange(1))
    assert len(layer_attention._STATIC) == layer_attention._CACHED_LISTS


def test_a_method_without_its_fitted_data_is_named() -> None:
    inputs = call()
    kernel = LayerKernel((Approximation(Loki(4, 8, 16)),) * 4)
    with pytest.raises(ValueError, match=r"no fitted data 'loki.query_map'"):
        kernel(inputs.query, inputs.key, inputs.value, scale=inputs.scale)
