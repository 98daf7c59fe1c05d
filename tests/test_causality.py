"""What a token is cannot change a row before it, whatever the method: within a block too.

And what follows a text changes none of its rows: a prompt's rows are the same alone and inside a
longer one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention import chosen_pairs, moments, run
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape

LONG = AttentionShape(1, 4, 2, 8192, 8192, 16)
SMALL = {
    "window": 24,
    "segment": 64,
    "local": 1,
    "columns": 8,
    "diagonals": 1,
    "observers": 16,
    "chunk": 64,
    "span": 128,
    "every": 48,
    "blocks": 2,
    "top": 1,
}
"""Knobs with which a method has something to leave out in a text of some hundred tokens."""


def smaller(part: Selector | Compressor) -> Selector | Compressor:
    """The same method with small knobs, as far as it takes them."""
    for knob, value in SMALL.items():
        if knob in {f.name for f in dataclasses.fields(part)}:  # type: ignore[arg-type]
            try:
                part = dataclasses.replace(part, **{knob: value})  # type: ignore[type-var]
            except ValueError:
                continue  # a size that the method must have
    return part


def small_ones() -> Iterator[Approximation]:
    """Every setting kind of the catalog, made small: knobs that SMALL does not name stay."""
    for approximation in [*catalog.choices(LONG), *chosen_pairs()]:
        near, far = approximation.near, approximation.far
        yield Approximation(smaller(near), None if far is None else smaller(far))  # type: ignore[arg-type]


CHOICES = list(dict.fromkeys(small_ones()))
LENGTHS = st.sampled_from([1, 65, 129, 200, 257, 320])
"""Of texts: one token, whole blocks and others, most of them of some blocks."""


def draw(
    approximation: Approximation,
    tokens: int,
    *,
    group: int = 2,
    start: tuple[int, ...] = (0,),
    seed: int = 0,
) -> Inputs:
    """A call in float64 with fitted data that do not depend on what is drawn."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int) -> Tensor:
        size = (len(start), heads, tokens, 16)
        return torch.randn(size, generator=generator, dtype=torch.float64)

    # keys share a component, as those of language models do
    query, key, value = randn(2 * group) * 1.5 + 0.5, randn(2) + 0.7, randn(2)
    seen = torch.Generator().manual_seed(99)
    noise = torch.randn(1, 2 * group + 2, 300, 16, generator=seen, dtype=torch.float64)
    fitted = approximation.fit(moments(noise[:, 2:] * 1.5 + 0.5, noise[:, :2] + 0.7))
    return Inputs.of_layer(query, key, value, scale=0.25, start=start, fitted=fitted)


def changed(inputs: Inputs, at: int, which: str, size: float) -> Inputs:
    """The same call with other numbers at one position, or from it on in all tensors."""
    generator = torch.Generator().manual_seed(at)
    names, end = ((which,), at + 1) if which != "all" else (("query", "key", "value"), None)
    made = {}
    for name in names:
        made[name] = getattr(inputs, name).clone()
        some = made[name][:, :, at:end]
        some.copy_(torch.randn(some.shape, generator=generator, dtype=torch.float64) * size)
    return dataclasses.replace(inputs, **made)


CALLS = {
    "tokens": LENGTHS,
    "where": st.sampled_from([0.99, 0.9, 0.8, 0.7, 0.5, 0.3]),
    "which": st.sampled_from(["all", "query", "key", "value"]),
    "size": st.sampled_from([1.0, 30.0, 1e4]),
    "group": st.sampled_from([1, 2]),
    "padding": st.sampled_from([0, 5, 64, 77]),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("approximation", CHOICES, ids=catalog.key)
@settings(max_examples=6, deadline=None)
@given(**CALLS)
def test_no_position_changes_a_row_before_it(
    approximation: Approximation,
    tokens: int,
    where: float,
    which: str,
    size: float,
    group: int,
    padding: int,
    seed: int,
) -> None:
    """Not by one bit: what is computed for a row does not depend on what it must not see."""
    start, at = (min(padding, tokens - 1), 0), int(where * tokens)
    inputs = draw(approximation, tokens, group=group, start=start, seed=seed)
    after = changed(inputs, at, which, size)
    before = run(approximation, inputs)[:, :, :at]
    assert torch.equal(run(approximation, after)[:, :, :at], before)
    if approximation.far is None:
        keep = approximation.near.keep(inputs)[:, :, :at]
        assert torch.equal(approximation.near.keep(after)[:, :, :at], keep)


@pytest.mark.parametrize("approximation", CHOICES, ids=catalog.key)
@settings(max_examples=4, deadline=None)
@given(**CALLS)
def test_nor_in_the_engine_of_a_cpu(
    approximation: Approximation,
    tokens: int,
    where: float,
    which: str,
    size: float,
    group: int,
    padding: int,
    seed: int,
) -> None:
    """In float32, to rounding: keys of a tile may be added in another order."""
    start, at = (min(padding, tokens - 1), 0), int(where * tokens)
    inputs = draw(approximation, tokens, group=group, start=start, seed=seed)
    kernel = LayerKernel((approximation,) * 2 * group, inputs.fitted)

    def output(call: Inputs) -> Tensor:
        tensors = (getattr(call, name).float() for name in ("query", "key", "value"))
        return kernel(*tensors, scale=call.scale, start=call.start)[:, :, :at]

    found, wanted = output(changed(inputs, at, which, size)), output(inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("approximation", CHOICES, ids=catalog.key)
@settings(max_examples=6, deadline=None)
@given(
    tokens=LENGTHS,
    more=st.sampled_from([1, 2, 63, 64, 65, 200]),
    group=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 5, 64, 77]),
    seed=st.integers(0, 99),
)
def test_the_first_rows_of_a_longer_text_are_those_of_the_text(
    approximation: Approximation, tokens: int, more: int, group: int, padding: int, seed: int
) -> None:
    start = (min(padding, tokens - 1), 0)
    inputs = draw(approximation, tokens + more, group=group, start=start, seed=seed)
    short = dataclasses.replace(
        inputs, **{n: getattr(inputs, n)[:, :, :tokens] for n in ("query", "key", "value")}
    )
    whole = run(approximation, inputs)[:, :, :tokens]
    torch.testing.assert_close(run(approximation, short), whole, rtol=0, atol=1e-9)
    if approximation.far is None:
        keep = approximation.near.keep(inputs)[:, :, :tokens, :tokens]
        assert torch.equal(approximation.near.keep(short), keep)
