"""Heads that read nothing: in engines, layers, models, scores, plans and searches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny_model
from tests.attention import Engine, dense, moments, run
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.cpu import prefill as cpu_prefill
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.off import Off
from attnplan.kernels.selectors.window import Window
from attnplan.models.load import identity
from attnplan.plan.plan import Plan, Target
from attnplan.runtime.attention import PLANNED
from attnplan.runtime.patch import patch, patch_assignment, patched_stats, unpatch
from attnplan.search.budget import Budget
from attnplan.search.latency import LatencyModel
from attnplan.search.problem import Problem
from attnplan.search.scores import Observed, score_layer
from attnplan.search.solve import solve

DENSE, OFF = catalog.DENSE, Approximation(Off())
NARROW = Approximation(Window(32))


def text(queries: int = 200, start: tuple[int, ...] = (0, 77)) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int) -> torch.Tensor:
        return torch.randn(len(start), heads, queries, 16, generator=generator)

    query, key = randn(4), randn(2)
    fitted = catalog.fit(moments(query, key))
    return Inputs.of_layer(query, key, randn(2), scale=0.25, start=start, fitted=fitted)


@pytest.mark.parametrize(
    "attend",
    [reference_prefill.attend, cpu_prefill.attend, cpu_prefill.attend_torch],
    ids=["reference", "cpu", "torch"],
)
def test_a_head_that_is_off_is_zero(attend: Engine) -> None:
    inputs = text()
    output = run(OFF, inputs, attend)
    assert output.shape == inputs.query.shape and torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize(
    "others",
    [[OFF] * 4, [OFF, DENSE, DENSE, NARROW], *([OFF, OFF, OFF, a] for a in (DENSE, NARROW))],
    ids=["all", "one", "beside-dense", "beside-window"],
)
def test_a_layer_takes_heads_that_are_off(others: list[Approximation]) -> None:
    inputs = text()
    kernel = LayerKernel(tuple(others), inputs.fitted)
    assert not kernel.is_dense
    output = kernel(inputs.query, inputs.key, inputs.value, scale=0.25, start=inputs.start)
    for head, approximation in enumerate(others):
        alone = run(approximation, inputs)[:, head]
        torch.testing.assert_close(output[:, head], alone, rtol=0, atol=1e-5)
        if approximation is OFF:
            assert torch.equal(alone, torch.zeros_like(alone))
        elif approximation is DENSE:
            torch.testing.assert_close(alone, dense(inputs)[:, head], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", catalog.NEAR)
def test_every_method_runs_beside_a_head_that_is_off(name: str) -> None:
    inputs = text(700, (0,))
    offered = catalog.NEAR[name].choices(AttentionShape(1, 4, 2, 2048, 2048, 16))
    approximation = Approximation(next(iter(offered)))
    kernel = LayerKernel((OFF, approximation, OFF, OFF), inputs.fitted)
    output = kernel(inputs.query, inputs.key, inputs.value, scale=0.25)
    assert not output[:, [0, 2, 3]].any() and output.isfinite().all()
    assert bool(output[:, 1].any()) == (approximation != OFF)


def test_switching_off_loses_the_whole_output() -> None:
    inputs = text(start=(0,))
    gradient = torch.randn(1, 4, 200, 16, generator=torch.Generator().manual_seed(1))
    observed = Observed(inputs, gradient, None)
    scores = score_layer(observed, [DENSE, OFF], np.ones((4, 2), bool), torch.arange(4))
    np.testing.assert_allclose(scores.relative_error[:, 1], 1)
    felt = (gradient[0] * dense(inputs)[0]).sum(-1).square().mean(-1)
    np.testing.assert_allclose(scores.fisher[:, 1], felt, rtol=1e-4)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    tiny_model.save(tmp_path)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    return loaded


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found


@pytest.mark.parametrize("off", [(0,), (1, 2, 3), (0, 1, 2, 3)], ids=str)
def test_a_model_without_a_head_is_one_without_its_output_projection(
    model: PreTrainedModel, off: tuple[int, ...]
) -> None:
    ids = torch.randint(3, 96, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :70] = 0  # left padding
    patch_assignment(model, [[OFF if head in off else DENSE for head in range(4)], [DENSE] * 4])
    planned = logits(model, ids, mask)
    assert next(iter(patched_stats(model).values())) == {PLANNED: 1}
    unpatch(model)
    with torch.no_grad():
        weight = model.get_submodule("model.layers.0.self_attn").o_proj.weight
        weight.unflatten(1, (4, 16))[:, list(off)] = 0
    expected = logits(model, ids, mask)
    wrong = (planned - expected)[mask.bool()].abs().max()
    assert wrong <= 64 * torch.finfo(planned.dtype).eps * expected.abs().max()


def test_a_plan_may_switch_everything_off(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = Plan.from_assignment(
        [[OFF] * 4] * 2,
        model=identity(model, "tiny"),
        target=Target("test", "cpu", "float32", "cpu", {}, (1, 2)),
        context=(16, 256),
    )
    plan.save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert loaded.kernels(100) == plan.kernels(100) and "off" in loaded.summary()
    patch(model, loaded)
    ids = torch.randint(3, 96, (1, 100), generator=torch.Generator().manual_seed(1))
    assert logits(model, ids, torch.ones_like(ids)).isfinite().all()


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.7])
def test_what_costs_nothing_is_chosen_where_it_loses_least(limit: float) -> None:
    """Two layers of two heads: as many are off as the density asks for."""
    loss = np.array([[0.1, 0.4], [0.2, 0.3]])
    problem = Problem(
        names=("dense", "off()"),
        families=("dense", "gated"),
        windows=(2048, 0),
        fisher=np.stack([np.zeros_like(loss), loss], -1),
        density=np.array([1.0, 0.0]),
        kv_bytes=np.ones(2),
        group=1,
        latency=LatencyModel(2.0, 0.0, np.array([1.0, 0.0]), np.zeros(2), 1.0),
    )
    solution = solve(problem, Budget(max_density=max(limit, 1e-9)))
    kept = int(limit * 4)
    assert solution.prediction.kl == pytest.approx(np.sort(loss, None)[: 4 - kept].sum())
    assert solution.prediction.density == kept / 4
