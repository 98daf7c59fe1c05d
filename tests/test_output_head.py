"""What turns hidden states into logits is found in models of many kinds, and proved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from tests.architectures import GROUPED, TEXTS, enlarged, seeing, text, tiny
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.selectors.window import Window
from attnplan.models.attention_sites import attention_sites, implementations
from attnplan.profiles.capture.capture import capture, logits_of
from attnplan.quality.continuation import prompt, step
from attnplan.quality.prefill import Reference, body_of
from attnplan.runtime.patch import patch_assignment, unpatch

NAMES = [*TEXTS, "Gemma 3 with images"]


def model_of(name: str) -> Any:
    return tiny(name) if name in TEXTS else seeing()


@contextmanager
def windows(model: Any) -> Iterator[None]:
    rows = [[Approximation(Window(8, 2))] * site.heads for site in attention_sites(model)]
    patch_assignment(model, rows, context=(1, 200))
    try:
        yield
    finally:
        unpatch(model)


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    made: Tensor = model(input_ids=tokens[None], use_cache=False).logits
    return made


def divergence(original: Tensor, planned: Tensor) -> float:
    """Mean KL of the next token, in float64."""
    p, q = (x[0, :-1].double().log_softmax(-1) for x in (original, planned))
    return float(((p - q) * p.exp()).sum(-1).mean())


@pytest.mark.parametrize("name", NAMES)
def test_kl_is_that_of_two_plain_forward_passes(name: str) -> None:
    model, tokens = model_of(name), text(100)
    with windows(model):
        planned = logits(model, tokens)
    right = divergence(logits(model, tokens), planned)
    found = Reference(model, tokens[None]).compare(lambda: windows(model), 0)[0]
    assert right > 1e-5
    assert found == pytest.approx(right, rel=1e-3, abs=1e-7)
    with windows(model):
        body = body_of(model, tokens)
    with torch.no_grad(), logits_of(model, body) as made:
        parts = [made(some) for some in body.last_hidden_state.split(33, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), planned)


@pytest.mark.parametrize("name", NAMES)
def test_reading_through_a_cache_gives_the_same_states(name: str) -> None:
    model, tokens = model_of(name), text(40)
    first = prompt(model, tokens[:25])
    then = step(model, first, tokens[25:])
    states = torch.cat([first.last_hidden_state, then.last_hidden_state], 1)
    with torch.no_grad(), logits_of(model, then) as made:
        torch.testing.assert_close(made(states), logits(model, tokens), rtol=1e-3, atol=1e-3)


KEPT = "attnplan_test_outputs"
OUTPUTS: list[Tensor] = []


def _keep(module: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
    output, _ = sdpa_attention_forward(module, *args, **options)
    output.retain_grad()
    OUTPUTS.append(output)
    return output, None


AttentionInterface.register(KEPT, _keep)
AttentionMaskInterface.register(KEPT, sdpa_mask)


@pytest.mark.parametrize("name", ["OPT", "OPT, projected", "BART decoder", "Granite", "GPT-2"])
def test_captured_gradients_are_those_of_a_plain_backward_pass(name: str) -> None:
    model, tokens = tiny(name, torch.float64), text(30)
    captured = capture(model, tokens, seed=1, store_dtype=torch.float64)
    assert captured.labels is not None
    OUTPUTS.clear()
    model.set_attn_implementation(KEPT)
    scores = model(input_ids=tokens[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(scores, captured.labels, reduction="sum").backward()
    assert len(OUTPUTS) == len(captured.layers) == 2
    for layer, output in zip(captured.layers, OUTPUTS, strict=True):
        assert layer.gradient is not None and output.grad is not None
        torch.testing.assert_close(layer.output, output.detach().transpose(1, 2))
        right = output.grad.transpose(1, 2)
        assert float(right.abs().max()) > 1e-4
        torch.testing.assert_close(layer.gradient, right, rtol=1e-4, atol=1e-6)


def test_a_capture_leaves_every_part_on_its_own_attention() -> None:
    model = seeing()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    before = implementations(model)
    assert {name for _, name in before} == {"eager", "sdpa"}
    assert len(capture(model, text(20)).layers) == 2
    assert implementations(model) == before


def test_logits_of_states_run_no_layer_and_leave_nothing_behind() -> None:
    model, tokens = tiny("OPT"), text(20)
    body = body_of(model, tokens)
    runs: list[Any] = []
    decoder = model.model.decoder.layers[0]
    handle = decoder.register_forward_pre_hook(lambda *args: runs.append(args))
    with torch.no_grad(), logits_of(model, body) as made:
        made(body.last_hidden_state)
    handle.remove()
    assert not runs
    assert all("forward" not in m.__dict__ and not m._forward_pre_hooks for m in model.modules())


def test_a_model_in_another_dtype_is_proved_again() -> None:
    model, tokens = tiny("OPT, projected"), text(20)
    body_of(model, tokens)
    model.to(torch.bfloat16)
    body = body_of(model, tokens)
    with torch.no_grad(), logits_of(model, body) as made:
        found = made(body.last_hidden_state)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, logits(model, tokens), rtol=0.02, atol=0.02)


class Positional(LlamaForCausalLM):
    """Its logits depend on the position, not only on the state."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits + torch.arange(output.logits.shape[1])[:, None]
        return output


class Headless(LlamaForCausalLM):
    """Its logits are made by no module."""

    def forward(self, *args: Any, **options: Any) -> Any:
        body = self.model(*args, **options)
        states = body.last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=states @ self.lm_head.weight.mT)


class Constant(LlamaForCausalLM):
    """Its logits do not depend on the text."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = torch.zeros_like(output.logits)
        return output


def llama(kind: type[LlamaForCausalLM]) -> Any:
    torch.manual_seed(0)
    return enlarged(kind(LlamaConfig(**GROUPED)).eval())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Positional, "what lm_head reads does not give its logits"),
        (Headless, "0 modules look like its output embedding"),
        (Constant, "its logits do not depend on its hidden states"),
    ],
)
def test_a_head_that_cannot_be_told_apart_is_refused(kind: Any, why: str) -> None:
    model = llama(kind)
    with pytest.raises(ValueError, match=f"compare predictions of {kind.__name__}: {why}"):
        Reference(model, text(20)[None]).compare(lambda: windows(model), 0)
    assert all("forward" not in m.__dict__ and not m._forward_pre_hooks for m in model.modules())


def test_an_output_embedding_that_the_model_does_not_name_is_found() -> None:
    class Unnamed(LlamaForCausalLM):
        def get_output_embeddings(self) -> None:
            return None

    model, tokens = llama(Unnamed), text(20)
    body = body_of(model, tokens)
    with torch.no_grad(), logits_of(model, body) as made:
        torch.testing.assert_close(made(body.last_hidden_state), logits(model, tokens))


def test_a_model_that_is_broken_as_it_is_cannot_be_measured() -> None:
    model = tiny("Llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        ValueError, match="LlamaForCausalLM in float32 gives probabilities that are not finite"
    ):
        body_of(model, text(20))


def test_an_encoder_is_no_causal_language_model() -> None:
    model = tiny("Llama").model
    with pytest.raises(ValueError, match="causal language model, got LlamaModel"):
        body_of(model, text(20))
