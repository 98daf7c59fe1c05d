"""A measurement of a plan that did not act is refused, or says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.architectures import text, tiny
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.selectors.dense import Dense
from attnplan.kernels.selectors.window import Window
from attnplan.quality.prefill import Reference, induction_accuracy, kl_rows, original
from attnplan.runtime import attention as runtime
from attnplan.runtime.patch import patch_assignment, unpatch
from attnplan.search.evaluation import BROKEN_KL

NARROW = Approximation(Window(8, 2))


def planned(
    model: Any, one: Approximation, context: tuple[int, int | None] = (1, None)
) -> Callable[[], Any]:
    @contextmanager
    def run() -> Iterator[None]:
        patch_assignment(model, [[one] * 4] * 2, context=context)
        try:
            yield
        finally:
            unpatch(model)

    return run


def test_quality_counts_the_layers_that_ran_the_plan() -> None:
    model = tiny("Llama")
    reference = Reference(model, torch.stack([text(120), text(120, 2)]))
    found = reference.quality(planned(model, NARROW))
    assert found.planned_layers == 2
    assert found.kl_per_token > 1e-3
    assert found.kl_last_quarter is not None
    for other, context in ((NARROW, (121, None)), (Approximation(Dense()), (1, None))):
        same = reference.quality(planned(model, other, context))
        assert (same.planned_layers, same.kl_per_token, same.kl_last_quarter) == (0, 0, 0)
    assert reference.quality(original).planned_layers is None
    whole = reference.quality(planned(model, Approximation(Window(512, 0))))
    assert whole.planned_layers == 2 and abs(whole.kl_per_token) < 1e-6


def test_the_last_quarter_is_the_mean_over_its_positions() -> None:
    model, tokens = tiny("Llama"), text(101)
    found = Reference(model, tokens[None]).comparison(planned(model, NARROW), 0)
    with torch.no_grad():
        dense = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
        with planned(model, NARROW)():
            other = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
    rows = kl_rows(dense, other)[:-1]
    assert found.kl == pytest.approx(float(rows.mean()), rel=1e-4)
    assert found.last_quarter == pytest.approx(float(rows[75:].mean()), rel=1e-4)


def test_a_plan_whose_kernels_compute_dense_attention_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dense(
        self: LayerKernel, query: Tensor, key: Tensor, value: Tensor, *, scale: float, **more: Any
    ) -> Tensor:
        output, _ = sdpa_attention_forward(
            torch.nn.Module(), query, *(x.repeat_interleave(2, 1) for x in (key, value)), None,
            scaling=scale,
        )  # fmt: skip
        return output.transpose(1, 2)

    monkeypatch.setattr(LayerKernel, "__call__", dense)
    model = tiny("Llama")
    with pytest.raises(ValueError, match="plan did not act: 2 layers of LlamaForCausalLM ran it"):
        Reference(model, text(120)[None]).quality(planned(model, NARROW))


def test_a_layer_that_runs_dense_where_it_has_a_plan_is_named() -> None:
    model = tiny("Llama")
    unplanned = "attnplan_test_unplanned"

    def attention(module: Any, *args: Any, **options: Any) -> Any:
        run = sdpa_attention_forward if module.layer_idx == 1 else runtime.attention
        return run(module, *args, **options)

    AttentionInterface.register(unplanned, attention)

    @contextmanager
    def lost() -> Iterator[None]:
        with planned(model, NARROW)():
            model.set_attn_implementation(unplanned)
            yield

    why = "did not act in layer 1 where it was to be measured: its attention was not called"
    with pytest.raises(ValueError, match=why):
        Reference(model, text(120)[None]).compare(lost, 0)
    with pytest.raises(ValueError, match=why):
        induction_accuracy(model, lost, length=60)


def test_ids_that_a_model_rules_out_do_not_break_the_divergence() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.7, 0.1]]).log()
    right = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.8 * math.log(8 / 7)]
    torch.testing.assert_close(kl_rows(p, q), torch.tensor(right))
    assert kl_rows(q, p).tolist()[1] == math.inf


def test_a_model_that_overflows_later_in_a_text_is_refused_and_a_plan_is_broken() -> None:
    model, tokens = tiny("Llama"), text(120)

    @contextmanager
    def overflowing() -> Iterator[None]:
        before = model.model.norm.weight.detach().clone()
        model.model.norm.weight.data.fill_(math.inf)
        yield
        model.model.norm.weight.data.copy_(before)

    reference = Reference(model, tokens[None])
    assert reference.comparison(overflowing, 0).kl == BROKEN_KL
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = math.nan
    tokens = torch.cat([tokens % 90, torch.tensor([95, 3, 4])])
    with pytest.raises(ValueError, match="in float32 gives probabilities that are not finite"):
        Reference(model, tokens[None]).compare(original, 0)
