"""Far fields of slots that are fitted, filtered or nested: what each of them promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from tests.attention import moments
from torch import Tensor

from attnplan.kernels import catalog, query_draws
from attnplan.kernels.approximation import Inputs
from attnplan.kernels.far.attention_matching import match_mass


def text(queries: int = 700, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Four heads over two kv heads, keys with a common part, and what the catalog fits to them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int) -> Tensor:
        return torch.randn(1, heads, queries, 16, generator=generator, dtype=torch.float64)

    query, key, value = randn(4) * 1.2 + 0.4, randn(2) + 0.6, randn(2)
    fitted = catalog.fit(moments(query, key))
    tensors = (t.to(dtype) for t in (query, key, value))
    return Inputs.of_layer(*tensors, scale=0.25, fitted=fitted)


def test_drawn_queries_have_the_moments_of_the_head() -> None:
    inputs = text(4000)
    found = moments(inputs.query, inputs.key)
    drawn = query_draws.draw(found, 20000)
    torch.testing.assert_close(drawn.mean(1), found.query_mean, rtol=0, atol=1e-9)
    gram = drawn.mT @ drawn / drawn.shape[1]
    assert float((gram - found.query_gram).norm() / found.query_gram.norm()) < 0.05
    torch.testing.assert_close(query_draws.draw(found, 8), query_draws.draw(found, 8))


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_masses_are_matched_as_well_as_by_an_active_set_solver(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 64, 128, generator=generator, dtype=torch.float64) * spread
    share = logits.softmax(-1)
    for columns in (share[..., :4], share[..., :16]):
        found = match_mass(columns, 1e9)
        for c, weight in zip(columns.numpy(), found.numpy(), strict=True):
            assert (weight >= 0).all()
            _, least = nnls(c, np.ones(64))
            assert np.linalg.norm(c @ weight - 1) <= 1.01 * least
